"""Signs releases, writes them to the ledger, and moves the head of a channel."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from offramp.controller.adapters.adapter_index import AdapterSource, require_model
from offramp.controller.errors import ConfigError
from offramp.controller.keys.envelopes import SigningKey
from offramp.controller.keys.root import Root, trusted_keys
from offramp.controller.keys.signer import Signer
from offramp.controller.policies.kinds import PackedPolicy, pack_policy
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.certified_points import require_range
from offramp.controller.release.ledger import Ledger
from offramp.controller.release.manifest import Manifest, Rollout, require_said
from offramp.controller.release.promoting import ChannelHead
from offramp.controller.release.records import ServedHead, SignedRecords, canary_beside
from offramp.controller.release.registry import Head, PolicyRegistry
from offramp.controller.release.trust import require_servable

STAMP_TTL_S = 24 * 3600.0
"""How long a timestamp vouches for the head unless renewed; who runs on should say less."""


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
        trusted: The root that lists this channel's releasers; the own key alone by default.
        roots: What was signed for it, by version: for workers that hold an older root.

    Attributes:
        signer: Says whether its signature alone suffices for a release.
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
        trusted: Root | None = None,
        roots: Mapping[int, bytes] | None = None,
    ) -> None:
        self._ledger = ledger
        root = trusted or trusted_keys(key.public_bytes)
        self.signer = Signer(key, root)
        self._records = SignedRecords(ledger, root, channel)
        self._served = ServedHead(registry, ledger, self._records)
        self._head = ChannelHead(
            registry=registry,
            ledger=ledger,
            records=self._records,
            served=self._served,
            signer=self.signer,
            roots=dict(roots or {}),
            epoch=epoch,
            stamp_ttl_s=stamp_ttl_s,
            clock=clock,
        )
        self._channel = channel
        self._clock = clock
        self._epoch = epoch

    @property
    def promoted(self) -> int:
        """The generation promoted last, by the ledger; 0 if none was."""
        return self._ledger.promoted()

    @property
    def rollout(self) -> Rollout:
        """Says whom the generation promoted last serves."""
        return self._records.manifest(self._ledger.promoted()).rollout

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
        adapters: AdapterSource | None = None,
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
            rollout: Requests that it may serve; see ``roll_out``, which names the others' release.
            guardrails: Bounds at which a worker trips to full depth, in place of the defaults.
            adapters: What its exits are read through, to travel with it.

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
            adapters="" if adapters is None else adapters.index.digest,
        )
        require_said(bundle.manifest, uncertified)
        manifest = replace(
            bundle.manifest,
            expires_at=None if expires_in_s is None else now + expires_in_s,
            rollout=rollout or Rollout(),
            guardrails=dict(guardrails or {}),
            adapter_index="" if adapters is None else adapters.index.name,
        )
        require_range(manifest, bundle.policy())
        if adapters is not None:
            require_model(adapters.index, model)
        return self._append(manifest, packed.blob, () if adapters is None else adapters.blobs())

    def roll_out(self, percent: float, generation: int | None = None) -> Head:
        """Let a recorded policy serve a share of the requests, as a new generation: a canary.

        The other requests stay under the release for everybody that is served now; where there is
        none yet, one that never exits is released and served first. So each step of a canary is a
        release of its own, and what holds for releases holds for it.

        Args:
            percent: Share of the requests, in [0, 100]. At 0 workers repeat some under the
                policy, in shadow, and serve nobody with it; at 100 it is for everybody.
            generation: A release of that policy; None: the canary, or else the newest recorded.

        Raises:
            ConfigError: the percent, or no newer policy.
            PolicyRefusedError, PromoteConflictError, RegistryUnavailableError: see ``promote``.
        """
        if not 0 <= percent <= 100:
            raise ConfigError("percent", f"{percent} is not in [0, 100]", "Give a share in percent")
        with self._ledger.writing():
            self._served.catch_up()
            promoted, newest = self._ledger.promoted(), self._ledger.last()
            if not promoted:
                self._serve_full_depth(self._records.manifest(generation or newest))
            stable = self._records.stable()
            is_begun = stable.generation != promoted > 0
            chosen = generation or (promoted if is_begun else newest)
            candidate = self._records.manifest(chosen)
            rollout = canary_beside(stable, candidate, percent)
            head = self._release_again(candidate, rollout=rollout, rollback_of=None)
            self._head.move(head.generation)
            return head

    def _serve_full_depth(self, candidate: Manifest) -> None:
        """Release a policy that never exits, for a canary to begin beside."""
        base = self.release(
            pack_policy(NeverExit(), np.zeros((1, 1), np.float32)),
            model=candidate.model,
            tokenizer=candidate.tokenizer,
            training={},
            metrics={},
        )
        self._head.move(base.generation)

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
            self._head.move(generation)

    def rollback(
        self, to: int | None = None, failed: int | None = None, *, serve: bool = True
    ) -> Head:
        """Serve an older policy again, as a new and higher generation, at once and to everybody.

        A canary ends: its stable release's policy is the one to return to.

        Args:
            to: The generation whose policy to serve; None: the last one promoted to everybody
                whose policy is neither served now nor was rolled back before.
            failed: What did harm, if not the head alone: a canary's stable release.
            serve: Whether to serve it; else it is signed and recorded, for ``roll_back_ready``.

        Raises:
            ConfigError: nothing was promoted yet, or there is no such older release.
            PromoteConflictError: the head moved meanwhile.
            RegistryUnavailableError: the registry cannot be reached.
        """
        with self._ledger.writing():
            self._served.catch_up()
            promoted = self._ledger.promoted()
            if not promoted:
                raise ConfigError("rollback", "nothing was promoted yet")
            culprits = {promoted, failed or promoted}
            target = self._records.manifest(to or self._records.last_good(culprits))
            if target.generation >= promoted:
                problem = f"generation {target.generation} is not older than {promoted}"
                raise ConfigError("to", problem)
            rollout = Rollout(salt="" if target.rollout.is_canary else target.rollout.salt)
            release = self._release_again(target, rollout=rollout, rollback_of=promoted)
            if serve:
                self._head.move(release.generation)
            return release

    def roll_back_ready(self, failed: int) -> Manifest | None:
        """Serve the rollback of what is served now that was signed beforehand.

        Nothing is signed: it is for a publisher whose signature alone does not suffice.

        Args:
            failed: The generation that did harm.

        Returns:
            None if none stands ready.

        Raises:
            PromoteConflictError, RegistryUnavailableError: see ``promote``.
        """
        with self._ledger.writing():
            ready = self._records.ready([failed])
            if ready is None:
                return None
            self._head.move(ready)
            return self._records.manifest(ready)

    def _release_again(self, recorded: Manifest, **changes: Any) -> Head:
        """Sign a recorded policy as the next generation, to expire after as long as it did."""
        now, expires_at = self._clock(), recorded.expires_at
        left_s = None if expires_at is None else expires_at - recorded.created_at
        manifest = replace(
            recorded, created_at=now, expires_at=None if left_s is None else now + left_s, **changes
        )
        return self._append(manifest, self._ledger.blob(recorded.digest))

    def heartbeat(self) -> None:
        """Renew the signed timestamp of what was promoted last, by the ledger and not the registry.

        Raises:
            RegistryUnavailableError: the registry cannot be reached.
        """
        self._head.vouch()

    def _append(self, manifest: Manifest, blob: bytes, others: Iterable[bytes] = ()) -> Head:
        with self._ledger.writing():
            generation = max(self._ledger.last(), self._served.generation) + 1
            manifest = replace(
                manifest, channel=self._channel, epoch=self._epoch, generation=generation
            )
            payload = manifest.to_bytes()
            require_servable(Manifest.from_bytes(payload), blob, self.signer.root, self._clock)
            envelope = self.signer.sign(payload)
            self._ledger.append(generation, envelope, blob, others)
        if self.signer.suffices:
            self._head.upload(generation)
        return Head(generation, self._epoch, envelope, manifest.digest)
