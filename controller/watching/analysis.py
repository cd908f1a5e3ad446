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
from dataclasses import dataclass
from enum import StrEnum

from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import Tally

HALVINGS = 60
"""Halvings of the search for an end of an interval: past a double's precision."""


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

    A canary is judged by speed alone if none of its tokens could differ from full depth's: in
    ``verify`` every draft was compared, and of another none may have left early. One that leaves so
    seldom, or disagrees so nearly as often as it may, that audits do not tell, fails in the end.
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
    return _equality(steps, canary, (least, most), speed)


def _equality(steps: Steps, canary: Tally, disagreed: tuple[float, float], speed: str) -> Finding:
    """What audits say of a canary that is fast enough."""
    if canary.is_lossless:
        return Finding(StepOutcome.PASS, f"lossless, {speed}")
    if canary.is_full_depth:
        return Finding(StepOutcome.PASS, f"no token left early, {speed}")
    found = f"full depth disagrees with {disagreed[0]:.1%} to {disagreed[1]:.1%}"
    if canary.audited < steps.min_audited:
        found = f"{canary.audited} audited tokens, {steps.min_audited} are asked for"
    elif disagreed[1] > steps.max_disagreement:
        found = f"{found}, too wide to tell from {steps.max_disagreement:.1%}"
    else:
        return Finding(StepOutcome.PASS, f"{found}, {speed}")
    if canary.tokens < steps.max_tokens:
        return Finding(StepOutcome.HOLD, found)
    return Finding(
        StepOutcome.FAIL, f"{found}; {canary.tokens} tokens should have told (max_tokens)"
    )


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
