"""What a worker checks before it believes a release. Pure: no file, no network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from offramp.controller.errors import PolicyRefusedError, Refusal
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.keys.envelopes import STAMP_MAGIC
from offramp.controller.keys.root import Root, open_envelope
from offramp.controller.policies.kinds import digest_of
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.weights import unpack_policy
from offramp.controller.release.heads import open_head, open_release, open_stable
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.registry import Head
from offramp.controller.strict import (
    COUNT,
    DIGEST,
    NUMBER,
    TEXT,
    Check,
    canonical_json,
    parse_strictly,
)

_STAMP_FIELDS: dict[str, Check] = {
    "channel": TEXT,
    "epoch": COUNT,
    "generation": COUNT,
    "issued_at": NUMBER,
    "expires_at": NUMBER,
    "root": COUNT,
}
_MARK_FIELDS: dict[str, Check] = {
    "epoch": COUNT,
    "generation": COUNT,
    "digest": DIGEST,
    "manifest": DIGEST,
}


@dataclass(frozen=True, slots=True, order=True)
class Mark:
    """The highest release a worker has accepted: nothing below it is accepted again.

    Attributes:
        epoch: Incarnation of the channel; every generation of a later one is higher.
        generation: Number of the release.
        digest: SHA-256 of its blob, hex.
        manifest: SHA-256 of all that was signed of it, hex: its adapters, share of the requests and
            guardrails, too. "" in a mark of a worker that did not note it yet.
    """

    epoch: int
    generation: int
    digest: str
    manifest: str = ""

    @classmethod
    def of(cls, manifest: Manifest) -> Mark:
        """The mark that an accepted release leaves."""
        signed = digest_of(manifest.to_bytes())
        return cls(manifest.epoch, manifest.generation, manifest.digest, signed)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        noted = {name: getattr(self, name) for name in _MARK_FIELDS}
        if not self.manifest:
            del noted["manifest"]
        return canonical_json(noted)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Mark:
        """Parse strictly.

        Raises:
            PolicyRefusedError: BAD_FORMAT.
        """
        return cls(**parse_strictly(raw, _MARK_FIELDS, optional=["manifest"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """The publisher's word on which generation it had promoted at a time.

    Attributes:
        channel: The channel spoken of.
        epoch: The publisher's epoch.
        generation: The generation promoted last; 0 if none was.
        issued_at: Unix seconds.
        expires_at: Unix seconds after which the word says nothing.
        root: Version of the publisher's root; 0, which is left out, for plain public keys.
    """

    channel: str
    epoch: int
    generation: int
    issued_at: float
    expires_at: float
    root: int = 0

    def to_bytes(self) -> bytes:
        """Canonical JSON, to be signed with STAMP_MAGIC."""
        said = {name: getattr(self, name) for name in _STAMP_FIELDS}
        if not self.root:
            del said["root"]  # workers that know no roots yet read it, too
        return canonical_json(said)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Stamp:
        """Parse strictly.

        Raises:
            PolicyRefusedError: BAD_FORMAT.
        """
        return cls(**parse_strictly(raw, _STAMP_FIELDS, optional=["root"]))


class ReleaseVerifier:
    """Decides whether a release is meant for this worker.

    Args:
        trusted: The root that lists the keys whose signatures count.
        channel: The only channel listened to.
        model: Fingerprint of the model loaded, hex.
        tokenizer: Fingerprint of its tokenizer, hex.
        clock: Unix seconds.
        layers: Number of layers of the model; None leaves exits unchecked.
        vocab: Number of its tokens; None leaves candidate tables unchecked.

    Attributes:
        root: The same; whoever follows the channel replaces it by the root that comes next.
    """

    def __init__(
        self,
        trusted: Root,
        channel: str,
        model: str,
        tokenizer: str,
        clock: Callable[[], float] = time.time,
        *,
        layers: int | None = None,
        vocab: int | None = None,
    ) -> None:
        self._layers = layers
        self._vocab = vocab
        self.root = trusted
        self._channel = channel
        self._model = model
        self._tokenizer = tokenizer
        self._clock = clock

    def verify(self, head: Head, mark: Mark | None) -> Manifest:
        """Check a head before its blob is fetched; the signature before anything is parsed.

        Raises:
            PolicyRefusedError: with the first check that failed.
        """
        manifest = open_head(head, self.root, self._channel)
        if (ends_at := self.root.expires_at) is not None and ends_at <= self._clock():
            detail = f"root {self.root.version} expired at {ends_at:.0f}: no newer one was found"
            raise PolicyRefusedError(Refusal.EXPIRED, detail)
        self.check(manifest, mark)
        return manifest

    def verify_stable(self, head: Head, canary: Manifest, mark: Mark | None) -> Manifest:
        """Check the release that a canary, verified before, leaves all other requests to.

        Raises:
            PolicyRefusedError: with the first check that failed.
        """
        manifest = open_stable(head, canary, self.root, self._channel)
        self.check(manifest, mark)
        return manifest

    def verify_stored(self, envelope: bytes, mark: Mark | None) -> Manifest:
        """Check an envelope from the worker's own disk just as strictly.

        Raises:
            PolicyRefusedError: with the first check that failed.
        """
        manifest = self.read(envelope)
        self.check(manifest, mark)
        return manifest

    def read(self, envelope: bytes) -> Manifest:
        """Read a signed manifest, whether or not it is meant for this worker now.

        Raises:
            PolicyRefusedError: no trusted key signed it for this channel.
        """
        return open_release(envelope, self.root, self._channel)

    def check(self, manifest: Manifest, mark: Mark | None = None) -> None:
        """Check what a manifest says, signed or not yet; the publisher asks before it signs.

        Args:
            manifest: Description of the release.
            mark: The highest release accepted before; None if none was.

        Raises:
            PolicyRefusedError: with the first check that failed.
        """
        if manifest.expires_at is not None and manifest.expires_at <= self._clock():
            detail = f"generation {manifest.generation} expired at {manifest.expires_at:.0f}"
            raise PolicyRefusedError(Refusal.EXPIRED, detail)
        if manifest.rollout.is_canary and not manifest.rollout.stable_generation:
            # Serving everybody would break what the publisher signed.
            detail = "rollout: a share of the requests, and no release is named for the others"
            raise PolicyRefusedError(Refusal.UNSUPPORTED, detail)
        if mark is not None:
            _check_mark(manifest, mark)
        if manifest.model != self._model:
            detail = f"made for model {manifest.model}, {self._model} is loaded"
            raise PolicyRefusedError(Refusal.WRONG_MODEL, detail)
        if manifest.tokenizer != self._tokenizer:
            detail = f"made for tokenizer {manifest.tokenizer}, {self._tokenizer} is loaded"
            raise PolicyRefusedError(Refusal.WRONG_TOKENIZER, detail)

    def open(self, manifest: Manifest, blob: bytes) -> Policy:
        """Rebuild the policy of a verified manifest from its blob.

        Raises:
            PolicyRefusedError: see ``unpack_policy``; or the policy does not fit the model.
        """
        policy = unpack_policy(manifest, blob)
        if self._layers is not None and any(layer > self._layers for layer in policy.exits):
            detail = f"exits {policy.exits} of a model with {self._layers} layers"
            raise PolicyRefusedError(Refusal.WRONG_DEPTH, detail)
        table_VK = policy.candidates_VK
        if policy.schema == CANDIDATES_V1 and (
            table_VK is None or self._vocab not in (None, len(table_VK))
        ):
            rows = "no" if table_VK is None else len(table_VK)
            detail = f"{rows} candidate rows, the model has {self._vocab} tokens"
            raise PolicyRefusedError(Refusal.BAD_SHAPE, detail)
        return policy

    def staleness(self, raw: bytes | None, head: Head) -> str:
        """Why the signed timestamp does not vouch for the head; "" if it does.

        Args:
            raw: The timestamp's envelope, or None if there is none.
            head: What the registry serves. A timestamp of an earlier head of its epoch vouches too,
                until it expires: the publisher renews it just after it promotes.
        """
        if raw is None:
            return "the publisher's timestamp is missing"
        try:
            stamp = Stamp.from_bytes(open_envelope(raw, self.root, STAMP_MAGIC))
        except PolicyRefusedError as error:
            return f"the publisher's timestamp is worthless: {error.reason.value}: {error.detail}"
        if stamp.root > self.root.version:
            return f"the publisher goes by root {stamp.root}, this worker by {self.root.version}"
        if stamp.channel != self._channel:
            return f"the publisher's timestamp is for channel {stamp.channel!r}"
        if stamp.expires_at <= self._clock():
            return f"the publisher's timestamp expired at {stamp.expires_at:.0f}"
        if stamp.epoch != head.epoch:
            return f"the publisher is in epoch {stamp.epoch}, the head in epoch {head.epoch}"
        if stamp.generation > head.generation:
            return f"the publisher has promoted {stamp.generation}, the head is {head.generation}"
        return ""


def require_servable(
    manifest: Manifest, blob: bytes, root: Root, clock: Callable[[], float]
) -> None:
    """Ask the verifier of the model's own worker about a release, so that both agree forever.

    Raises:
        PolicyRefusedError: a worker would refuse it.
    """
    tests = ReleaseVerifier(root, manifest.channel, manifest.model, manifest.tokenizer, clock)
    tests.check(manifest)
    tests.open(manifest, blob)


def _check_mark(manifest: Manifest, mark: Mark) -> None:
    if (manifest.epoch, manifest.generation) < (mark.epoch, mark.generation):
        detail = f"generation {manifest.generation} is below the mark {mark.generation}"
        if manifest.epoch < mark.epoch:
            detail = f"epoch {manifest.epoch} is over: epoch {mark.epoch} was accepted"
        raise PolicyRefusedError(Refusal.ROLLBACK, detail)
    if (manifest.epoch, manifest.generation) != (mark.epoch, mark.generation):
        return
    if manifest.digest != mark.digest:
        detail = f"generation {mark.generation} came with digest {mark.digest} before"
        raise PolicyRefusedError(Refusal.EQUIVOCATION, f"{detail}, now with {manifest.digest}")
    found = Mark.of(manifest).manifest
    if mark.manifest not in ("", found):
        detail = f"generation {mark.generation} came with another manifest ({mark.manifest[:12]})"
        raise PolicyRefusedError(Refusal.EQUIVOCATION, f"{detail} before, now with {found[:12]}")
