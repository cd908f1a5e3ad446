"""The ledger as its publisher reads it: every record's signature is checked."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterable, Iterator

from offramp.controller.adapters.adapter_index import AdapterIndex
from offramp.controller.errors import ConfigError, OfframpError, PolicyRefusedError, Refusal
from offramp.controller.keys.envelopes import SignedEnvelope
from offramp.controller.keys.root import Root
from offramp.controller.release.heads import open_head, open_release
from offramp.controller.release.ledger import Ledger
from offramp.controller.release.manifest import Manifest, Rollout
from offramp.controller.release.registry import Head, PolicyRegistry

FORGED = (
    "Somebody else wrote the head of channel %s (%s). The ledger's generation %d takes its place; "
    "look at who may write to the registry."
)
"""What is said of a head that was not signed here: channel, why, generation."""

KEPT = 8
"""Promotions whose blobs stay in the registry, for workers that are late, and with them those of
releases that wait for theirs."""

_logger = logging.getLogger(__name__)


class SignedRecords:
    """Releases of one channel.

    Args:
        ledger: Where they are recorded.
        trusted: The root that lists the channel's releasers.
        channel: The channel they must be signed for.

    Attributes:
        channel: The same.
    """

    def __init__(self, ledger: Ledger, trusted: Root, channel: str) -> None:
        self._ledger = ledger
        self._trusted = trusted
        self.channel = channel

    def manifest(self, generation: int) -> Manifest:
        """Read a recorded release.

        Raises:
            ConfigError: it is not recorded.
            PolicyRefusedError: no trusted key signed it for this channel.
        """
        return open_release(self._ledger.get(generation), self._trusted, self.channel)

    def signed(self, generation: int) -> Manifest:
        """Read a recorded release that is to be served: enough must have signed it.

        Raises:
            ConfigError: it is not recorded, or waits for signatures.
            PolicyRefusedError: no trusted key signed it for this channel.
        """
        try:
            return self.manifest(generation)
        except PolicyRefusedError as error:
            if error.reason is not Refusal.BELOW_THRESHOLD:
                raise
            path = self._ledger.release_path(generation)
            remedy = f"Run offramp keys sign {path} --key KEY, then offramp promote {generation}"
            problem = f"generation {generation} has {error.detail}"
            raise ConfigError("signatures", problem, remedy) from error

    def trusted(self, generations: Iterable[int]) -> list[Manifest]:
        """Those of some releases whose signatures count by the root that is in force now."""
        found = []
        for each in generations:
            with contextlib.suppress(PolicyRefusedError):
                found.append(self.manifest(each))
        return found

    def check(self, head: Head) -> None:
        """Refuse a head that was not signed for this channel, or says more than was signed.

        Raises:
            PolicyRefusedError: see ``open_head``.
        """
        open_head(head, self._trusted, self.channel)

    def head(self, generation: int) -> Head:
        """A recorded release as the head of the channel, a canary with its stable release."""
        release = self.manifest(generation)
        beside = release.rollout.stable_generation
        return Head(
            generation,
            release.epoch,
            self._ledger.get(generation),
            release.digest,
            self._ledger.get(beside) if beside else b"",
        )

    def blobs(self, generation: int) -> Iterator[bytes]:
        """What a worker needs to run a release, read one at a time: its blobs, and its stable's.

        Raises:
            ConfigError: one is not recorded, or damaged.
        """
        return map(self._ledger.blob, self.digests(generation))

    def digests(self, generation: int) -> Iterator[str]:
        """The digests of these blobs, a list of parts after the parts.

        Raises:
            ConfigError: such a list is not recorded, or damaged.
        """
        release = self.manifest(generation)
        yield release.digest
        if release.adapter_index:
            raw = self._ledger.blob(release.adapter_index)
            yield from AdapterIndex.from_bytes(raw).parts
            yield release.adapter_index
        if release.rollout.stable_generation:
            yield from self.digests(release.rollout.stable_generation)

    def stable(self) -> Manifest:
        """The release that serves all requests, or all that a canary does not.

        Raises:
            ConfigError: nothing was promoted yet.
        """
        promoted = self._ledger.promoted()
        if not promoted:
            raise ConfigError(
                "percent",
                "no release serves the other requests: none was promoted yet",
                "Promote one to everybody first, such as a policy that never exits",
            )
        release = self.manifest(promoted)
        return self.manifest(release.rollout.stable_generation or promoted)

    def last_good(self, failed: Collection[int]) -> int:
        """The release for everybody that was promoted last, and whose policy never failed.

        Args:
            failed: Generations whose policies failed now.

        Raises:
            ConfigError: there is none.
        """
        served = self.trusted(self._ledger.promotions())
        culprits = {*failed} | {each.rollback_of for each in served}
        bad = {each.served for each in served if each.generation in culprits}
        good = [each for each in served if each.served not in bad and not each.rollout.is_canary]
        if not good:
            raise ConfigError("rollback", f"no good release is older than {max(failed)}")
        return good[-1].generation

    def ready(self, failed: Collection[int]) -> int | None:
        """A rollback of what is served now that was signed beforehand; None if there is none.

        Args:
            failed: Generations whose policies failed: none of these is returned to.
        """
        promoted = self._ledger.promoted()
        bad = {each.served for each in self.trusted({promoted, *failed})}
        newer = [each for each in self._ledger.generations() if each > promoted]
        fit = [
            each.generation
            for each in self.trusted(newer)
            if each.rollback_of == promoted and each.served not in bad
        ]
        return fit[-1] if fit else None


def canary_beside(stable: Manifest, candidate: Manifest, percent: float) -> Rollout:
    """The rollout of a policy's step beside a stable release; at 100 it serves everybody.

    Raises:
        ConfigError: both are the same policy, read through the same adapters.
    """
    if candidate.served == stable.served:
        problem = (
            f"{candidate.generation} is of the policy that serves everybody ({stable.generation})"
        )
        raise ConfigError("generation", problem, "Publish another one first")
    rollout = Rollout(
        percent=percent,
        salt=candidate.digest[:16],  # so that each step keeps the requests of the last
        stable_generation=stable.generation,
        stable_digest=stable.digest,
    )
    return rollout if rollout.is_canary else Rollout()


class ServedHead:
    """What the registry serves, as far as it was signed here.

    Args:
        registry: Where workers look.
        ledger: Where promotions are recorded.
        records: The same ledger, with signatures checked.
    """

    def __init__(self, registry: PolicyRegistry, ledger: Ledger, records: SignedRecords) -> None:
        self._registry = registry
        self._ledger = ledger
        self._records = records

    @property
    def generation(self) -> int:
        """The head's; 0 if there is none."""
        head = self._read()
        return head.generation if head else 0

    def catch_up(self) -> None:
        """Record a promotion that reached the registry, though its answer never came back."""
        head = self._read()
        if head is None or head.generation <= self._ledger.promoted():
            return
        mine = head.generation in self._ledger.generations()
        if mine and self._ledger.get(head.generation) == head.envelope:
            self._ledger.record_promotion(head.generation)

    def forget_old_blobs(self) -> None:
        """Delete from the registry what no recent release needs; the ledger keeps it.

        It is tidying up: what stands in its way is logged, and no more.
        """
        promoted = self._ledger.promotions()
        newer = [each for each in self._ledger.generations() if each > promoted[-1]]
        try:
            needed = self._records.trusted([*promoted[-KEPT:], *newer])
            kept = {d for each in needed for d in self._records.digests(each.generation)}
            self._registry.forget_blobs(kept)
        except OfframpError as error:
            _logger.warning("Old blobs stay in the registry: %s", error)

    def _read(self) -> Head | None:
        """The registry's head; the ledger's is put in place of one that was not signed here."""
        head = None
        try:
            head = self._registry.head()
            if head is not None:
                self._records.check(head)
            return head
        except PolicyRefusedError as error:
            promoted = self._ledger.promoted()
            is_trusted = bool(promoted and self._records.trusted([promoted]))
            if head is not None and promoted and not is_trusted and self._is_recorded(head):
                return head  # no forgery: the root lets its keys sign no more
            _logger.warning(FORGED, self._records.channel, error, promoted)
        self._registry.discard_head()
        if not is_trusted:
            return None
        head = self._records.head(promoted)
        for blob in self._records.blobs(promoted):
            self._registry.put_blob(blob)
        self._registry.promote(head, 0)
        return head

    def _is_recorded(self, head: Head) -> bool:
        """Whether it says what the ledger has as promoted last, whoever signed that."""
        if head.generation != self._ledger.promoted():
            return False
        raw = self._ledger.get(head.generation)
        said = Manifest.from_bytes(SignedEnvelope.from_bytes(raw).payload)
        return (raw, said.epoch, said.digest) == (head.envelope, head.epoch, head.digest)
