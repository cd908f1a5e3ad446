"""Reads what the console shows of a channel, from what ``status`` and ``history`` read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from offramp.controller.errors import ConfigError, OfframpError, RegistryUnavailableError
from offramp.controller.release.manifest import Rollout
from offramp.controller.release.registry import Ack, AckState, Event, PolicyRegistry
from offramp.controller.watching.analysis import (
    CostRatio,
    comparisons,
    energy_gap,
    judge,
    judge_shadow,
)
from offramp.controller.watching.intervals import interval
from offramp.controller.watching.steps import Steps
from offramp.controller.watching.tally import Tally, add_up
from offramp.deploy.cli.releases.control import head_line
from offramp.deploy.cli.releases.past import PastRelease, past_releases
from offramp.deploy.cli.releases.tracks import track_rows
from offramp.deploy.console.candidates import Frontier, frontier_of
from offramp.deploy.serve.publishing import KEY
from offramp.deploy.serve.settings import Settings

NOT_REPORTED = "not reported"
"""What stands in place of a figure that no worker reports."""

EVENTS = 10
"""Promotions that are listed."""


@dataclass(frozen=True, slots=True)
class CanaryView:
    """How far a canary is.

    Attributes:
        generation, stable: The releases that are compared.
        percent: Share of the requests that the canary serves.
        following: The default plan's next share; None after the last.
        outcome: Passes, holds or fails by the default bounds.
        reason: Says why.
        disagreed: Interval of the share of audited tokens that full depth disagrees with.
        ratios: Costs in relation to the stable release's, those that there is an interval of.
    """

    generation: int
    stable: int
    percent: float
    following: float | None
    outcome: str
    reason: str
    disagreed: str
    ratios: list[CostRatio]


@dataclass(frozen=True, slots=True)
class ExitShares:
    """Where the tokens of a release left, drafts included.

    Attributes:
        generation: The release.
        early: Share of its tokens that left early.
        by_exit: Share of them after each exit, full depth last; [] from workers that do not say.
    """

    generation: int
    early: float
    by_exit: list[tuple[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelView:
    """All that the page shows at one moment.

    Attributes:
        channel: Name of the channel.
        state: A word or two: no release, serving, canary, in shadow, rolled back, tripped,
            registry unreachable.
        head: The head in a sentence, as ``offramp status`` says it.
        trouble: Why the registry's part is missing; "" if it is there.
        may_sign: Whether the signing key lies on this machine.
        promoted: The generation promoted last, by the ledger; 0 if none was.
        workers: Acknowledgements, by worker name.
        tracks: Cells of what each running release did.
        canary: How far a canary is; None if none runs.
        saved: Each kind of saving against full depth, and the figure or why there is none.
        left: Where the tokens of each running release left.
        frontier: What the released policies lose and cost.
        releases: The ledger, newest first.
        events: Latest promotions by the registry, newest first.
        now: Unix seconds of the look.
    """

    channel: str
    state: str
    head: str
    trouble: str
    may_sign: bool
    promoted: int
    workers: list[Ack]
    tracks: list[tuple[str, ...]]
    canary: CanaryView | None
    saved: list[tuple[str, str]]
    left: list[ExitShares]
    frontier: Frontier
    releases: list[PastRelease]
    events: list[Event]
    now: float

    @property
    def trips(self) -> list[Ack]:
        """Workers that took a release out of service."""
        return [ack for ack in self.workers if ack.state is AckState.TRIPPED]


def view_channel(registry: PolicyRegistry, settings: Settings) -> ChannelView:
    """Look at a channel; what cannot be read is said in its place."""
    releases = _releases(settings)
    served = next((each for each in releases if each.served == "now"), None)
    trouble, head, workers, events = "", "", list[Ack](), list[Event]()
    try:
        head = head_line(registry, settings)
        workers, events = registry.acks(), registry.events(EVENTS)
    except RegistryUnavailableError as error:
        trouble = str(error)
    except OfframpError as error:  # such as damaged roots
        head = str(error)
    tallies = [each for ack in workers for each in ack.tallies]
    rollout = served.manifest.rollout if served and served.manifest else Rollout()
    promoted = served.generation if served else 0
    return ChannelView(
        channel=settings.channel,
        state=_state(trouble, workers, served, head),
        head=head,
        trouble=trouble,
        may_sign=(settings.home / KEY).exists(),
        promoted=promoted,
        workers=sorted(workers, key=lambda ack: ack.worker),
        tracks=track_rows(workers),
        canary=_canary(promoted, rollout, tallies) if rollout.is_canary else None,
        saved=_saved(promoted, rollout, tallies),
        left=_left(tallies),
        frontier=frontier_of(releases),
        releases=releases,
        events=events,
        now=time.time(),
    )


def _releases(settings: Settings) -> list[PastRelease]:
    try:
        return past_releases(settings)
    except ConfigError:  # no ledger here: the console shows what the registry says
        return []


def _state(trouble: str, workers: list[Ack], served: PastRelease | None, head: str) -> str:
    if trouble:
        return "registry unreachable"
    if any(ack.state is AckState.TRIPPED for ack in workers):
        return "tripped"
    if served is None or served.manifest is None:
        return "no release" if head in ("", "head: none") else "serving"
    if served.manifest.rollout.is_canary:
        return "in shadow" if served.manifest.rollout.is_shadow else "canary"
    return "rolled back" if served.manifest.rollback_of else "serving"


def _canary(generation: int, rollout: Rollout, tallies: Sequence[Tally]) -> CanaryView:
    steps = Steps()
    canary, stable = (add_up(each, tallies) for each in (generation, rollout.stable_generation))
    is_shadow = rollout.is_shadow
    found = judge_shadow(steps, canary) if is_shadow else judge(steps, canary, stable)
    is_comparable = canary.requests > 0 and stable.requests > 0 and not is_shadow
    compared = comparisons(steps, canary, stable) if is_comparable else ()
    least, most = interval(canary.disagreed, canary.audited, steps.confidence)
    return CanaryView(
        generation=generation,
        stable=rollout.stable_generation,
        percent=rollout.percent,
        following=steps.after(rollout.percent),
        outcome=found.outcome.value,
        reason=found.reason,
        disagreed=f"{least:.1%} to {most:.1%}" if canary.audited else "no token audited yet",
        ratios=[each for each in compared if math.isfinite(each.bounds[1])],
    )


def _saved(promoted: int, rollout: Rollout, tallies: Sequence[Tally]) -> list[tuple[str, str]]:
    """Savings of the served release against one that ran at full depth beside it."""
    if rollout.is_shadow:
        why = f"{NOT_REPORTED}: a canary in shadow serves no request"
        return [(name, why) for name in ("Layers", "Latency", "Energy")]
    stable = rollout.stable_generation
    ours, beside = add_up(promoted, tallies), add_up(stable, tallies)
    layers = latency = f"{NOT_REPORTED}: no release ran at full depth beside it"
    if beside.is_full_depth and ours.tokens and beside.speed and ours.speed:
        layers = f"{1 - ours.depth / beside.depth:.0%} against generation {stable}"
        latency = f"{1 - beside.speed / ours.speed:.0%} per token against generation {stable}"
    energy = f"{NOT_REPORTED}: {energy_gap(ours, beside)}"
    if not beside.is_full_depth:
        energy = f"{NOT_REPORTED}: no release ran at full depth beside it"
    elif ours.token_j is not None and beside.token_j and not energy_gap(ours, beside):
        saved = 1 - ours.token_j / beside.token_j
        energy = f"{saved:.0%} per token against generation {stable} ({ours.meter})"
    return [("Layers", layers), ("Latency", latency), ("Energy", energy)]


def _left(tallies: Sequence[Tally]) -> list[ExitShares]:
    sums = [add_up(each, tallies) for each in sorted({tally.generation for tally in tallies})]
    return [_shares(each) for each in sums if each.tokens]


def _shares(tally: Tally) -> ExitShares:
    """Shares by exit in the order in which tokens pass them."""
    told = sum(tally.exits.values())
    places = sorted(tally.exits, key=lambda name: (":" not in name, int(name.split(":")[0])))
    shares = [(name, tally.exits[name] / told) for name in places] if told else []
    return ExitShares(tally.generation, tally.early / tally.tokens, shares)
