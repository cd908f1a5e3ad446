"""The signed description of one release, and its strict JSON form."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from offramp.controller.errors import ConfigError
from offramp.controller.policies.codec import Shapes
from offramp.controller.policies.exits import ascend, exit_from_json, exit_to_json
from offramp.controller.policies.kinds import KINDS
from offramp.controller.release.certificate import Certificate
from offramp.controller.strict import (
    COUNT,
    DIGEST,
    FINGERPRINT,
    NUMBER,
    OBJECT,
    TEXT,
    Check,
    canonical_json,
    check_fields,
    is_count,
    is_digest,
    is_number,
    is_text,
    or_null,
    parse_strictly,
    refuse,
)
from offramp.controller.watching.guardrails import GUARDRAILS, Guardrails

FORMAT_VERSION = 2
"""Raised whenever a field is added, removed or changes its meaning."""

MODEL_LAYERS = "model_layers"
"""Among the metrics: layers of the model, by which costs are told where the model is not."""

Guarantee = Literal["full depth", "certified", "uncertified"]
"""Whether a release's loss is bounded: trivially, by its certificate, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Which requests the release may serve.

    Attributes:
        percent: Share of requests, in [0, 100]. Below 100 the release is a canary.
        salt: Mixed into the hash of the request id, so releases pick different requests.
        stable_generation: The release that serves all other requests, beside a canary; else 0.
        stable_digest: SHA-256 of that release's blob, hex; "" if there is none.
    """

    percent: float = 100
    salt: str = ""
    stable_generation: int = 0
    stable_digest: str = ""

    @property
    def is_canary(self) -> bool:
        """Whether it leaves requests to another release."""
        return self.percent < 100

    @property
    def is_shadow(self) -> bool:
        """Whether it serves nobody: what runs under it repeats requests of others, unseen."""
        return self.percent == 0

    def picks(self, request_id: str) -> bool:
        """Whether it may serve a request. What it picks at some percent it picks at more, too."""
        hashed = hashlib.sha256(f"{self.salt}\0{request_id}".encode()).digest()
        return int.from_bytes(hashed[:8], "big") < self.percent / 100 * 2**64

    def to_values(self) -> dict[str, Any]:
        """Plain values, as JSON says them; those of a release for everybody name no other."""
        values: dict[str, Any] = {"percent": self.percent, "salt": self.salt}
        if self.stable_generation:
            values["stable_generation"] = self.stable_generation
            values["stable_digest"] = self.stable_digest
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a release but its weights.

    Attributes:
        format_version: Version of this list of fields.
        channel: The channel it was signed for; "" for a draft not yet released.
        epoch: Incarnation of the channel; 0 for a draft.
        generation: Number of the release, from 1 on; 0 for a draft.
        kind: One of ``controller.policies.kinds.KINDS``.
        exits: Numbers of executed layers after which the policy is asked, ascending; those on a
            copy of the layers in fewer bytes first, in JSON as "12:int4".
        params: What the kind needs besides tensors; its fields are the kind's.
        schema: Digest of the feature schema read; None if none is.
        model: Fingerprint of the model it was trained for, hex.
        tokenizer: Fingerprint of that model's tokenizer, hex.
        digest: SHA-256 of the blob, hex.
        size: Length of the blob, bytes.
        shapes: Dtype and shape of each tensor in the blob.
        training: Where the policy comes from.
        metrics: What was measured on held-out data, and ``MODEL_LAYERS``.
        adapters: SHA-256 of the adapters that its exits are read through, hex; "" if it names none.
        adapter_index: SHA-256 of the index that lists their parts, hex; "" in a draft.
        certificate: The calibration's guarantee, of this very blob; None if there is none.
        rollout: Requests that it may serve, and which release serves the others.
        guardrails: Bounds at which a worker trips to full depth, by name; see ``bounds``.
        created_at: When it was signed, unix seconds.
        expires_at: From when on it is refused, unix seconds; None: never.
        rollback_of: The generation this one replaces because it failed; None otherwise.
    """

    format_version: int = FORMAT_VERSION
    channel: str = ""
    epoch: int = 0
    generation: int = 0
    kind: str
    exits: tuple[int, ...]
    params: dict[str, Any]
    schema: str | None
    model: str
    tokenizer: str
    digest: str
    size: int
    shapes: Shapes
    training: dict[str, Any]
    metrics: dict[str, Any]
    adapters: str = ""
    adapter_index: str = ""
    certificate: Certificate | None = None
    rollout: Rollout = field(default_factory=Rollout)
    guardrails: dict[str, Any] = field(default_factory=dict)
    created_at: float
    expires_at: float | None = None
    rollback_of: int | None = None

    @property
    def served(self) -> tuple[str, str]:
        """What requests run under: the policy and what it is read through, both by digest."""
        return self.digest, self.adapters

    @property
    def guarantee(self) -> Guarantee:
        """What stands behind it; a policy that never exits needs no certificate."""
        if self.kind == "never":
            return "full depth"
        return "uncertified" if self.certificate is None else "certified"

    @property
    def bounds(self) -> Guardrails:
        """The guardrails, with those that were not named as certificate or default have them."""
        certificate = self.certificate
        if certificate is None or certificate.loss != "disagreement":
            return Guardrails(**self.guardrails)
        return replace(Guardrails.certified(certificate.delta), **self.guardrails)

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, no NaN; the same manifest, the same bytes.

        Raises:
            ConfigError: a free-form field holds what JSON cannot say.
        """
        # Only the top level is taken apart: asdict would also copy the free-form fields.
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["exits"] = list(map(exit_to_json, self.exits))
        values["rollout"] = self.rollout.to_values()
        for name in _OPTIONAL:
            if not values[name]:
                del values[name]
        values["certificate"] = self.certificate and self.certificate.to_values()
        try:
            return canonical_json(values)
        except (TypeError, ValueError) as error:
            remedy = "Give finite numbers, strings, lists and dicts"
            raise ConfigError("manifest", str(error), remedy) from error

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Parse strictly.

        Raises:
            PolicyRefusedError: BAD_FORMAT, naming the field unknown, missing or ill-typed.
        """
        values = parse_strictly(raw, _FIELDS, _OPTIONAL)
        if values["format_version"] != FORMAT_VERSION:
            refuse(f"format_version {values['format_version']} is not {FORMAT_VERSION}")
        check_fields(values["params"], KINDS[values["kind"]].params, "params.")
        values["exits"] = tuple(map(exit_from_json, values["exits"]))
        values["shapes"] = {k: (v[0], tuple(v[1])) for k, v in values["shapes"].items()}
        values["rollout"] = Rollout(**values["rollout"])
        if values["certificate"] is not None:
            values["certificate"] = Certificate.from_values(values["certificate"])
            _require_own(values)
        if "adapter_index" in values and "adapters" not in values:
            refuse("an index of adapters is named, and no adapters")
        return cls(**values)


