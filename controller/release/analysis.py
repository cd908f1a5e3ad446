"""Judges a canary between two steps, by what its requests and its stable release's did.

Rates are bounded by confidence sequences: intervals that hold at every look at once, so that a
canary may be judged after every token. They are Robbins' mixture of binomial likelihoods under a
uniform prior (Robbins 1970, "Statistical methods related to the law of the iterated logarithm";
Howard, Ramdas, McAuliffe, Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence
sequences", Annals of Statistics 49(2)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from offramp.controller.errors import ConfigError
from offramp.controller.release.tally import Tally
from offramp.controller.strict import COUNT, Check, is_number, or_null

HALVINGS = 60
"""Halvings of the search for an end of an interval: past a double's precision."""

_SHARE: Check = (lambda value: is_number(value) and 0 < value < 1, "a number in (0, 1)")
_RATIO: Check = (lambda value: is_number(value) and value > 0, "a number above 0")


def _are_percents(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value or not all(map(is_number, value)):
        return False
    return value[0] > 0 and value[-1] <= 100 and all(a < b for a, b in pairwise(value))


STEPS: dict[str, Check] = {
    "percents": (_are_percents, "a list of numbers in (0, 100], ascending"),
    "min_tokens": COUNT,
    "min_audited": COUNT,
    "max_disagreement": _SHARE,
    "max_failures": _SHARE,
    "min_speed": _RATIO,
    "max_layers": or_null(_RATIO),
    "confidence": _SHARE,
}
"""What each setting may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps of a canary, and what must hold before the next one is taken.

    Attributes:
        percents: Shares of the requests, ascending. The first is taken by hand.
        min_tokens: Tokens of both tracks in a step before it is judged.
        min_audited: Audited early tokens of the canary in a step before it is judged.
        max_disagreement: Share of them that full depth may disagree with: the whole interval must
            lie below it to pass, and above it to fail.
        max_failures: Failures of the policy per token; the whole interval above it fails.
        min_speed: Tokens per second of the canary's requests, in relation to the stable release's.
        max_layers: Layers executed per token, in the same relation; None: no bound.
        confidence: Probability that an interval is right at every look, in (0, 1).

    Raises:
        ConfigError: a setting is out of its range.
    """

    percents: tuple[float, ...] = (5, 25, 50, 100)
    min_tokens: int = 2000
    min_audited: int = 200
    max_disagreement: float = 0.25
    max_failures: float = 0.01
    min_speed: float = 0.9
    max_layers: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, (holds, expected) in STEPS.items():
            if not holds(value := getattr(self, name)):
                raise ConfigError(name, f"{value!r} is not {expected}", "Correct the steps file")

    @classmethod
    def load(cls, path: Path) -> Steps:
        """Read a YAML file.

        Raises:
            ConfigError: it cannot be read, or a setting is unknown or out of its range.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise ConfigError("steps", f"{path} is unreadable ({said})", "Write YAML") from error
        if not isinstance(values, dict):
            raise ConfigError("steps", f"{path} is no mapping", "Write name: value, one a line")
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(str(name), "is no known setting", f"Use {', '.join(known)}")
        return cls(**values)

    def after(self, percent: float) -> float | None:
        """The next step; None after the last."""
        return next((each for each in self.percents if each > percent), None)


class StepOutcome(StrEnum):
    """What becomes of a canary."""

    PASS = "passes"
    HOLD = "holds"
    FAIL = "fails"


@dataclass(frozen=True, slots=True)
class Finding:
    """An outcome and why, in words.

    Attributes:
        outcome: Passes, holds or fails.
        reason: Says why, in a clause.
    """

    outcome: StepOutcome
    reason: str


def interval(hits: int, seen: int, confidence: float) -> tuple[float, float]:
    """Bounds of a probability, which hold for all numbers of observations at once.

    Args:
        hits: Observations that were so.
        seen: All observations.
        confidence: Probability that the bounds hold at every look.
    """
    misses = seen - hits
    mixture = math.lgamma(hits + 1) + math.lgamma(misses + 1) - math.lgamma(seen + 2)
    limit = -math.log(1 - confidence)

    def is_refuted(rate: float) -> bool:
        likelihood = _times_log(hits, rate) + _times_log(misses, 1 - rate)
        return mixture - likelihood >= limit

    best = hits / seen if seen else 0.5
    return _end(0.0, best, is_refuted), _end(1.0, best, is_refuted)


def _times_log(count: int, share: float) -> float:
    if count == 0:
        return 0.0
    return count * math.log(share) if share > 0 else -math.inf


def _end(outside: float, inside: float, is_refuted: Callable[[float], bool]) -> float:
    """Where an interval ends, between an end of [0, 1] and the best guess."""
    if not is_refuted(outside):
        return outside
    for _ in range(HALVINGS):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if is_refuted(middle) else (outside, middle)
    return outside


def judge(steps: Steps, canary: Tally, stable: Tally) -> Finding:
    """Say whether a canary may take its next step.

    A lossless canary (``verify``) is judged by speed: every draft was compared already.
    """
    least, most = interval(canary.disagreed, canary.audited, steps.confidence)
    fails = min(canary.failures, canary.tokens)
    least_failing, _ = interval(fails, canary.tokens, steps.confidence)
    if least > steps.max_disagreement:
        allowed = f"{steps.max_disagreement:.1%} are allowed"
        audits = f"{least:.1%} or more of what is audited ({canary.audited} tokens)"
        return Finding(StepOutcome.FAIL, f"full depth disagrees with {audits}, {allowed}")
    if least_failing > steps.max_failures:
        allowed = f"{steps.max_failures:.1%} are allowed"
        return Finding(
            StepOutcome.FAIL, f"the policy fails on {least_failing:.1%} or more, {allowed}"
        )
    for name, tally in (("canary", canary), ("stable release", stable)):
        if tally.tokens < steps.min_tokens:
            reason = f"{tally.tokens} tokens of the {name}, {steps.min_tokens} are asked for"
            return Finding(StepOutcome.HOLD, reason)
    if slow := _slowness(steps, canary, stable):
        return Finding(StepOutcome.FAIL, slow)
    speed = f"{canary.speed / stable.speed:.2f} times the stable release's speed"
    if canary.is_lossless:
        return Finding(StepOutcome.PASS, f"lossless, {speed}")
    if canary.audited < steps.min_audited:
        reason = f"{canary.audited} audited tokens, {steps.min_audited} are asked for"
        return Finding(StepOutcome.HOLD, reason)
    found = f"full depth disagrees with {least:.1%} to {most:.1%}"
    if most > steps.max_disagreement:
        return Finding(
            StepOutcome.HOLD, f"{found}, too wide to tell from {steps.max_disagreement:.1%}"
        )
    return Finding(StepOutcome.PASS, f"{found}, {speed}")


def _slowness(steps: Steps, canary: Tally, stable: Tally) -> str:
    """How the canary costs more than it may; "" if it does not."""
    if canary.speed < steps.min_speed * stable.speed:
        return (
            f"{canary.speed:.1f} tokens/s are less than {steps.min_speed:g} times the stable "
            f"release's {stable.speed:.1f}"
        )
    if steps.max_layers is not None and canary.depth > steps.max_layers * stable.depth:
        return (
            f"{canary.depth:.1f} layers per token are more than {steps.max_layers:g} times the "
            f"stable release's {stable.depth:.1f}"
        )
    return ""
