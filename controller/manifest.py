"""The signed description of one release, and its strict JSON form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal

FORMAT_VERSION = 1
"""Raised whenever a field is added, removed or changes its meaning."""

KINDS = ("never", "fixed", "threshold", "mlp")
"""Kinds of exit policy a release can carry."""

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Safetensors dtype and shape of each tensor, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Which requests the release may serve.

    Attributes:
        percent: Share of requests, in [0, 100].
        salt: Mixed into the hash of the request id, so releases pick different requests.
    """

    percent: float = 100
    salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a release but its weights.

    Attributes:
        format_version: Version of this list of fields.
        channel: The channel it was signed for; "" for a draft not yet released.
        epoch: Incarnation of the channel; 0 for a draft.
        generation: Number of the release, from 1 on; 0 for a draft.
        kind: One of KINDS.
        exits: Numbers of executed layers after which the policy is asked, ascending.
        threshold: What the column or the logit is compared with; None if nothing is.
        column: The feature a threshold policy compares; None for other kinds.
        schema: Digest of the feature schema read; None if none is.
        model: Fingerprint of the model it was trained for, hex.
        tokenizer: Fingerprint of that model's tokenizer, hex.
        digest: SHA-256 of the blob, hex.
        size: Length of the blob, bytes.
        shapes: Dtype and shape of each tensor in the blob.
        training: Where the policy comes from.
        metrics: What was measured on held-out data.
        certificate: The calibration's guarantee, or None if there is none.
        rollout: Which requests it may serve. Workers refuse anything below 100 % for now.
        guardrails: Bounds at which a worker trips to full depth. Workers refuse any for now.
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
    threshold: float | None
    column: str | None
    schema: str | None
    model: str
    tokenizer: str
    digest: str
    size: int
    shapes: Shapes
    training: dict[str, Any]
    metrics: dict[str, Any]
    certificate: dict[str, Any] | None = None
    rollout: Rollout = field(default_factory=Rollout)
    guardrails: dict[str, Any] = field(default_factory=dict)
    created_at: float
    expires_at: float | None = None
    rollback_of: int | None = None

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, no NaN; the same manifest, the same bytes.

        Raises:
            ConfigError: a free-form field holds what JSON cannot say.
        """
        # Only the top level is taken apart: asdict would also copy the free-form fields.
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["rollout"] = {"percent": self.rollout.percent, "salt": self.rollout.salt}
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
        values = parse_strictly(raw, _FIELDS)
        if values["format_version"] != FORMAT_VERSION:
            _refuse(f"format_version {values['format_version']} is not {FORMAT_VERSION}")
        values["exits"] = tuple(values["exits"])
        values["shapes"] = {k: (v[0], tuple(v[1])) for k, v in values["shapes"].items()}
        values["rollout"] = Rollout(**values["rollout"])
        return cls(**values)


Check = tuple[Callable[[Any], bool], str]
"""A predicate on a JSON value, and what it expects in words."""


def canonical_json(values: dict[str, Any]) -> bytes:
    """JSON with sorted keys and no spaces, ASCII.

    Raises:
        TypeError: a value has no JSON form.
        ValueError: a value is NaN or infinite.
    """
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_strictly(raw: bytes, checks: dict[str, Check]) -> dict[str, Any]:
    """Parse a JSON object whose fields are exactly those named.

    Raises:
        PolicyRefusedError: BAD_FORMAT, naming the field unknown, missing, doubled or ill-typed.
    """
    try:
        values = json.loads(raw, object_pairs_hook=_no_doubles, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PolicyRefusedError(Refusal.BAD_FORMAT, f"not JSON: {error}") from error
    if not isinstance(values, dict):
        _refuse(f"a JSON object is expected, not {type(values).__name__}")
    for name in values:
        if name not in checks:
            _refuse(f"unknown field {name!r}")
    for name, (holds, expected) in checks.items():
        if name not in values:
            _refuse(f"field {name!r} is missing")
        if not holds(values[name]):
            _refuse(f"field {name!r} must be {expected}")
    return dict(values)


def _refuse(detail: str) -> NoReturn:
    raise PolicyRefusedError(Refusal.BAD_FORMAT, detail)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError(f"a field occurs twice among {sorted(name for name, _ in pairs)}")
    return values


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def is_count(value: Any) -> bool:
    """An integer from 0 on that a double can hold exactly (Lua's numbers are doubles)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_number(value: Any) -> bool:
    """A finite number, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_digest(value: Any) -> bool:
    """A SHA-256 in lower-case hex."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]+", value) is not None


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_exits(value: Any) -> bool:
    if not isinstance(value, list) or not all(is_count(layer) for layer in value):
        return False
    return value == sorted(set(value)) and 0 not in value


def _is_shape(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return is_text(value[0]) and isinstance(value[1], list) and all(map(is_count, value[1]))


def _is_shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_shape, value.values()))


def _is_rollout(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"percent", "salt"}:
        return False
    return is_number(value["percent"]) and 0 <= value["percent"] <= 100 and is_text(value["salt"])


def _or_null(check: Check) -> Check:
    holds, expected = check
    return (lambda value: value is None or holds(value)), f"{expected} or null"


COUNT: Check = (is_count, "an integer from 0 on")
NUMBER: Check = (is_number, "a finite number")
TEXT: Check = (is_text, "a string")
DIGEST: Check = (is_digest, "64 lower-case hex digits")
_FINGERPRINT: Check = (_is_fingerprint, "lower-case hex digits")
_OBJECT: Check = (_is_object, "an object")

_FIELDS: dict[str, Check] = {
    "format_version": COUNT,
    "channel": TEXT,
    "epoch": COUNT,
    "generation": COUNT,
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "exits": (_is_exits, "a list of layers from 1 on, ascending"),
    "threshold": _or_null(NUMBER),
    "column": _or_null(TEXT),
    "schema": _or_null(DIGEST),
    "model": _FINGERPRINT,
    "tokenizer": _FINGERPRINT,
    "digest": DIGEST,
    "size": COUNT,
    "shapes": (_is_shapes, "an object of [dtype, [lengths]]"),
    "training": _OBJECT,
    "metrics": _OBJECT,
    "certificate": _or_null(_OBJECT),
    "rollout": (_is_rollout, "{percent: 0 to 100, salt: a string}"),
    "guardrails": _OBJECT,
    "created_at": NUMBER,
    "expires_at": _or_null(NUMBER),
    "rollback_of": _or_null(COUNT),
}
