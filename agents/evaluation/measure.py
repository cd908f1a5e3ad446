"""On-policy measurement: the exits really taken, the cache really affected, time really spent.

Shape suffixes: C contenders, D documents.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from offramp.agents.evaluation.lines import Line, complete, cut_lines, edit_similarity, exact_match
from offramp.agents.evaluation.scores import Scores, require_finite
from offramp.agents.evaluation.statistics import Floats
from offramp.agents.recording.corpus import long_documents, window
from offramp.agents.recording.documents import Document
from offramp.controller.costs.readings import EnergyReading
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.worker.decoding.sequence import Sequence as Row
from offramp.worker.energy import Meter
from offramp.worker.energy.meter import NoSource
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.engine.follow import Followed, follow

BLOCK = 6
"""Policies timed between two runs of full depth, so that both ends of a ratio are neighbours."""

TIME_ALONE = Meter(NoSource("only time was asked for"))
"""A meter that reads nothing but the clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What is measured on each document.

    Attributes:
        prompt_tokens: Tokens read at full depth before the teacher-forced ones.
        new_tokens: Tokens that are teacher-forced after them.
        lines: How many lines are completed; 0 for none.
        line_context: Tokens before a cut at most.
        line_tokens: Tokens of a completion at most.
        timed_tokens: How many of the teacher-forced tokens are timed.
    """

    prompt_tokens: int = 64
    new_tokens: int = 96
    lines: int = 4
    line_context: int = 64
    line_tokens: int = 24
    timed_tokens: int = 32

    def __post_init__(self) -> None:
        for name, least in (
            ("prompt_tokens", 1), ("new_tokens", 2), ("lines", 0), ("line_context", 1),
            ("line_tokens", 1), ("timed_tokens", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ConfigError(name, f"{getattr(self, name)} is below {least}")
        if self.timed_tokens >= self.new_tokens:
            raise ConfigError(
                "timed_tokens",
                f"{self.timed_tokens} exceed the {self.new_tokens - 1} that are decoded",
                "Time fewer, or raise new_tokens",
            )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A document that policies are measured on: a window of its tokens, and unfinished lines."""

    tokens: tuple[int, ...]
    lines: tuple[Line, ...] = ()


def held_out(
    model: str,
    documents: Sequence[Document],
    split: str,
    count: int,
    protocol: Protocol,
    tokenizer: object,
) -> list[HeldOut]:
    """The first ``count`` documents of a split that are long enough, with their lines.

    Raises:
        TraceError: fewer than two are, and an interval over documents would mean nothing.
    """
    length = protocol.prompt_tokens + protocol.new_tokens
    mine = [document for document in documents if document.split == split]
    found = long_documents(model, mine, length, count)
    if len(found) < 2:
        raise TraceError(
            "corpus",
            f"{len(found)} {split} documents have {length} tokens; intervals need 2",
            "Use more or longer documents, or ask for fewer tokens of each",
        )

    cut = functools.partial(
        cut_lines,
        tokenizer=tokenizer,
        count=protocol.lines,
        context=protocol.line_context,
        longest=protocol.line_tokens,
    )
    return [
        HeldOut(tuple(window(each, tokens, length)), tuple(cut(tokens, digest=each.digest)))
        for each, tokens in found
    ]


@dataclass(frozen=True, slots=True)
class Split:
    """Documents with full depth's own tokens, which agreement is counted against."""

    documents: Sequence[HeldOut]
    full: list[Followed]

    @classmethod
    def of(cls, engine: AdaptiveEngine, documents: Sequence[HeldOut], protocol: Protocol) -> Split:
        """Decode the documents at full depth."""
        return cls(documents, _follow(engine, documents, NeverExit(), protocol))


def measure_quality(
    engine: AdaptiveEngine, policy: Policy, split: Split, protocol: Protocol, name: str
) -> Scores:
    """Decode every document teacher-forced and complete its lines, as many at a time as fit.

    Raises:
        ConfigError: a probability was not finite under the policy of this name.
    """
    runs = _follow(engine, split.documents, policy, protocol)
    lines = [line for document in split.documents for line in document.lines]
    texts = iter(complete(engine, lines, policy, protocol.line_tokens))
    pairs = [[(next(texts), line.target) for line in doc.lines] for doc in split.documents]
    scores = Scores(
        tokens_D=_each(len(run.emitted) for run in runs),
        agreeing_D=_each(
            _matches(mine.emitted, full.emitted)
            for mine, full in zip(runs, split.full, strict=True)
        ),
        right_D=_each(_matches(run.emitted, run.expected) for run in runs),
        surprisal_D=_each(-sum(run.logprobs) for run in runs),
        lines_D=_each(len(mine) for mine in pairs),
        exact_D=_each(sum(exact_match(*pair) for pair in mine) for mine in pairs),
        similarity_D=_each(sum(edit_similarity(*pair) for pair in mine) / 100 for mine in pairs),
        depths=dict(sorted(Counter(k for run in runs for k in run.exit_layers).items())),
    )
    require_finite(scores, name)
    return scores


