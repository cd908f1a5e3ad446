"""From trained contenders to the one that is published: choose on validation, report on test.

Shape suffixes: C policies, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from offramp.agents.evaluation.energy_ratios import Energy, energy_of, metered
from offramp.agents.evaluation.matched import (
    TARGETS,
    MatchedRow,
    choose,
    matched_row,
    typical_ratio,
)
from offramp.agents.evaluation.measure import (
    HeldOut,
    Pair,
    Protocol,
    Split,
    held_out,
    measure_quality,
    measure_time,
)
from offramp.agents.evaluation.rows import Clock, EvaluationRow, Measured, evaluation_row
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY, Metric
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.training.families import is_learned
from offramp.controller.errors import ConfigError
from offramp.worker.energy import open_meter
from offramp.worker.engine.engine import AdaptiveEngine

OnRun = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssessConfig:
    """How to evaluate.

    Attributes:
        model: Folder of the model.
        corpus: Folder of documents; None takes the interpreter's standard library.
        corpus_limit: As in recording, so that the splits are cut from the same documents.
        validation_documents: Documents the choice is made on.
        test_documents: Documents the report is made on.
        timed_documents: Of the documents of either split, how many are timed and metered.
        protocol: What is measured on each document.
        target_agreement: Least on-policy agreement with full depth of what is published.
        target_edit_loss: Instead, the share of line-completion edit similarity that it may lose.
        threads: Torch threads.
        seed: Of the bootstrap.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What was found.

    Attributes:
        validation: Rows the choice was made on.
        test: Rows of every contender, full depth first.
        matched: Each family at each target loss.
        chosen: Index into the contenders.
        reason: Why, in words.
        measured: The test measurements behind the rows.
        documents: Validation and test documents measured.
        energy: What every contender but full depth takes on the timed test documents.
    """

    validation: list[EvaluationRow]
    test: list[EvaluationRow]
    matched: list[MatchedRow]
    chosen: int
    reason: str
    measured: list[Measured]
    documents: tuple[int, int]
    energy: Energy


def assess(
    config: AssessConfig,
    engine: AdaptiveEngine,
    contenders: Sequence[Contender],
    on_run: OnRun = lambda *_: None,
) -> Assessment:
    """Choose among the learned contenders on validation documents, then report all on test ones.

    Args:
        config: How to evaluate.
        engine: Idle, on the machine whose times count.
        contenders: Full depth first.
        on_run: Told (split, runs done, runs in all).

    Raises:
        TraceError: a split has fewer than two documents that are long enough.
        ConfigError: full depth does not come first, or the model gives no finite probabilities.
    """
    if not contenders or contenders[0].setting is not None:
        raise ConfigError("policies", "do not begin with full depth", "Run `offramp train` again")
    require_learned(each.family for each in contenders)
    torch.set_num_threads(config.threads)
    corpus = load_corpus(config.corpus, limit=config.corpus_limit)
    splits = {
        "validation": config.validation_documents,
        "test": config.test_documents,
    }
    documents = {
        split: held_out(config.model, corpus, split, count, config.protocol, engine.tokenizer)
        for split, count in splits.items()
    }
    validation, test = (
        _measure(config, engine, contenders, documents[split], split, on_run) for split in splits
    )
    chosen, reason = publishable(validation, *config.goal)
    tokens = config.protocol.timed_tokens
    return Assessment(
        validation=[evaluation_row(each, tokens, config.seed) for each in validation],
        test=[evaluation_row(each, tokens, config.seed) for each in test],
        matched=savings(validation, test, config.seed),
        chosen=chosen,
        reason=reason,
        measured=test,
        documents=(len(documents["validation"]), len(documents["test"])),
        energy=energy_of([each.energy for each in test[1:] if each.energy], tokens, config.seed),
    )


def require_learned(families: Iterable[str]) -> None:
    """Refuse to choose where nothing was learned.

    Raises:
        ConfigError: no family is of those that learn.
    """
    if not any(map(is_learned, families)):
        raise ConfigError("policies", "hold none that was learned", "Run `offramp train` again")


def publishable(
    measured: Sequence[Measured], metric: Metric, target_loss: float
) -> tuple[int, str]:
    """Index of the fastest learned policy that keeps the target; of the best one if none does."""
    full = metric.of([measured[0].scores])
    losses = {
        index: metric.loss(metric.of([each.scores]), full)
        for index, each in enumerate(measured)
        if is_learned(each.contender.family)
    }
    require_learned(measured[index].contender.family for index in losses)
    keeping = [index for index, loss in losses.items() if loss <= target_loss]
    best = min(
        keeping or losses, key=lambda i: typical_ratio(measured[i]) if keeping else losses[i]
    )
    name, loss = measured[best].contender.name, losses[best]
    if not keeping:
        return best, (
            f"no learned policy kept {metric.label} within {target_loss:.3f} of full depth on "
            f"validation; {name} came closest, with a loss of {loss:.3f}"
        )
    return best, (
        f"{name} is the fastest of {len(keeping)} learned policies that kept {metric.label} within "
        f"{target_loss:.3f} of full depth on validation (loss {loss:.3f}), at "
        f"{typical_ratio(measured[best]):.3f} of its time there"
    )


def savings(
    validation: Sequence[Measured], test: Sequence[Measured], seed: int = 0
) -> list[MatchedRow]:
    """Every family at every target loss, by agreement and, where lines were completed, by them."""
    metrics = [m for m in (AGREEMENT, EDIT_SIMILARITY) if m.is_measured(test[0].scores)]
    rows = []
    for metric in metrics:
        for target in TARGETS:
            for family, picks in choose(validation, metric, target).items():
                runs = [test[index] for index in picks]
                rows.append(matched_row(family, runs, test[0], metric, target, seed))
    return rows


def _measure(
    config: AssessConfig,
    engine: AdaptiveEngine,
    contenders: Sequence[Contender],
    documents: Sequence[HeldOut],
    split: str,
    on_run: OnRun,
) -> list[Measured]:
    timed = documents[: config.timed_documents]
    total = len(contenders) + len(timed)
    reference = Split.of(engine, documents, config.protocol)
    measured = []
    for number, each in enumerate(contenders, 1):
        scores = measure_quality(engine, each.policy, reference, config.protocol, each.name)
        measured.append(Measured(each, None, scores))
        on_run(split, number, total)
    policies = [each.policy for each in contenders[1:]]
    pairs_CD = measure_time(
        engine,
        policies,
        timed,
        config.protocol,
        open_meter(engine),
        lambda done, _: on_run(split, len(contenders) + done, total),
    )
    taken = zip(measured, _clocks(pairs_CD), metered(pairs_CD), strict=True)
    return [replace(each, clock=clock, energy=energy) for each, clock, energy in taken]


def _clocks(pairs_CD: Sequence[Sequence[Pair]]) -> list[Clock]:
    """Full depth's seconds, then each policy's."""
    both_CD2 = np.asarray([[pair.seconds for pair in pairs] for pairs in pairs_CD])
    full_D = both_CD2[:, :, 1].mean(0)
    return [Clock(full_D, full_D), *(Clock(each[:, 0], each[:, 1]) for each in both_CD2)]
