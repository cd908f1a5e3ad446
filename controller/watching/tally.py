"""Counts what the requests of a release did on a worker; the publisher adds them up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from offramp.controller.errors import PolicyRefusedError
from offramp.controller.policies.exits import parse_exit
from offramp.controller.strict import COUNT, TEXT, Check, check_fields, is_count, is_number, list_of
from offramp.controller.watching.quantiles import BUCKETS

MOST_DEPTHS = 512
"""Depths that an acknowledgement counts tokens by, at most; models have fewer layers."""

SEVERAL = "several meters"
"""Stands for the meter of tallies that were read by different ones, which are never added up."""

_SUM: Check = (lambda value: is_number(value) and 0 <= value < 2**53, "a number in [0, 2⁵³)")


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts of one release, since the worker took the head that it is part of.

    Attributes:
        generation: The release's number.
        tokens: Tokens decoded, but for the first of each request, which its prompt made.
        seconds: Time that their requests waited for them, seconds.
        layers: Layers executed for them, deferred ones and rejected drafts included.
        failures: Failures of the policy, such as scores that are not finite.
        audited: Early tokens that full depth was asked about.
        disagreed: Those that full depth would not have emitted.
        verified: Passes at full depth that judged drafts.
        early: Tokens that left early, or were drafted.
        requests: Requests that ended, and had more than one token.
        paces, paces_squared: Sum over them of seconds per token, and of its square.
        depths, depths_squared: Sum over them of layers executed per token, and of its square.
        firsts: Requests by how long their first token took, in the buckets of ``quantiles``.
        gaps: Events of later tokens by how long after those before they came, likewise.
        exits: Tokens by the layers executed before they came out or were drafted, those of a copy
            as ``parse_exit`` reads them: {"6": 31, "12": 9}.
        meter: Says by which method and source energy was read; "" if it was not.
        batches: Batches of ``BATCH_TOKENS`` tokens whose energy was read.
        joules, joules_squared: Sum over them of joules per token, and of its square.
        points: Certified settings that the worker moves among; 0: it does not move.
        point: The one that new requests run at, from 1, the safest, on.
        moves: How often that changed.
    """

    generation: int = 0
    tokens: int = 0
    seconds: float = 0.0
    layers: int = 0
    failures: int = 0
    audited: int = 0
    disagreed: int = 0
    verified: int = 0
    early: int = 0
    requests: int = 0
    paces: float = 0.0
    paces_squared: float = 0.0
    depths: float = 0.0
    depths_squared: float = 0.0
    firsts: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    gaps: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    exits: dict[str, int] = field(default_factory=dict)
    meter: str = ""
    batches: int = 0
    joules: float = 0.0
    joules_squared: float = 0.0
    points: int = 0
    point: int = 0
    moves: int = 0

    def note_exit(self, executed: int) -> None:
        """A token came out, or was drafted, after so many layers."""
        name = str(executed)
        self.exits[name] = self.exits.get(name, 0) + 1

    def note_energy(self, meter: str, joules: float, tokens: int) -> None:
        """A batch of tokens took so much, by this meter."""
        self.meter = meter
        self.batches += 1
        self.joules += joules / tokens
        self.joules_squared += (joules / tokens) ** 2

    def note_request(self, seconds: float, tokens: int, layers: int) -> None:
        """A request ended, whose later tokens took so long and so many layers."""
        pace, depth = seconds / tokens, layers / tokens
        self.requests += 1
        self.paces += pace
        self.paces_squared += pace * pace
        self.depths += depth
        self.depths_squared += depth * depth

    def copy(self) -> Tally:
        """The same counts, which go on no more."""
        return replace(
            self, firsts=self.firsts.copy(), gaps=self.gaps.copy(), exits=self.exits.copy()
        )

    @property
    def speed(self) -> float:
        """Tokens per second of a request; 0 if there are none yet."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def depth(self) -> float:
        """Layers executed per token; 0 if there are none yet."""
        return self.layers / self.tokens if self.tokens else 0.0

    @property
    def token_j(self) -> float | None:
        """Joules per token; None where no energy was read, or by different meters."""
        return self.joules / self.batches if self.batches and self.meter != SEVERAL else None

    @property
    def is_lossless(self) -> bool:
        """Whether full depth judged every draft, so that no output could differ."""
        return self.verified > 0 and self.audited == 0

    @property
    def is_full_depth(self) -> bool:
        """Whether no token left early, so that no output could differ."""
        return self.tokens > 0 and self.early == self.audited == 0


_TIMES = ("firsts", "gaps")
_EXTREMES: dict[str, Any] = {"points": max, "point": min}
"""What is not added up over workers: the safest point that one stands at is told."""

_SUMS = (
    "seconds", "paces", "paces_squared", "depths", "depths_squared", "joules", "joules_squared",
)  # fmt: skip
_COUNTS: Check = (
    lambda value: list_of(COUNT)[0](value) and len(value) == BUCKETS,
    f"a list of {BUCKETS} integers from 0 on",
)


def _are_exits(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > MOST_DEPTHS:
        return False
    try:
        return all(str(parse_exit(name)) == name and is_count(n) for name, n in value.items())
    except ValueError:
        return False


_FIELDS: dict[str, Check] = (
    {each.name: COUNT for each in fields(Tally)}
    | dict.fromkeys(_SUMS, _SUM)
    | dict.fromkeys(_TIMES, _COUNTS)
    | {"exits": (_are_exits, "an object of numbers of tokens by exit"), "meter": TEXT}
)
_OPTIONAL = (
    "early", "requests", *_SUMS[1:], *_TIMES, "exits", "meter", "batches", "points", "point",
    "moves",
)  # fmt: skip
"""What workers of before did not count: for them, all tokens may have left early."""


def add_up(generation: int, tallies: Iterable[Tally]) -> Tally:
    """One tally of all that are of a release."""
    mine = [each for each in tallies if each.generation == generation]
    names = [each.name for each in fields(Tally) if each.name != "generation"]
    sums: dict[str, Any] = {}
    for name in names:
        values = [getattr(each, name) for each in mine]
        if name in _TIMES:
            sums[name] = [sum(column) for column in zip(*values, [0] * BUCKETS, strict=True)]
        elif name == "exits":
            sums[name] = dict(sum(map(Counter, values), Counter()))
        elif name in _EXTREMES:
            sums[name] = _EXTREMES[name](values, default=0)
        elif name == "meter":
            meters = {each for each in values if each}
            sums[name] = SEVERAL if len(meters) > 1 else "".join(meters)
        else:
            sums[name] = sum(values)
    return Tally(generation=generation, **sums)


def tallies_to_json(tallies: Iterable[Tally]) -> str:
    """Tallies as an acknowledgement carries them."""
    return json.dumps([asdict(each) for each in tallies])


def tallies_from_json(text: str) -> tuple[Tally, ...]:
    """Read what ``tallies_to_json`` wrote.

    Raises:
        ValueError: it is something else.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"lists within lists: {text[:80]}") from error
    if not isinstance(values, list) or not all(isinstance(each, dict) for each in values):
        raise ValueError(f"no list of tallies: {text[:80]}")
    try:
        for each in values:
            check_fields(each, _FIELDS, optional=_OPTIONAL)
    except PolicyRefusedError as error:
        raise ValueError(str(error)) from error
    return tuple(Tally(**{"early": each["tokens"], **each}) for each in values)
