"""Bounds at which a worker takes a release out of service, and the test that watches them.

The test is an e-detector (Shin, Ramdas, Rinaldo 2024, "E-detectors: a nonparametric framework for
sequential change detection", New England Journal of Statistics in Data Science 2(2)) whose wealth
is made by betting on bounded means (Waudby-Smith, Ramdas 2024, "Estimating means of bounded random
variables by betting", JRSS-B 86(1)). It may be looked at after every observation, at no cost in
confidence, and forgets a good past, so that a change shows as soon as a bad start would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from offramp.controller.errors import ConfigError
from offramp.controller.strict import Check, is_number, or_null
from offramp.controller.watching.adaptation import SettingWalk
from offramp.controller.watching.quantiles import bucket_of
from offramp.controller.watching.tally import Tally

RARELY = 1e6
"""A bound that holds is said to be crossed once in so many observations at most, on average."""

STAKES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
"""Shares of the wealth that are bet; each wins fastest at another distance from the bound."""

MOST_DRAFTS = 8
"""Drafts of a cycle, counted at most: the scale of what a cycle can win."""

LATE_SHARE = 0.05
"""Share of tokens that may be later than ``max_token_ms``."""

FIRST_AUDITED = 8
"""Requests of a release, on a worker, that are audited before a share of them is: what does harm
shows within seconds, however busy the worker is."""

_POSITIVE: Check = (lambda value: is_number(value) and value > 0, "a number above 0")
_OPEN_SHARE: Check = (lambda value: is_number(value) and 0 < value < 1, "a number in (0, 1)")
_BELOW_ONE: Check = (lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)")

GUARDRAILS: dict[str, Check] = {
    "max_disagreement": _OPEN_SHARE,
    "max_failures": _OPEN_SHARE,
    "min_exits": _BELOW_ONE,
    "max_token_ms": or_null(_POSITIVE),
    "adapt_above": or_null(_OPEN_SHARE),
}
"""What each bound may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guardrails:
    """Bounds that travel with a release.

    Attributes:
        max_disagreement: Share of audited early tokens that full depth may disagree with.
        max_failures: Failures of the policy per token, as with scores that are not finite; a
            request fails once at most, and goes on without it.
        min_exits: Share of tokens that must leave early; 0 asks for none.
        max_token_ms: Milliseconds after which a token is late; 5 % may be. None: no bound.
        adapt_above: No bound to trip at: share of audited early tokens above which a worker moves
            to a safer setting of the certificate, and below which it returns; None: it stays.

    Raises:
        ConfigError: a bound is out of its range.
    """

    max_disagreement: float = 0.25
    max_failures: float = 0.01
    min_exits: float = 0.0
    max_token_ms: float | None = None
    adapt_above: float | None = None

    def __post_init__(self) -> None:
        for name, (holds, expected) in GUARDRAILS.items():
            if not holds(value := getattr(self, name)):
                raise ConfigError(name, f"{value!r} is not {expected}", "Correct the guardrail")

    @classmethod
    def certified(cls, delta: float) -> Guardrails:
        """Those of a policy whose disagreement is certified: twice as much is no bad luck."""
        return cls(max_disagreement=min(2 * delta, cls().max_disagreement))

    def to_values(self) -> dict[str, Any]:
        """Plain values, as JSON says them."""
        return asdict(self)


assert GUARDRAILS.keys() == {each.name for each in fields(Guardrails)}


