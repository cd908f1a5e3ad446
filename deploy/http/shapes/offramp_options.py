"""The namespace ``offramp`` of a request: which depth it asks for, and what it is told."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from offramp.controller.errors import RequestError
from offramp.controller.release.certified_points import BUDGET, WEIGHT, Target
from offramp.deploy.clients.allowances import LOSSLESS
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVMode, KVWish

MOST_ASKED = 1e9
"""Larger budgets and weights are mistakes."""


MOST_FIELDS = 1024
"""Fields of one object: each that is unknown is kept, or refused, by itself."""


class Nullable(BaseModel):
    """Fields of a request, of which null means absent.

    OpenAI's fields are nullable, and its client sends null for None.
    """

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > MOST_FIELDS:
            raise ValueError(f"holds more than {MOST_FIELDS} fields")
        return {field: value for field, value in body.items() if value is not None}


def _number_or_null(**bounds: float) -> Any:
    number = {"type": "number", "maximum": MOST_ASKED, **bounds}
    return {"anyOf": [number, {"type": "null"}]}


class QualityOptions(Nullable):
    """What of the namespace ``offramp`` means something to every kind of request."""

    model_config = ConfigDict(extra="forbid")

    stats: bool = Field(default=False, description="Report exit depths, generation and cost.")
    # Checked where it is read: the error is to name the field within the namespace.
    quality: Any = Field(
        default=None,
        description='1 minus the loss that a certificate must bound, or "lossless".',
        json_schema_extra={
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"const": LOSSLESS},
                {"type": "null"},
            ]
        },
    )


class OfframpOptions(QualityOptions):
    """The opt-in namespace ``offramp`` of a request for tokens."""

    # Checked in ``wish_of``, as quality is.
    kv_mode: Any = Field(
        default=None,
        description="What becomes of skipped layers; the engine's own mode by default.",
        json_schema_extra={"enum": [*get_args(KVMode), None]},
    )
    # As kv_mode, checked in ``prefill_of``.
    prefill: Any = Field(
        default=None,
        description="Whether tokens of the prompt may leave early; by default as the engine does.",
        json_schema_extra={"enum": [*get_args(Prefill), None]},
    )
    latency_budget_ms: Any = Field(
        default=None,
        description="Most milliseconds per token that the cost table may predict.",
        json_schema_extra=_number_or_null(exclusiveMinimum=0),
    )
    energy_weight: Any = Field(
        default=None,
        description="Loss that saving full depth's energy for a token is worth.",
        json_schema_extra=_number_or_null(minimum=0),
    )


def wish_of(options: OfframpOptions) -> KVWish | None:
    """What a request asks for: a mode, a quality or a point; None leaves all to the engine.

    Raises:
        RequestError: an unknown mode, a quality, budget or weight that is none, or two of them that
            exclude each other.
    """
    mode: KVMode | None = options.kv_mode
    target = _target(options)
    if target is not None:
        if mode is not None:
            raise RequestError("offramp.kv_mode", "picks no point", "Leave it out")
        return target
    if options.quality is not None:
        if mode is not None:
            raise RequestError("offramp.quality", "says what kv_mode says", "Send one of both")
        return quality_of(options.quality)
    if mode is not None and mode not in get_args(KVMode):
        known = ", ".join(get_args(KVMode))
        raise RequestError("offramp.kv_mode", f"{mode!r:.40} is unknown", f"Use one of {known}")
    return mode


def prefill_of(options: OfframpOptions) -> Prefill | None:
    """How a request wants its prompt read; None leaves it to the engine.

    Raises:
        RequestError: an unknown way.
    """
    way: Prefill | None = options.prefill
    if way is not None and way not in get_args(Prefill):
        known = ", ".join(get_args(Prefill))
        raise RequestError("offramp.prefill", f"{way!r:.40} is unknown", f"Use one of {known}")
    return way


def _target(options: OfframpOptions) -> Target | None:
    """What a request asks of time and energy; None if nothing."""
    budget, weight = options.latency_budget_ms, options.energy_weight
    if budget is None and weight is None:
        return None
    for field, value in ((BUDGET, budget), (WEIGHT, weight)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_fine = is_number and (value > 0 or field == WEIGHT) and 0 <= value <= MOST_ASKED
        if value is not None and not is_fine:
            problem = f"{value!r:.40} is no number from 0 to {MOST_ASKED:g}"
            raise RequestError(field, problem, "Send one, or leave it out")
    quality = None if options.quality is None else quality_of(options.quality)
    return Target(
        latency_budget_ms=None if budget is None else float(budget),
        energy_weight=float(weight or 0),
        quality=1.0 if isinstance(quality, str) else quality,
    )


def quality_of(given: Any) -> KVMode | float:
    """The mode, or the number, that a request's ``quality`` stands for.

    Raises:
        RequestError: it is neither a share nor "lossless".
    """
    if given == LOSSLESS:
        return "verify"
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not (is_number and 0 <= given <= 1):
        raise RequestError(
            "offramp.quality", f"{given!r:.40} is no share", f'Send 0 to 1, or "{LOSSLESS}"'
        )
    return float(given)
