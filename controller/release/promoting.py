"""Moves the head of a channel: uploads what a release needs, and vouches for it by a timestamp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offramp.controller.errors import ConfigError, RegistryUnavailableError
from offramp.controller.keys.envelopes import STAMP_MAGIC
from offramp.controller.keys.signer import Signer
from offramp.controller.release.ledger import Ledger
from offramp.controller.release.records import ServedHead, SignedRecords
from offramp.controller.release.registry import PolicyRegistry
from offramp.controller.release.trust import Stamp, require_servable


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelHead:
    """The head of a channel, as its publisher moves it; used within the ledger's lock.

    Attributes:
        registry: Where workers look.
        ledger: Where promotions are recorded.
        records: The same ledger, with signatures checked.
        served: What the registry serves.
        signer: Signs timestamps.
        roots: What was signed for its root, by version.
        epoch: Incarnation of the channel.
        stamp_ttl_s: Seconds that a timestamp vouches for the head.
        clock: Unix seconds.
    """

    registry: PolicyRegistry
    ledger: Ledger
    records: SignedRecords
    served: ServedHead
    signer: Signer
    roots: Mapping[int, bytes]
    epoch: int
    stamp_ttl_s: float
    clock: Callable[[], float]

    def move(self, generation: int) -> None:
        """Make a recorded release the head. Raises as ``Publisher.promote`` does."""
        self.served.catch_up()
        release = self.records.signed(generation)
        if generation == self.ledger.promoted() == self.served.generation:
            self.upload(generation)
            self.vouch()
            return
        if generation < self.ledger.promoted():
            problem = f"{generation} is older than {self.ledger.promoted()}, promoted before"
            raise ConfigError("generation", problem, "Roll back instead: workers never go back")
        require_servable(release, self.ledger.blob(release.digest), self.signer.root, self.clock)
        beside = release.rollout.stable_generation
        if beside and beside != self.records.stable().generation:
            problem = f"{generation} is a canary beside {beside}, which serves no more"
            raise ConfigError("generation", problem, "Promote it anew, with a percent")
        self.upload(generation)
        # A worker woken by the promotion must find a living timestamp: renew the old one first.
        self.vouch()
        self.registry.promote(self.records.head(generation), self.served.generation)
        self.ledger.record_promotion(generation)
        try:
            self.vouch()
        except RegistryUnavailableError as error:
            said = f"generation {generation} is served, its timestamp not renewed: {error.problem}"
            remedy = f"{error.remedy}, then promote it again"
            raise RegistryUnavailableError(error.field, said, remedy) from error
        self.served.forget_old_blobs()

    def vouch(self) -> None:
        """Renew the signed timestamp of what was promoted last, by the ledger.

        Raises:
            RegistryUnavailableError: the registry cannot be reached.
        """
        now = self.clock()
        stamp = Stamp(
            channel=self.records.channel,
            epoch=self.epoch,
            generation=self.ledger.promoted(),
            issued_at=now,
            expires_at=now + self.stamp_ttl_s,
            root=self.signer.root.version,
        )
        self.registry.stamp(self.signer.sign(stamp.to_bytes(), STAMP_MAGIC), self.stamp_ttl_s)

    def upload(self, generation: int) -> None:
        """Put all that workers need to run a release into the registry."""
        for version, envelope in self.roots.items():
            self.registry.put_root(version, envelope)
        for blob in self.records.blobs(generation):
            self.registry.put_blob(blob)