class MeanAlarm:
    """Watches whether the mean of what it is told exceeds a bound.

    Args:
        bound: Largest mean that is right, above 0.

    Attributes:
        seen: Observations since the alarm last had no suspicion.
        total: Their sum.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.seen = 0
        self.total = 0.0
        self._wealth = [1.0] * len(STAKES)

    def tell(self, value: float) -> bool:
        """Take an observation, 0 at least; True once the bound is crossed beyond doubt."""
        win = value / self.bound - 1.0  # at least −1, so that no stake is lost more than once
        if max(self._wealth) <= 1.0:
            self.seen, self.total = 0, 0.0
        self.seen += 1
        self.total += value
        self._wealth = [
            max(wealth, 1.0) * (1.0 + stake * win)
            for wealth, stake in zip(self._wealth, STAKES, strict=True)
        ]
        return sum(self._wealth) >= RARELY * len(STAKES)

    @property
    def mean(self) -> float:
        """Mean of what was told since there was no suspicion."""
        return self.total / self.seen if self.seen else 0.0


class PolicyWatch:
    """Watches one release on one worker; used by the thread that decodes.

    Args:
        guardrails: The release's bounds.
        trip: Told once, in a sentence, why the release must go.
        generation: The release's number.
        walk: Says at which certified setting its requests run; None: at what was published.
        move: Told each setting that new requests are to run at, once it changes.

    Attributes:
        tripped: Why it went; "" while it is in service.
        tally: Counts what its requests did.
    """

    def __init__(
        self,
        guardrails: Guardrails,
        trip: Callable[[str], None],
        generation: int = 0,
        walk: SettingWalk | None = None,
        move: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.guardrails = guardrails
        self.tripped = ""
        self.tally = Tally(generation=generation)
        self._walk, self._move = walk, move
        self._note_point()
        self._first = FIRST_AUDITED
        self._trip = trip
        self._disagreement = MeanAlarm(guardrails.max_disagreement)
        self._failures = MeanAlarm(guardrails.max_failures)
        self._stays = MeanAlarm(1.0 - guardrails.min_exits)
        self._late = MeanAlarm(LATE_SHARE)
        self._losses = MeanAlarm(MOST_DRAFTS)

    def is_first(self) -> bool:
        """Whether a request that is admitted now is one of the release's first."""
        self._first -= 1
        return self._first >= 0

    def judge(self, agreed: bool, setting: float | None = None) -> None:
        """Full depth agreed with an audited token, or did not.

        Args:
            agreed: Whether it did.
            setting: The certified setting that the token's request runs at; None: of none.
        """
        self.tally.audited += 1
        self.tally.disagreed += not agreed
        alarm = self._disagreement
        if alarm.tell(not agreed):
            self._stop(
                f"full depth disagrees with {alarm.mean:.0%} of the last {alarm.seen} audited "
                f"tokens, {alarm.bound:.0%} are allowed"
            )
        # Requests that began before the last move, or chose a setting, say nothing of this one.
        elif self._walk is not None and setting == self._walk.setting and self._walk.tell(agreed):
            self._note_point()
            self._move(self._walk.setting)

    def _note_point(self) -> None:
        if (walk := self._walk) is not None:
            self.tally.points, self.tally.point = len(walk.settings), walk.place + 1
            self.tally.moves = walk.moves

    def note_failure(self) -> None:
        """The policy raised or made no sense; the request goes on without it."""
        self.tally.failures += 1
        if self._failures.tell(1.0):
            self._stop(
                f"the policy failed {self._failures.total:.0f} times in {self._failures.seen} "
                f"tokens, {self._failures.bound:.0%} are allowed"
            )

    def note_token(self, executed: int, layers: int) -> None:
        """A token came out, or was drafted, after so many of the layers."""
        is_early = executed / layers < 1.0  # of a copy, too, whose exits equal no plain number
        self.tally.early += is_early
        self.tally.note_exit(executed)
        self._failures.tell(0.0)
        if self.guardrails.min_exits and self._stays.tell(not is_early):
            self._stop(
                f"{1 - self._stays.mean:.1%} of the last {self._stays.seen} tokens left early, "
                f"{self.guardrails.min_exits:.1%} should"
            )

    def count_anew(self) -> None:
        """Begin the tally again, so that it covers the same time as another's."""
        self.tally = Tally(generation=self.tally.generation)
        self._note_point()

    def note_first(self, seconds: float) -> None:
        """A request's first token came, so long after the request."""
        self.tally.firsts[bucket_of(seconds)] += 1

    def note_gap(self, seconds: float, tokens: int = 1, layers: int = 0) -> None:
        """A request's next tokens came.

        Args:
            seconds: How long after those before them.
            tokens: How many came at once; more than one in ``verify``.
            layers: Layers that were executed for them.
        """
        self.tally.gaps[bucket_of(seconds)] += 1
        self.tally.tokens += tokens
        self.tally.seconds += seconds
        self.tally.layers += layers
        bound_ms = self.guardrails.max_token_ms
        if bound_ms is not None and self._late.tell(1e3 * seconds > bound_ms):
            self._stop(
                f"{self._late.mean:.0%} of the last {self._late.seen} tokens took more than "
                f"{bound_ms:g} ms, {LATE_SHARE:.0%} are allowed"
            )

    def note_cycle(self, spent: float, saved: int) -> None:
        """Drafts were judged.

        Args:
            spent: What they cost, in passes through all layers; probes and heads come on top, so
                a drafter that loses by this count loses by the clock.
            saved: Passes that they saved: the drafts that full depth confirmed.
        """
        self.tally.verified += 1
        # Loses on average if spent − saved does; moved by the scale it is never below 0.
        loss = max(0.0, MOST_DRAFTS + spent - saved)
        if self._losses.tell(loss):
            lost = self._losses.mean - MOST_DRAFTS
            self._stop(
                f"drafting is slower than full depth: {lost:.2f} passes lost per verification, "
                f"over {self._losses.seen}"
            )

    def _stop(self, reason: str) -> None:
        if not self.tripped:
            self.tripped = reason
            self._trip(reason)