@dataclass(frozen=True, slots=True)
class Pair:
    """A policy's run on one document, and full depth's runs just before and after it."""

    mine: EnergyReading
    around: tuple[EnergyReading, EnergyReading]

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds of the policy, and the mean of full depth's."""
        before, after = self.around
        return self.mine.window_s, (before.window_s + after.window_s) / 2

    @property
    def joules(self) -> tuple[float, float] | None:
        """Joules, likewise; None where energy is unknown."""
        mine, before, after = (each.joules for each in (self.mine, *self.around))
        if mine is None or before is None or after is None:
            return None
        return mine, (before + after) / 2


class PairedCosts(NamedTuple):
    """What a policy took on each document, and full depth beside it: seconds or joules, [D]."""

    mine_D: Floats
    full_D: Floats


def paired_costs(both_CD: Sequence[Sequence[tuple[float, float]]]) -> list[PairedCosts]:
    """Full depth's own costs, the mean of those beside the policies, then each policy's."""
    both_CD2 = np.asarray(both_CD, np.float64)
    # Full depth ran beside every block of policies: the mean is steadier than any one of its runs.
    full_D = both_CD2[:, :, 1].mean(0)
    mine = (PairedCosts(mine_D2[:, 0], mine_D2[:, 1]) for mine_D2 in both_CD2)
    return [PairedCosts(full_D, full_D), *mine]


def timed_document(
    engine: AdaptiveEngine,
    policies: Sequence[Policy],
    document: HeldOut,
    protocol: Protocol,
    turn: int,
    meter: Meter = TIME_ALONE,
) -> Iterator[tuple[int, Pair]]:
    """Time one document at batch 1 under every policy, in an order rotated by ``turn``.

    Full depth runs before every ``BLOCK`` policies and after the last. Many short runs, because
    a disturbance of the machine should hit few of them.

    Yields:
        (index of the policy, what it and full depth took).
    """

    def run(policy: Policy) -> EnergyReading:
        return _timed(engine, policy, document, protocol, meter)

    # Rotated: which policy runs first, on whatever the last document left in the caches, changes.
    order = [(index + turn) % len(policies) for index in range(len(policies))]
    before = run(NeverExit())
    for start in range(0, len(order), BLOCK):
        block = [(index, run(policies[index])) for index in order[start : start + BLOCK]]
        after = run(NeverExit())
        for index, mine in block:
            yield index, Pair(mine, (before, after))
        before = after


def measure_time(
    engine: AdaptiveEngine,
    policies: Sequence[Policy],
    documents: Sequence[HeldOut],
    protocol: Protocol,
    meter: Meter = TIME_ALONE,
    on_run: Callable[[int, int], None] = lambda *_: None,
) -> list[list[Pair]]:
    """What every policy takes on every document at batch 1, and full depth beside it; [C][D]."""
    pairs_CD: list[list[Pair]] = [[] for _ in policies]
    for d, document in enumerate(documents):
        for c, pair in timed_document(engine, policies, document, protocol, d, meter):
            pairs_CD[c].append(pair)
        on_run(d + 1, len(documents))
    return pairs_CD


def _timed(
    engine: AdaptiveEngine, policy: Policy, document: HeldOut, protocol: Protocol, meter: Meter
) -> EnergyReading:
    """One document, teacher-forced; its prompt is read before the clock starts."""
    start = protocol.prompt_tokens
    forced = document.tokens[start : start + 1 + protocol.timed_tokens]
    engine.submit(list(document.tokens[:start]), policy=policy, forced=forced)
    finished: dict[str, Row] = {}
    # Every policy reads the prompt at full depth: timing it would pull all ratios towards 1.
    while engine.is_prefilling:
        engine.step(finished)
    with meter.measure() as span:
        while engine.load != (0, 0):
            engine.step(finished)
    return span.reading


def _follow(
    engine: AdaptiveEngine, documents: Sequence[HeldOut], policy: Policy, protocol: Protocol
) -> list[Followed]:
    tokens = [document.tokens for document in documents]
    return follow(engine, tokens, protocol.prompt_tokens, policy, with_logprobs=True)[0]


def _each(values: Iterator[float]) -> Floats:
    return np.fromiter(values, np.float64)


def _matches(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))
