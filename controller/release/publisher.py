"""Signs releases, writes them to the ledger, and moves the head of a channel."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from offramp.controller.errors import ConfigError, PolicyRefusedError, RegistryUnavailableError
from offramp.controller.policies.kinds import PackedPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.ledger import Ledger
from offramp.controller.release.manifest import Manifest, Rollout, require_said
from offramp.controller.release.registry import Head, PolicyRegistry
from offramp.controller.release.signing import STAMP_MAGIC, SigningKey, trusted_keys
from offramp.controller.release.trust import ReleaseVerifier, Stamp, open_head, open_release

STAMP_TTL_S = 24 * 3600.0
"""How long a timestamp vouches for the head unless it is renewed; a publisher that runs on should
say less than this, which is for one-shot commands."""

FORGED = (
    "Somebody else wrote the head of channel %s (%s). The ledger's generation %d takes its place; "
    "look at who may write to the registry."
)
"""What is said of a head that was not signed here: channel, why, generation."""

_logger = logging.getLogger(__name__)


class Publisher:
    """The writer of a channel: one at a time, whatever the processes that share its ledger.

    A head that this key never signed is no head: the ledger's takes its place, and a warning is
    logged.

    Args:
        registry: Where workers look.
        ledger: The truth about what was released.
        key: Signs releases and timestamps.
        channel: The channel written to.
        clock: Unix seconds.
        epoch: Incarnation of the channel. Raise it when the channel is begun anew on an empty
            registry: a publisher left over from before can then no longer promote.
        stamp_ttl_s: Seconds that a timestamp vouches for the head.
        trusted: Keys whose releases are this channel's, by key id; the own one alone by default.
    """

    def __init__(
        self,
        registry: PolicyRegistry,
        ledger: Ledger,
        key: SigningKey,
        channel: str,
        clock: Callable[[], float] = time.time,
        *,
        epoch: int = 1,
        stamp_ttl_s: float = STAMP_TTL_S,
        trusted: Mapping[str, bytes] | None = None,
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._key = key
        self._trusted = trusted_keys(key.public_bytes) if trusted is None else dict(trusted)
        self._channel = channel
        self._clock = clock
        self._epoch = epoch
        self._stamp_ttl_s = stamp_ttl_s

    @property
    def promoted(self) -> int:
        """The generation promoted last, by the ledger; 0 if none was."""
        return self._ledger.promoted()

    def release(
        self,
        packed: PackedPolicy,
        *,
        model: str,
        tokenizer: str,
        training: Mapping[str, Any],
        metrics: Mapping[str, Any],
        certificate: Certificate | None = None,
        uncertified: bool = False,
        expires_in_s: float | None = None,
        rollout: Rollout | None = None,
        guardrails: Mapping[str, Any] | None = None,
    ) -> Head:
        """Sign a policy as the next generation, record it and upload it. It is not served yet.

        Args:
            packed: The policy.
            model: Fingerprint of the model it was trained for, hex.
            tokenizer: Fingerprint of that model's tokenizer, hex.
            training: Where the policy comes from.
            metrics: What was measured on held-out data.
            certificate: The calibration's guarantee, if there is one.
            uncertified: Said of a policy that may exit without a certificate; goes into metrics.
            expires_in_s: Seconds after which workers refuse it; None: never.
            rollout: Requests that it may serve. Workers take nothing but all of them yet.
            guardrails: Bounds at which a worker trips to full depth, in place of the defaults.

        Raises:
            PolicyRefusedError: a worker's own check would refuse it; nothing was signed.
            ConfigError: the ledger is behind the registry, the manifest is unusable, or
                ``uncertified`` is not what the policy is.
            RegistryUnavailableError: the registry cannot be reached.
        """
        if uncertified:
            metrics = {**metrics, "uncertified": True}
        bundle = PolicyBundle.draft(
            packed,
            model=model,
            tokenizer=tokenizer,
            training=training,
            metrics=metrics,
            certificate=certificate,
            created_at=(now := self._clock()),
        )
        require_said(bundle.manifest, uncertified)
        manifest = replace(
            bundle.manifest,
            expires_at=None if expires_in_s is None else now + expires_in_s,
            rollout=rollout or Rollout(),
            guardrails=dict(guardrails or {}),
        )
        return self._append(manifest, packed.blob)

    def promote(self, generation: int) -> None:
        """Make a recorded release the head, uploading its blob again if the registry lost it.

        Promoting what is served already uploads it again, too, and renews its timestamp.

        Raises:
            ConfigError: the generation is not in the ledger, or older than one promoted before.
            PolicyRefusedError: a worker's own check would refuse it, for instance as expired.
            PromoteConflictError: the head moved meanwhile, or is not below this generation.
            RegistryUnavailableError: the registry fails; it says so if this is served all the same.
        """
        with self._ledger.writing():
            self._promote(generation)

    def _promote(self, generation: int) -> None:
        self._catch_up()
        release = self._recorded(generation)
        blob = self._ledger.blob(release.digest)
        if generation == self._ledger.promoted() == self._served:
            self._registry.put_blob(blob)
            self.heartbeat()
            return
        if generation < self._ledger.promoted():
            problem = f"{generation} is older than {self._ledger.promoted()}, promoted before"
            raise ConfigError("generation", problem, "Roll back instead: workers never go back")
        self._require_servable(release, blob)
        self._registry.put_blob(blob)
        # A worker woken by the promotion must find a living timestamp: renew the old one first.
        self.heartbeat()
        self._registry.promote(self._recorded_head(generation), self._served)
        self._ledger.record_promotion(generation)
        try:
            self.heartbeat()
        except RegistryUnavailableError as error:
            problem = (
                f"generation {generation} is served, its timestamp not renewed: {error.problem}"
            )
            remedy = f"{error.remedy}, then promote it again"
            raise RegistryUnavailableError(error.field, problem, remedy) from error

    def rollback(self, to: int | None = None) -> Head:
        """Serve an older policy again, as a new and higher generation, at once and to everybody.

        Args:
            to: The generation whose policy to serve; None: the last one promoted whose policy is
                neither served now nor was rolled back before.

        Raises:
            ConfigError: nothing was promoted yet, or there is no such older release.
            PromoteConflictError: the head moved meanwhile.
            RegistryUnavailableError: the registry cannot be reached.
        """
        with self._ledger.writing():
            return self._roll_back(to)

    def _roll_back(self, to: int | None) -> Head:
        self._catch_up()
        failed = self._ledger.promoted()
        if not failed:
            raise ConfigError("rollback", "nothing was promoted yet")
        target = self._recorded(self._last_good(failed) if to is None else to)
        if target.generation >= failed:
            raise ConfigError("to", f"generation {target.generation} is not older than {failed}")
        now, expires_at = self._clock(), target.expires_at
        manifest = replace(
            target,
            created_at=now,
            expires_at=None if expires_at is None else now + expires_at - target.created_at,
            rollout=Rollout(percent=100, salt=target.rollout.salt),
            rollback_of=failed,
        )
        release = self._append(manifest, self._ledger.blob(target.digest))
        self.promote(release.generation)
        return release

    def heartbeat(self) -> None:
        """Renew the signed timestamp of what was promoted last, by the ledger and not the registry.

        Raises:
            RegistryUnavailableError: the registry cannot be reached.
        """
        now = self._clock()
        stamp = Stamp(
            channel=self._channel,
            epoch=self._epoch,
            generation=self._ledger.promoted(),
            issued_at=now,
            expires_at=now + self._stamp_ttl_s,
        )
        self._registry.stamp(self._key.sign(stamp.to_bytes(), STAMP_MAGIC), self._stamp_ttl_s)

    def _append(self, manifest: Manifest, blob: bytes) -> Head:
        with self._ledger.writing():
            generation = max(self._ledger.last(), self._served) + 1
            manifest = replace(
                manifest, channel=self._channel, epoch=self._epoch, generation=generation
            )
            payload = manifest.to_bytes()
            self._require_servable(Manifest.from_bytes(payload), blob)
            envelope = self._key.sign(payload)
            self._ledger.append(generation, envelope, blob)
        self._registry.put_blob(blob)
        return Head(generation, self._epoch, envelope, manifest.digest)

    def _require_servable(self, manifest: Manifest, blob: bytes) -> None:
        """Ask the worker's own verifier, as the model's worker would, so that both agree forever.

        Raises:
            PolicyRefusedError: a worker would refuse the release.
        """
        verifier = ReleaseVerifier(
            self._trusted, self._channel, manifest.model, manifest.tokenizer, self._clock
        )
        verifier.check(manifest)
        verifier.open(manifest, blob)

    def _catch_up(self) -> None:
        """Record a promotion that reached the registry, though its answer never came back."""
        head = self._head()
        if head is None or head.generation <= self._ledger.promoted():
            return
        mine = head.generation in self._ledger.generations()
        if mine and self._ledger.get(head.generation) == head.envelope:
            self._ledger.record_promotion(head.generation)

    @property
    def _served(self) -> int:
        head = self._head()
        return head.generation if head else 0

    def _head(self) -> Head | None:
        """The registry's head; the ledger's is put in place of one that was not signed here."""
        try:
            head = self._registry.head()
            if head is not None:
                open_head(head, self._trusted, self._channel)
            return head
        except PolicyRefusedError as error:
            promoted = self._ledger.promoted()
            _logger.warning(FORGED, self._channel, error, promoted)
        self._registry.discard_head()
        if not promoted:
            return None
        head = self._recorded_head(promoted)
        self._registry.put_blob(self._ledger.blob(head.digest))
        self._registry.promote(head, 0)
        return head

    def _recorded(self, generation: int) -> Manifest:
        return open_release(self._ledger.get(generation), self._trusted, self._channel)

    def _recorded_head(self, generation: int) -> Head:
        release = self._recorded(generation)
        return Head(generation, release.epoch, self._ledger.get(generation), release.digest)

    def _last_good(self, failed: int) -> int:
        served = [self._recorded(each) for each in self._ledger.promotions()]
        culprits = {failed} | {each.rollback_of for each in served}
        bad = {each.digest for each in served if each.generation in culprits}
        good = [each.generation for each in served if each.digest not in bad]
        if not good:
            raise ConfigError("rollback", f"no good release is older than {failed}")
        return good[-1]
