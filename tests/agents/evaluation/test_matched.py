"""Savings at matched quality: chosen on validation alone, compared by document, by seed."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.agents.evaluation.evaluation_rows import Measured, wall_ratio
from offramp.agents.evaluation.matched import choose, matched_row, needed
from offramp.agents.evaluation.page import frontier_volume
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY, PERPLEXITY
from offramp.agents.evaluation.statistics import Resample
from support.measured import DOCUMENTS, FULL, measured


def test_each_seed_picks_its_fastest_point_within_the_target() -> None:
    rows = [
        FULL,
        measured("p̂", 0.005, 0.9, seed=0),
        measured("p̂", 0.03, 0.6, seed=0),
        measured("p̂", 0.015, 0.8, seed=1),
        measured("p̂", 0.005, 0.85, seed=1),
        measured("CALM", 0.2, 0.3),
        measured("DeeBERT", 0.0, 1.3),
    ]
    assert choose(rows, AGREEMENT, 0.01) == {"p̂": (1, 4), "CALM": (0,), "DeeBERT": (0,)}
    assert choose(rows, AGREEMENT, 0.02) == {"p̂": (1, 3), "CALM": (0,), "DeeBERT": (0,)}
    assert choose(rows, EDIT_SIMILARITY, 0.5)["CALM"] == (5,)
    picks = {("agreement", t): choose(rows, AGREEMENT, t) for t in (0.01, 0.02)}
    assert needed(picks) == [0, 1, 3, 4]


def test_a_matched_row_is_the_mean_over_seeds() -> None:
    runs = [measured("p̂", 0.01, 0.8, seed=0), measured("p̂", 0.03, 0.6, seed=1)]
    row = matched_row("p̂", runs, FULL, AGREEMENT, 0.02)
    assert row.quality == pytest.approx(0.98)
    assert row.quality_full == 1
    assert row.loss == pytest.approx(0.02)
    assert row.wall_ratio == pytest.approx(0.7)
    assert row.wall_ratio_low == pytest.approx(0.6)
    assert row.wall_ratio_high == pytest.approx(0.8)
    assert row.agreement_offline == pytest.approx(0.99)
    assert row.agreement_online == pytest.approx(0.98)
    assert row.mean_layers == pytest.approx(7.5)
    assert row.seeds == 2
    assert not row.certified


def test_a_family_that_fell_back_to_full_depth_promises_nothing() -> None:
    row = matched_row("CALM", [FULL], FULL, AGREEMENT, 0.01)
    assert row.wall_ratio == row.wall_ratio_low == row.wall_ratio_high == 1
    assert row.agreement_offline is None
    assert row.loss == 0


def test_losses_are_relative_and_perplexity_rises() -> None:
    worse = measured("p̂", 0.1, 0.5)
    draws = Resample.draw(1, DOCUMENTS)
    for metric in (AGREEMENT, EDIT_SIMILARITY):
        loss = metric.estimate_loss([worse.scores], FULL.scores, draws)
        # The same share in every document: nothing for the interval to vary.
        assert (loss.value, loss.low, loss.high) == pytest.approx((0.1, 0.1, 0.1))
    rise = PERPLEXITY.estimate_loss([worse.scores], FULL.scores, draws)
    assert rise.value == pytest.approx(np.exp(0.1) - 1)


def test_time_is_missing_where_any_run_was_not_timed() -> None:
    untimed = Measured(FULL.contender, None, FULL.scores)
    assert wall_ratio([FULL, untimed]) is None


def test_the_frontiers_volume_counts_only_timed_documents() -> None:
    points = [measured("p̂", 0.05, 0.5, timed=3)]
    found = frontier_volume(points, FULL, AGREEMENT)
    assert found.value == pytest.approx(0.5 * 0.05 / 0.1)
    assert found.low == pytest.approx(found.high)
