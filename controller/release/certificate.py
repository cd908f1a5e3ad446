"""What a calibration guarantees of one policy, on which data, under which conditions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from offramp.controller.errors import ConfigError
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
    is_text,
    list_of,
    or_null,
    parse_strictly,
    refuse,
)

Method = Literal["binomial", "hoeffding-bentkus", "betting", "conformal"]
"""Learn-then-Test with one of three p-values, or conformal risk control."""

Unit = Literal["document", "token"]
"""What is taken to be independent draws."""

DecodeMode = Literal["project", "defer", "replay", "classify"]
"""KV mode the losses were measured under; ``replay``: offline, from traces of an exact cache;
``classify``: whole texts were classified, which leave no cache behind."""

PREFIX = "certificate."
"""Before what is wrong with one, in refusals."""

VERSION = 1
"""Raised whenever a field is added, removed or changes its meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """One setting that was tested.

    Attributes:
        setting: λ that was tested.
        risk: Mean loss on the calibration data, in [0, 1].
        p_value: Belongs to "the risk exceeds delta"; None for conformal risk control.
        passed: Whether it was certified.
        leaves: Shares of the tokens that left at each of the policy's exits, which the others
            passed; () if that was not recorded.
    """

    setting: float
    risk: float
    p_value: float | None
    passed: bool
    leaves: tuple[float, ...] = ()

    def depth(self, exits: Sequence[int], layers: int) -> float | None:
        """Layers executed per token; None if it was not recorded where tokens left.

        Args:
            exits: The policy's exits, in layers.
            layers: Layers of the model, which tokens run that leave at none of them.
        """
        if len(self.leaves) != len(exits):
            return None
        early = sum(share * layer for share, layer in zip(self.leaves, exits, strict=True))
        return early + (1 - sum(self.leaves)) * layers

    def to_values(self) -> dict[str, Any]:
        """Plain values, as JSON says them."""
        values = asdict(self) | {"leaves": list(self.leaves)}
        if not self.leaves:
            del values["leaves"]
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Risk ≤ delta, with probability at least 1 − epsilon over the draw of the calibration data.

    Conformal risk control (epsilon None) says less: *expected* risk ≤ delta, over that draw and
    the next document.

    Attributes:
        version: Version of this list of fields.
        loss: What is bounded, such as "disagreement"; each loss lies in [0, 1].
        risk: Mean loss of the certified setting on the calibration data.
        delta: The bound, in (0, 1).
        epsilon: Probability that the bound does not hold, in (0, 1); None: see above.
        n: Independent units measured.
        unit: What they are.
        method: Test that was used.
        p_value: Belongs to the certified setting; None for "conformal".
        family: Family of policies that were walked.
        parameter: What λ is.
        setting: The certified λ: the last that passed.
        walked: Every setting tested, safest first; at most the last one failed.
        data: SHA-256 over the calibration documents' digests and tokens, hex.
        decode_mode: Says how the losses were measured.
        max_pending: Pending tokens at most, if ``decode_mode`` is "defer"; else None.
        dtype: Number format of the weights, such as "float32".
        prompt_tokens: Tokens of each document read at full depth first.
        new_tokens: Tokens after them that losses were measured on, per document.
        policy: SHA-256 of the certified policy's blob, hex.
        model, tokenizer: Fingerprints of the model and its tokenizer, hex.
        translators: Digest of the exit translators, or of the heads that classify, that exits were
            read through; "" for none.
        created_at: Unix seconds.

    Raises:
        ConfigError: it certifies nothing, or contradicts itself.
    """

    version: int = VERSION
    loss: str
    risk: float
    delta: float
    epsilon: float | None
    n: int
    unit: Unit
    method: Method
    p_value: float | None
    family: str
    parameter: str
    setting: float
    walked: tuple[Walked, ...]
    data: str
    decode_mode: DecodeMode
    max_pending: int | None
    dtype: str
    prompt_tokens: int
    new_tokens: int
    policy: str
    model: str
    tokenizer: str
    translators: str
    created_at: float

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ConfigError("certificate", problem, "Calibrate again")

    @property
    def statement(self) -> str:
        """The guarantee in one sentence, with its conditions."""
        bound = f"{self.loss} ≤ {self.delta:g}"
        if self.epsilon is None:
            bound = f"expected {bound} (conformal)"
        else:
            bound += f" with probability ≥ {1 - self.epsilon:g} ({self.method})"
        how = "classified" if self.decode_mode == "classify" else f"decoded by {self.decode_mode}"
        return f"{bound}, {self.n:,} {self.unit}s, {how}"

    def gap(self, *, kv_mode: str, dtype: str, translators: str) -> str:
        """Why it says nothing about a worker decoding like this; "" if it does.

        ``verify`` emits what full depth would, whatever the policy.
        """
        if kv_mode == "verify":
            return ""
        served = {"decode_mode": kv_mode, "dtype": dtype, "translators": translators}
        gaps = [
            f"certified for {name} {getattr(self, name)!r}, served with {value!r}"
            for name, value in served.items()
            if getattr(self, name) != value
        ]
        return "; ".join(gaps)

    def to_values(self) -> dict[str, Any]:
        """Plain values, as JSON says them."""
        return asdict(self) | {"walked": [step.to_values() for step in self.walked]}

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(self.to_values())

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Certificate:
        """From a parsed JSON object.

        Raises:
            PolicyRefusedError: BAD_FORMAT, naming what is unknown, missing, ill-typed or untrue.
        """
        check_fields(values, _FIELDS, PREFIX)
        for step in values["walked"]:
            check_fields(step, _STEP_FIELDS, f"{PREFIX}walked.", ("leaves",))
        walked = tuple(
            Walked(**step | {"leaves": tuple(step.get("leaves", ()))}) for step in values["walked"]
        )
        try:
            return cls(**values | {"walked": walked})
        except ConfigError as error:
            refuse(f"{PREFIX}{error.problem}")

    @classmethod
    def from_bytes(cls, raw: bytes) -> Certificate:
        """Parse strictly. Raises as ``from_values`` does."""
        return cls.from_values(parse_strictly(raw, _FIELDS))


def _problems(certificate: Certificate) -> Iterator[str]:
    if certificate.version != VERSION:
        yield f"version {certificate.version} is not {VERSION}"
    for name in ("delta", "epsilon"):
        value = getattr(certificate, name)
        if value is not None and not 0 < value < 1:
            yield f"{name} {value} is not in (0, 1)"
    if certificate.n < 1:
        yield "it rests on no data"
    if (certificate.max_pending is None) == (certificate.decode_mode == "defer"):
        yield f"max_pending {certificate.max_pending} in mode {certificate.decode_mode}"
    yield from _untested(certificate)
    yield from _unproven(certificate)


def _untested(certificate: Certificate) -> Iterator[str]:
    """The certified setting must be the last that passed, and nothing passes after a failure."""
    steps = certificate.walked
    if any(min(step.leaves, default=0) < 0 or sum(step.leaves) > 1 + 1e-9 for step in steps):
        yield "of some setting, tokens left in shares that are none"
    passed = [step for step in steps if step.passed]
    if not passed or not all(step.passed for step in steps[:-1]):
        yield "no setting passed, or one was tested after a failure"
        return
    last = passed[-1]
    said = (certificate.setting, certificate.risk, certificate.p_value)
    if said != (last.setting, last.risk, last.p_value):
        yield f"it certifies {said}, the last setting that passed is {last.setting}"


def _unproven(certificate: Certificate) -> Iterator[str]:
    if not 0 <= certificate.risk <= 1:
        yield f"risk {certificate.risk} is not in [0, 1]"
    if certificate.method == "conformal":
        bound = (certificate.n * certificate.risk + 1) / (certificate.n + 1)
        if certificate.epsilon is not None or certificate.p_value is not None:
            yield "conformal risk control has neither epsilon nor p-value"
        elif not bound <= certificate.delta:
            yield f"the conformal bound {bound:.6g} exceeds delta {certificate.delta}"
        return
    if certificate.epsilon is None or certificate.p_value is None:
        yield f"{certificate.method} needs epsilon and p-value"
    elif not certificate.p_value <= certificate.epsilon:
        yield f"p-value {certificate.p_value} exceeds epsilon {certificate.epsilon}"


def _one_of(names: tuple[str, ...]) -> Check:
    return (lambda value: is_text(value) and value in names), f"one of {', '.join(names)}"


_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")

_STEP_FIELDS: dict[str, Check] = {
    "setting": NUMBER,
    "risk": NUMBER,
    "p_value": or_null(NUMBER),
    "passed": _FLAG,
    "leaves": list_of(NUMBER),
}
_FIELDS: dict[str, Check] = {
    "version": COUNT,
    "loss": TEXT,
    "risk": NUMBER,
    "delta": NUMBER,
    "epsilon": or_null(NUMBER),
    "n": COUNT,
    "unit": _one_of(get_args(Unit)),
    "method": _one_of(get_args(Method)),
    "p_value": or_null(NUMBER),
    "family": TEXT,
    "parameter": TEXT,
    "setting": NUMBER,
    "walked": list_of(OBJECT),
    "data": DIGEST,
    "decode_mode": _one_of(get_args(DecodeMode)),
    "max_pending": or_null(COUNT),
    "dtype": TEXT,
    "prompt_tokens": COUNT,
    "new_tokens": COUNT,
    "policy": DIGEST,
    "model": FINGERPRINT,
    "tokenizer": FINGERPRINT,
    "translators": TEXT,
    "created_at": NUMBER,
}
assert _FIELDS.keys() == {field.name for field in fields(Certificate)}
