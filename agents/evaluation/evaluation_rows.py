"""What was measured of one policy, and the row that an evaluation reports of it.

Shape suffixes: S seeds, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.agents.evaluation.energy_ratios import Metered
from offramp.agents.evaluation.measure import PairedCosts
from offramp.agents.evaluation.scores import (
    ACCURACY,
    AGREEMENT,
    EDIT_SIMILARITY,
    EXACT_MATCH,
    PERPLEXITY,
    Scores,
)
from offramp.agents.evaluation.statistics import Estimate, Floats, Resample, ratio
from offramp.agents.placing.contenders import Contender


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy on the documents of one split.

    Attributes:
        contender: The policy with its family and setting.
        seed: The seed it was trained with; None for rules.
        scores: What its output was worth.
        clock: How long it took; None where time was not measured.
        certified: Whether its bundle carries a certificate.
        energy: Its joules, and how they were obtained; None where nobody asked.
    """

    contender: Contender
    seed: int | None
    scores: Scores
    clock: PairedCosts | None = None
    certified: bool = False
    energy: Metered | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeAndEnergy:
    """What a row says of time and energy, per token, over KV-cached full depth's.

    Attributes:
        wall_ratio: Wall time, measured interleaved; below 1 is a saving. None where only quality
            was measured.
        wall_ratio_low, wall_ratio_high: Its 95 % interval over seeds and documents.
        energy_ratio: Joules, metered in the timed runs; None where they are unknown.
        energy_ratio_low, energy_ratio_high: Its 95 % interval, likewise.
        energy_method: How the joules were obtained, or "unavailable"; None where nobody asked.
    """

    wall_ratio: float | None
    wall_ratio_low: float | None
    wall_ratio_high: float | None
    energy_ratio: float | None = None
    energy_ratio_low: float | None = None
    energy_ratio_high: float | None = None
    energy_method: str | None = None

    @property
    def wall(self) -> Estimate | None:
        """The ratio of wall times, with its interval."""
        return _estimate(self.wall_ratio, self.wall_ratio_low, self.wall_ratio_high)

    @property
    def energy(self) -> Estimate | None:
        """The ratio of joules, with its interval."""
        return _estimate(self.energy_ratio, self.energy_ratio_low, self.energy_ratio_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow(TimeAndEnergy):
    """One contender, measured on-policy. Intervals are 95 % by paired document bootstrap.

    Attributes:
        policy: Name with its operating point.
        family: What kind of rule or agent it is.
        setting: Threshold, preference or layer; None for full depth.
        agreement: Share of tokens equal to those of full depth, same history.
        agreement_low, agreement_high: The interval of the agreement.
        accuracy: Share of tokens equal to the document's.
        mean_layers: Mean layers executed per token.
        us_per_token: Microseconds per token at batch 1.
        offline_agreement: The agreement that replaying traces had promised.
        tokens: Tokens that quality was measured on.
        exits: Layers at which the policy is asked.
        depths: How many tokens left after each layer, by layer.
        perplexity: Perplexity of the documents' tokens, each at the layer it left from.
        edit_similarity, edit_similarity_low, edit_similarity_high: That of completed lines, in
            0 … 1; None where no line was completed.
        exact_match: Share of completed lines that match the document's.
        lines: How many lines were completed.
        seed: The seed it was trained with; None for rules.
    """

    policy: str
    family: str
    setting: float | None
    agreement: float
    agreement_low: float
    agreement_high: float
    accuracy: float
    mean_layers: float
    us_per_token: float | None
    offline_agreement: float | None
    tokens: int
    exits: tuple[int, ...]
    depths: dict[int, int]
    perplexity: float | None = None
    edit_similarity: float | None = None
    edit_similarity_low: float | None = None
    edit_similarity_high: float | None = None
    exact_match: float | None = None
    lines: int = 0
    seed: int | None = None


def evaluation_row(measured: Measured, timed_tokens: int, seed: int = 0) -> EvaluationRow:
    """The row that reports one policy, of whose documents so many tokens each were timed."""
    contender, scores, clock = measured.contender, measured.scores, measured.clock
    draws = Resample.draw(1, len(scores.tokens_D), seed)
    has_lines = EDIT_SIMILARITY.is_measured(scores)
    edit = EDIT_SIMILARITY.estimate([scores], draws) if has_lines else None
    return EvaluationRow(
        policy=contender.name,
        family=contender.family,
        setting=contender.setting,
        **with_bounds("agreement", AGREEMENT.estimate([scores], draws)),
        accuracy=ACCURACY.of([scores]),
        mean_layers=scores.mean_layers,
        us_per_token=1e6 * float(clock.mine_D.mean()) / timed_tokens if clock else None,
        offline_agreement=contender.offline_agreement,
        tokens=int(scores.tokens_D.sum()),
        exits=tuple(contender.policy.exits),
        depths=scores.depths,
        perplexity=PERPLEXITY.of([scores]),
        **with_bounds("edit_similarity", edit),
        exact_match=EXACT_MATCH.of([scores]) if has_lines else None,
        lines=int(scores.lines_D.sum()),
        seed=measured.seed,
        **time_and_energy([measured], seed),
    )


def with_bounds(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """The three fields of a row that hold an estimate: ``name``, ``name_low``, ``name_high``."""
    fields = (name, f"{name}_low", f"{name}_high")
    if estimate is None:
        return dict.fromkeys(fields)
    return dict(zip(fields, (estimate.value, estimate.low, estimate.high), strict=True))


def _estimate(value: float | None, low: float | None, high: float | None) -> Estimate | None:
    if value is None or low is None or high is None:
        return None
    return Estimate(value, low, high)


def time_and_energy(runs: Sequence[Measured], seed: int) -> dict[str, Any]:
    """The fields of ``TimeAndEnergy`` for the mean over some runs."""
    return {
        **with_bounds("wall_ratio", wall_ratio(runs, seed)),
        **with_bounds("energy_ratio", energy_ratio(runs, seed)),
        "energy_method": runs[0].energy.method.value if runs[0].energy else None,
    }


def wall_ratio(runs: Sequence[Measured], seed: int = 0) -> Estimate | None:
    """Wall time over full depth's: the mean over runs, its interval over runs and documents."""
    return _over_full((run.clock for run in runs), seed)


def energy_ratio(runs: Sequence[Measured], seed: int = 0) -> Estimate | None:
    """Joules over full depth's, likewise; None where those of some run are unknown."""
    return _over_full((run.energy.joules if run.energy else None for run in runs), seed)


def _over_full(sides: Iterable[tuple[Floats, Floats] | None], seed: int) -> Estimate | None:
    known = []
    for each in sides:
        # A mean over the known ones alone would compare other seeds than its neighbours do.
        if each is None:
            return None
        known.append(each)
    mine_SD, full_SD = (np.stack(side) for side in zip(*known, strict=True))
    return ratio(mine_SD, full_SD, Resample.draw(len(known), mine_SD.shape[1], seed))
