"""The evaluation protocol: measure on validation documents, choose, and report on test documents.

`offramp evaluate` runs it plainly (``assess``). A tournament over many seeds hands in a
``Measurer`` of its own, which scores in several processes and keeps what it measured.

Shape suffixes: C policies, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offramp.agents.evaluation.energy_ratios import Metered, metered
from offramp.agents.evaluation.evaluation_rows import Measured
from offramp.agents.evaluation.matched import AllPicks, MatchedRow, choose_all, matched_rows, needed
from offramp.agents.evaluation.measure import (
    HeldOut,
    Pair,
    PairedCosts,
    Protocol,
    Split,
    held_out,
    measure_quality,
    paired_costs,
    timed_document,
)
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY, Metric, Scores
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import Policy
from offramp.worker.energy import Meter, open_meter
from offramp.worker.engine.engine import AdaptiveEngine

OnRun = Callable[[str, int, int], None]
"""Told (what is going on, runs done, runs in all)."""

Taken = tuple[PairedCosts | None, Metered | None]
"""Seconds and joules of a policy; None where nobody wants to know them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessConfig:
    """How to evaluate.

    Attributes:
        model: Folder of the model.
        corpus: Folder of documents; None takes the interpreter's standard library.
        corpus_limit: Documents taken from the corpus, as many as in recording, so that the splits
            are cut from the same ones.
        validation_documents: Documents the choice is made on.
        test_documents: Documents the report is made on.
        timed_documents: How many documents of either split are timed and metered.
        protocol: What is measured on each document.
        target_agreement: Least on-policy agreement with full depth of what is published.
        target_edit_loss: The share of line-completion edit similarity that it may lose, instead.
        threads: Torch threads of this process.
        seed: Seeds the bootstrap.
    """

    model: str
    corpus: Path | None = None
    corpus_limit: int | None = 320
    validation_documents: int = 16
    test_documents: int = 24
    timed_documents: int = 12
    protocol: Protocol = field(default_factory=Protocol)
    target_agreement: float = 0.93
    target_edit_loss: float | None = None
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("validation_documents", 2),
            ("test_documents", 2),
            ("timed_documents", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(name, f"{getattr(self, name)} is below {least}")
        if not 0 < self.target_agreement <= 1:
            raise ConfigError("target_agreement", f"{self.target_agreement} is not in (0, 1]")
        loss = self.target_edit_loss
        if loss is not None and not 0 <= loss < 1:
            raise ConfigError("target_edit_loss", f"{loss} is not in [0, 1)")
        if loss is not None and self.protocol.lines == 0:
            raise ConfigError("lines", "0 leaves no edit similarity to choose by", "Use 1 or more")

    @property
    def goal(self) -> tuple[Metric, float]:
        """What may be lost, and how much of it."""
        if self.target_edit_loss is None:
            return AGREEMENT, 1 - self.target_agreement
        return EDIT_SIMILARITY, self.target_edit_loss


@dataclass(frozen=True, slots=True)
class Entrant:
    """A policy that is measured.

    Attributes:
        contender: The policy with its family and setting.
        seed: The seed it was trained with; None for rules.
        certified: Whether its bundle carries a certificate.
        folder: Folder of its bundle; None where it was not read from one.
    """

    contender: Contender
    seed: int | None = None
    certified: bool = False
    folder: Path | None = None


class Measurer:
    """Scores and times policies in this process, one after the other.

    Subclasses may score elsewhere, or remember; what is measured stays the same.

    Args:
        config: The documents of each split, and what is measured on them.
        engine: Idle, on the machine whose times count.
        on_run: Told how far each phase is.

    Raises:
        TraceError: a split has fewer than two documents that are long enough.
    """

    def __init__(
        self, config: AssessConfig, engine: AdaptiveEngine, on_run: OnRun = lambda *_: None
    ) -> None:
        self.config, self.engine, self.on_run = config, engine, on_run
        corpus = load_corpus(config.corpus, limit=config.corpus_limit)
        counts = {"validation": config.validation_documents, "test": config.test_documents}
        # Both before anything is measured: too short a split fails at once, not after an hour.
        self.documents: dict[str, list[HeldOut]] = {
            split: held_out(config.model, corpus, split, count, config.protocol, engine.tokenizer)
            for split, count in counts.items()
        }
        self._splits: dict[str, Split] = {}

    def split(self, name: str) -> Split:
        """A split's documents with full depth's tokens, which are decoded once."""
        if name not in self._splits:
            decoded = Split.of(self.engine, self.documents[name], self.config.protocol)
            self._splits[name] = decoded
        return self._splits[name]

    def measure(self, split: str, entrants: Sequence[Entrant]) -> list[Measured]:
        """Everything that is reported of entrants, full depth first, on a split's documents."""
        scores = self.scores(split, entrants)
        taken = self.times(split, entrants, scores)
        return [
            Measured(each.contender, each.seed, mine, seconds, each.certified, joules)
            for each, mine, (seconds, joules) in zip(entrants, scores, taken, strict=True)
        ]

    def score(self, split: str, policy: Policy, name: str) -> Scores:
        """What the output of a policy is worth on each document.

        Raises:
            ConfigError: a probability was not finite; the name says whose.
        """
        return measure_quality(self.engine, policy, self.split(split), self.config.protocol, name)

    def scores(self, split: str, entrants: Sequence[Entrant]) -> list[Scores]:
        """What the output of each entrant is worth."""
        found = []
        for number, each in enumerate(entrants, 1):
            found.append(self.score(split, each.contender.policy, each.contender.name))
            self.on_run(f"{split}: quality", number, len(entrants))
        return found

    def times(
        self, split: str, entrants: Sequence[Entrant], scores: Sequence[Scores]
    ) -> list[Taken]:
        """What each entrant, of such scores, takes on the timed documents; full depth first."""
        documents = self.documents[split][: self.config.timed_documents]
        meter, pairs_CD = open_meter(self.engine), [list[Pair]() for _ in entrants[1:]]
        for index in range(len(documents)):
            found = self.pairs(split, index, entrants[1:], meter)
            for pairs_D, pair in zip(pairs_CD, found, strict=True):
                pairs_D.append(pair)
            self.on_run(f"{split}: time", index + 1, len(documents))
        seconds = paired_costs([[pair.seconds for pair in pairs] for pairs in pairs_CD])
        return list(zip(seconds, metered(pairs_CD), strict=True))

    def pairs(
        self, split: str, index: int, entrants: Sequence[Entrant], meter: Meter
    ) -> list[Pair]:
        """What every entrant takes on a document, and full depth beside it."""
        policies = [each.contender.policy for each in entrants]
        document = self.documents[split][index]
        found = timed_document(self.engine, policies, document, self.config.protocol, index, meter)
        return [pair for _, pair in sorted(found, key=lambda each: each[0])]


@dataclass(frozen=True, slots=True)
class Findings:
    """What an evaluation found.

    Attributes:
        validation: Every entrant on validation documents, full depth first.
        test: Entrants reported on test documents, by their place in ``validation``.
        picks: What each family's choice was, for every metric and target loss.
        matched: What the picks are worth on test documents.
    """

    validation: list[Measured]
    test: dict[int, Measured]
    picks: AllPicks
    matched: list[MatchedRow]


def evaluate(measurer: Measurer, entrants: Sequence[Entrant], *, report_all: bool) -> Findings:
    """Measure all on validation documents, choose, and report on test documents.

    Args:
        measurer: Scores and times the entrants.
        entrants: The policies, full depth first.
        report_all: Whether all are measured on test documents, or only those that were picked.
    """
    validation = measurer.measure("validation", entrants)
    picks = choose_all(validation)
    # Test documents say nothing before here: whatever was chosen is chosen.
    indices = list(range(len(entrants))) if report_all else needed(picks)
    measured = measurer.measure("test", [entrants[index] for index in indices])
    test = dict(zip(indices, measured, strict=True))
    matched = matched_rows(picks, test, measurer.config.seed)
    return Findings(validation, test, picks, matched)
