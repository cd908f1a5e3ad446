"""From trained contenders to the one that is published: choose on validation, report on test."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from offramp.agents.evaluation.archive import Archive, KeepingMeasurer
from offramp.agents.evaluation.energy_ratios import Energy, energy_of
from offramp.agents.evaluation.evaluation_rows import EvaluationRow, Measured, evaluation_row
from offramp.agents.evaluation.matched import MatchedRow, typical_ratio
from offramp.agents.evaluation.protocol import AssessConfig, Entrant, Measurer, OnRun, evaluate
from offramp.agents.evaluation.scores import Metric
from offramp.agents.placing.contenders import Contender
from offramp.agents.training.families import is_learned
from offramp.controller.errors import ConfigError
from offramp.worker.engine.engine import AdaptiveEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """What was found.

    Attributes:
        validation: Rows the choice was made on.
        test: Rows of every contender, full depth first.
        matched: Each family at each target loss.
        chosen: Index of what to publish among the contenders.
        reason: Why that one, in words.
        measured: The test measurements behind the rows.
        documents: How many validation and test documents were measured.
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
    archive: Archive | None = None,
) -> Assessment:
    """Choose among the learned contenders on validation documents, then report all on test ones.

    Args:
        config: Documents, and what is measured on them.
        engine: Idle, on the machine whose times count.
        contenders: The policies, full depth first.
        on_run: Told how far each phase is.
        archive: Keeps what is measured, of these settings and contenders; None keeps nothing.

    Raises:
        TraceError: a split has fewer than two documents that are long enough.
        ConfigError: full depth does not come first, or the model gives no finite probabilities.
    """
    if not contenders or contenders[0].setting is not None:
        raise ConfigError("policies", "do not begin with full depth", "Run `offramp train` again")
    require_learned(each.family for each in contenders)
    torch.set_num_threads(config.threads)
    measurer = (
        Measurer(config, engine, on_run)
        if archive is None
        else KeepingMeasurer(config, engine, archive, on_run)
    )
    found = evaluate(measurer, [Entrant(each) for each in contenders], report_all=True)
    chosen, reason = publishable(found.validation, *config.goal)
    test, tokens = list(found.test.values()), config.protocol.timed_tokens
    validation, reported = (
        [evaluation_row(each, tokens, config.seed) for each in measured]
        for measured in (found.validation, test)
    )
    return Assessment(
        validation=validation,
        test=reported,
        matched=found.matched,
        chosen=chosen,
        reason=reason,
        measured=test,
        documents=(len(measurer.documents["validation"]), len(measurer.documents["test"])),
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