def require_said(manifest: Manifest, uncertified: bool) -> None:
    """Refuse to release an uncertified policy without saying so, and to say so of any other.

    Raises:
        ConfigError: the policy may exit and has no certificate, or was wrongly said to have none.
    """
    if uncertified == (manifest.guarantee == "uncertified"):
        return
    if uncertified:
        problem = f"was said of a policy that is {manifest.guarantee}"
        raise ConfigError("uncertified", problem, "Leave it out")
    raise ConfigError(
        "certificate",
        "the policy has none",
        "Calibrate it (offramp calibrate) or say that it is uncertified (--uncertified)",
    )


def _require_own(values: dict[str, Any]) -> None:
    """A certificate of another policy, model or tokenizer says nothing of this one."""
    certificate = values["certificate"]
    pairs = [("policy", "digest"), ("model", "model"), ("tokenizer", "tokenizer")]
    pairs += [("translators", "adapters")] * ("adapters" in values)
    for theirs, ours in pairs:
        found = getattr(certificate, theirs)
        if found != values[ours]:
            refuse(f"the certificate is of {theirs} {found}, the manifest of {values[ours]}")


def _is_exits(value: Any) -> bool:
    try:
        return isinstance(value, list) and ascend(list(map(exit_from_json, value)))
    except ValueError:
        return False


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return is_text(value[0]) and isinstance(value[1], list) and all(map(is_count, value[1]))


def _is_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_shape, value.values()))


_CANARY_FIELDS = {"percent", "salt", "stable_generation", "stable_digest"}


def _is_rollout(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() not in ({"percent", "salt"}, _CANARY_FIELDS):
        return False
    if not is_number(value["percent"]) or not is_text(value["salt"]):
        return False
    if len(value) == 2:
        return bool(0 <= value["percent"] <= 100)
    names_stable = is_count(value["stable_generation"]) and is_digest(value["stable_digest"])
    return names_stable and value["stable_generation"] > 0 and bool(0 <= value["percent"] < 100)


def _are_guardrails(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= GUARDRAILS.keys():
        return False
    return all(GUARDRAILS[name][0](bound) for name, bound in value.items())


_OPTIONAL = ("adapters", "adapter_index")
"""Fields that are left out if they are empty: so releases without adapters are what they were, and
a worker too old for adapters refuses a release that names some."""

_FIELDS: dict[str, Check] = {
    "format_version": COUNT,
    "channel": TEXT,
    "epoch": COUNT,
    "generation": COUNT,
    "kind": (lambda value: is_text(value) and value in KINDS, f"one of {', '.join(KINDS)}"),
    "exits": (_is_exits, "a list of layers from 1 on, ascending, those on a copy first"),
    "params": OBJECT,
    "schema": or_null(DIGEST),
    "model": FINGERPRINT,
    "tokenizer": FINGERPRINT,
    "digest": DIGEST,
    "size": COUNT,
    "shapes": (_is_shapes, "an object of [dtype, [lengths]]"),
    "training": OBJECT,
    "metrics": OBJECT,
    "adapters": DIGEST,
    "adapter_index": DIGEST,
    "certificate": or_null(OBJECT),
    "rollout": (_is_rollout, "{percent: 0 to 100, salt: a string}, a canary's with its stable's"),
    "guardrails": (_are_guardrails, f"an object of bounds among {', '.join(GUARDRAILS)}"),
    "created_at": NUMBER,
    "expires_at": or_null(NUMBER),
    "rollback_of": or_null(COUNT),
}
