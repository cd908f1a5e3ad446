"""Rules by distance, what is counted of a policy, and the random choice of equal shares."""

from __future__ import annotations

import numpy as np
import pytest

from offramp.agents.evaluation.statistics import Estimate
from offramp.agents.prompting.first_rules import AnybodyElse, CountedExits, far_rule
from offramp.agents.prompting.prompt_meter import Completions, Readings
from offramp.agents.prompting.prompt_report import Worth, lost_share, row_of, same_share
from offramp.controller.features import PROMPT_V1, FloatArray

LAYERS, TOKENS = 12, 600


def tokens_at(layer: int, tokens: int = TOKENS) -> FloatArray:
    """What PROMPT_V1 says of where the tokens of a prompt stand; zeros otherwise."""
    features_NF = np.zeros((tokens, PROMPT_V1.width), np.float32)
    places = np.arange(tokens)
    features_NF[:, PROMPT_V1.index("place")] = places / 256
    features_NF[:, PROMPT_V1.index("ahead")] = (tokens - 1 - places) / 256
    features_NF[:, PROMPT_V1.index("depth")] = layer / LAYERS
    return features_NF


def left_at(exits: tuple[int, ...], layer: int, far: float) -> int:
    return int(far_rule(exits, LAYERS, far).leave(tokens_at(layer)).sum())


def test_who_has_more_ahead_leaves_earlier() -> None:
    # Who has n tokens ahead stands at place 599 − n; the last token has none, and is always kept.
    assert left_at((3, 4), 3, 256) == TOKENS - 1 - 256
    assert left_at((3, 4), 4, 256) == TOKENS - 1
    assert left_at((3,), 3, 256) == TOKENS - 1 - 256
    assert left_at((2, 4, 6), 4, 256) == pytest.approx(TOKENS - 1 - 128, abs=1)
    leave_N = far_rule((3, 4), LAYERS, 256).leave(tokens_at(3))
    assert leave_N[0]
    assert not leave_N[-1]


def test_the_control_lets_as_many_go_at_each_exit_but_others() -> None:
    rule = far_rule((3, 4), LAYERS, 256)
    counted = CountedExits(rule, LAYERS, keep_first=4, keep_last=32)
    for layer in rule.exits:
        assert (counted.leave(tokens_at(layer)) == rule.leave(tokens_at(layer))).all()
    free = TOKENS - 4 - 32
    assert counted.shares[0] == pytest.approx((TOKENS - 1 - 256 - 4) / free)
    assert counted.shares[1] == 1.0
    anybody = AnybodyElse(rule.exits, counted.shares, LAYERS)
    left_N = anybody.leave(tokens_at(3))
    assert left_N.mean() == pytest.approx(counted.shares[0], abs=0.06)
    assert left_N[-100:].any()  # where nobody leaves by the rule
    assert anybody.leave(tokens_at(4)).all()


def test_rewards_and_rows_are_those_of_the_environment() -> None:
    full = Readings(losses_N=np.array([2.0, 3.0]), calls_N=np.ones(2))
    early = Readings(losses_N=np.array([2.5, 3.0]), calls_N=np.array([0.5, 0.5]))
    worth = Worth(full, weight=0.5, fill=0.1)
    assert worth.saved_N(early).tolist() == [0.45, 0.45]
    assert worth.rewards_N(early) == pytest.approx([(-0.5 + 0.225) / 1.5, 0.225 / 1.5])
    row = row_of("full depth", full, early, worth)
    assert row.loss_more == Estimate(0.0, 0.0, 0.0)
    assert row.learned_ahead.value == pytest.approx(worth.rewards_N(early).mean())
    assert row.learned_ahead.low < row.learned_ahead.value < row.learned_ahead.high


def test_lines_are_compared_with_full_depths() -> None:
    full = Completions(["a", "b"], np.array([1.0, 0.5]))
    other = Completions(["a", "c"], np.array([1.0, 0.2]))
    lost = lost_share(other, full)
    assert lost is not None
    assert lost.value == pytest.approx(0.3 / 1.5)
    assert same_share(other, full) == 0.5
    assert lost_share(other, Completions(["", ""], np.zeros(2))) is None
