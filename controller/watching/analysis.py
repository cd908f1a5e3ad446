"""Judges a canary between two steps, by what its requests and its stable release's did.

Every figure comes with an interval that holds at every look (see ``intervals``), so looking often
costs nothing. What compares both releases fails once its whole interval lies beyond the bound, and
holds while the figure does and the interval does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from offramp.controller.policies.exits import parse_exit
from offramp.controller.watching.intervals import interval, mean_interval, ratio_of
from offramp.controller.watching.quantiles import quantile_interval, quantile_s
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import Tally

LATE = 0.99
"""The quantile of times that is compared."""


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


@dataclass(frozen=True, slots=True)
class CostRatio:
    """One cost of a canary's requests, in relation to the stable release's.

    Attributes:
        what: Names the cost.
        ratio: Canary to stable release.
        bounds: Interval of the ratio.
        limit: What it may be at most.
    """

    what: str
    ratio: float
    bounds: tuple[float, float]
    limit: float

    @property
    def story(self) -> str:
        """The figure, its interval and its limit, in a clause."""
        least, most = self.bounds
        return (
            f"{self.what} {self.ratio:.2f} times the stable release's ({least:.2f} to {most:.2f}), "
            f"{self.limit:.3g} times are allowed"
        )


def judge_shadow(steps: Steps, canary: Tally) -> Finding:
    """Say whether a canary that serves nobody yet may take its next step.

    It is judged by what full depth says of the requests that were repeated under it. Nobody waited
    for them, and all were audited, so their times say nothing of requests that it serves.
    """
    if harm := _harm(steps, canary):
        return Finding(StepOutcome.FAIL, harm)
    if few := _too_few(steps, {"canary": canary}):
        return Finding(StepOutcome.HOLD, few)
    found, is_equal = _equality(steps, canary)
    if is_equal:
        left = f"{canary.early / canary.tokens:.0%} of the tokens left early or were drafted"
        return Finding(StepOutcome.PASS, f"{found}, {left}, after {mean_exit(canary)}")
    return _undecided(steps, canary, found)


def mean_exit(tally: Tally) -> str:
    """How many layers ran before tokens came out or were drafted, in words."""
    told = sum(tally.exits.values())
    total = sum(int(parse_exit(name)) * count for name, count in tally.exits.items())
    return f"{total / told:.1f} layers on average" if told else "a number of layers not told"


def judge(steps: Steps, canary: Tally, stable: Tally) -> Finding:
    """Say whether a canary may take its next step.

    A canary is judged by speed alone if none of its tokens could differ from full depth's: in
    ``verify`` every draft was compared, and of another none may have left early. One that leaves so
    seldom, or comes so near to a bound, that nobody can tell, fails in the end.
    """
    if harm := _harm(steps, canary):
        return Finding(StepOutcome.FAIL, harm)
    if few := _too_few(steps, {"canary": canary, "stable release": stable}):
        return Finding(StepOutcome.HOLD, few)
    compared = list(comparisons(steps, canary, stable))
    for each in compared:
        if each.bounds[0] > each.limit:
            return Finding(StepOutcome.FAIL, each.story)
    if steps.max_energy is not None and (unread := energy_gap(canary, stable)):
        return Finding(StepOutcome.HOLD, f"{unread}, and max_energy bounds it")
    speed = f"{compared[0].what} {compared[0].ratio:.2f} times the stable release's"
    unsure = next((each.story for each in compared if each.ratio > each.limit), "")
    found, is_equal = _equality(steps, canary)
    if is_equal and not unsure:
        return Finding(StepOutcome.PASS, f"{found}, {speed}")
    return _undecided(steps, canary, unsure or found)


def _undecided(steps: Steps, canary: Tally, reason: str) -> Finding:
    """Hold for now, and fail once the canary made the tokens that should have told."""
    if canary.tokens < steps.max_tokens:
        return Finding(StepOutcome.HOLD, reason)
    told = f"{canary.tokens} tokens should have told (max_tokens)"
    return Finding(StepOutcome.FAIL, f"{reason}; {told}")


def _harm(steps: Steps, canary: Tally) -> str:
    """What the canary does more often than it may, beyond doubt; "" if nothing."""
    least, _ = interval(canary.disagreed, canary.audited, steps.confidence)
    if least > steps.max_disagreement:
        audits = f"{least:.1%} or more of what is audited ({canary.audited} tokens)"
        return f"full depth disagrees with {audits}, {steps.max_disagreement:.1%} are allowed"
    least, _ = interval(canary.failures, canary.tokens, steps.confidence)
    if least > steps.max_failures:
        return f"the policy fails on {least:.1%} or more, {steps.max_failures:.1%} are allowed"
    return ""


def _too_few(steps: Steps, tracks: Mapping[str, Tally]) -> str:
    """What there is too little of; "" if there is enough."""
    for name, tally in tracks.items():
        for what, seen, least in (
            ("tokens", tally.tokens, steps.min_tokens),
            ("requests that ended", tally.requests, steps.min_requests),
        ):
            if seen < least:
                return f"{seen} {what} of the {name}, {least} are asked for"
    return ""


def comparisons(steps: Steps, canary: Tally, stable: Tally) -> Iterator[CostRatio]:
    """What the canary's requests cost, each figure that has a limit; time per token first."""
    confidence = (1 + steps.confidence) / 2  # so that both intervals of a ratio are right together
    tracks = (canary, stable)

    def means(name: str, what: str, limit: float) -> CostRatio:
        sums = [(getattr(each, name), getattr(each, f"{name}_squared")) for each in tracks]
        ours, others = (
            mean_interval(each.requests, *both, confidence)
            for each, both in zip(tracks, sums, strict=True)
        )
        ratio = _ratio(sums[0][0] / canary.requests, sums[1][0] / stable.requests)
        return CostRatio(what, ratio, ratio_of(ours, others), limit)

    def energy(limit: float) -> CostRatio:
        ours, others = (
            mean_interval(each.batches, each.joules, each.joules_squared, confidence)
            for each in tracks
        )
        ratio = _ratio(canary.joules / canary.batches, stable.joules / stable.batches)
        return CostRatio(f"joules per token ({canary.meter})", ratio, ratio_of(ours, others), limit)

    def late(name: str, what: str, limit: float) -> CostRatio:
        counts = [getattr(each, name) for each in tracks]
        ours, others = (quantile_interval(each, LATE, confidence) for each in counts)
        ratio = _ratio(*(quantile_s(each, LATE) for each in counts))
        return CostRatio(what, ratio, ratio_of(ours, others), limit)

    yield means("paces", "seconds per token", 1 / steps.min_speed)
    if steps.max_layers is not None:
        yield means("depths", "layers per token", steps.max_layers)
    if steps.max_energy is not None and not energy_gap(canary, stable):
        yield energy(steps.max_energy)
    if steps.max_first_p99 is not None:
        yield late("firsts", "99% of first tokens within", steps.max_first_p99)
    if steps.max_gap_p99 is not None:
        yield late("gaps", "99% of later tokens within", steps.max_gap_p99)


def energy_gap(canary: Tally, stable: Tally) -> str:
    """Why both tracks' energy cannot be compared; "" if it can."""
    for name, tally in (("canary", canary), ("stable release", stable)):
        if tally.token_j is None:
            why = "it was read by several meters" if tally.batches else "too few tokens were read"
            return f"energy of the {name} is not known: {why}"
    if canary.meter != stable.meter:
        return f"energy cannot be compared: {canary.meter} with {stable.meter}"
    return ""


def _ratio(ours: float, others: float) -> float:
    return ours / others if others else 1.0


def _equality(steps: Steps, canary: Tally) -> tuple[str, bool]:
    """What is known of the canary's tokens, and whether that is enough."""
    if canary.is_lossless:
        return "lossless", True
    if canary.is_full_depth:
        return "no token left early", True
    if canary.audited < steps.min_audited:
        return f"{canary.audited} audited tokens, {steps.min_audited} are asked for", False
    least, most = interval(canary.disagreed, canary.audited, steps.confidence)
    found = f"full depth disagrees with {least:.1%} to {most:.1%}"
    if most > steps.max_disagreement:
        return f"{found}, too wide to tell from {steps.max_disagreement:.1%}", False
    return found, True
