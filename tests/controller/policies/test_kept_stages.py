"""Shares that are kept. Shape suffixes: N rows, F features, E exits, Q quantiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from offramp.controller.errors import RequestError
from offramp.controller.features import OUTLOOK_V1, SOFTMAX_V2, FloatArray
from offramp.controller.policies.rules.kept_stages import KeptStages

SHARES = (0.3, 0.6)
TOP1 = SOFTMAX_V2.index("top1")


def make_kept(**options: object) -> KeptStages:
    given = {
        "exits": (2, 4),
        "schema": SOFTMAX_V2,
        "column": "top1",
        "shares": SHARES,
        "scores_EQ": np.tile(np.linspace(0, 1, 11), (2, 1)),
    }
    return KeptStages(**(given | options))  # type: ignore[arg-type]


def stream(
    policy: KeptStages, draw: Callable[[int], FloatArray], rows: int, batches: int
) -> list[tuple[int, int]]:
    """Rows that were asked, and that left, at each exit, of batches whose scores are drawn."""
    counts = [[0, 0] for _ in SHARES]
    for number in range(batches):
        features_NF = np.zeros((rows, SOFTMAX_V2.width), np.float32)
        features_NF[:, TOP1] = draw(number)
        policy.start(np.zeros((rows, OUTLOOK_V1.width), np.float32))
        for here in range(len(SHARES)):
            next_N = policy.route(here, features_NF, np.zeros((len(features_NF), 0), np.float32))
            counts[here][0] += len(features_NF)
            counts[here][1] += int((next_N == here).sum())
            features_NF = features_NF[next_N != here]
    return [(asked, left) for asked, left in counts]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("kind", ["as fitted", "surer", "sure or not in turns", "all alike"])
def test_shares_are_kept_whatever_comes(kind: str, rows: int) -> None:
    rng = np.random.default_rng(0)
    draws: dict[str, Callable[[int], FloatArray]] = {
        "as fitted": lambda _: rng.random(rows, np.float32),
        "surer": lambda _: rng.random(rows, np.float32) ** np.float32(0.2),
        "sure or not in turns": lambda number: np.full(rows, number // 200 % 2, np.float32),
        "all alike": lambda _: np.full(rows, 0.37, np.float32),
    }
    policy = make_kept()
    for (asked, left), share in zip(stream(policy, draws[kind], rows, 1500), SHARES, strict=True):
        assert abs(left - share * asked) <= 1 / policy.gain + rows
        assert asked > 500


def test_rewinding_brings_back_the_fitted_thresholds() -> None:
    policy = make_kept()

    def first() -> list[tuple[int, int]]:
        rng = np.random.default_rng(1)
        return stream(policy, lambda _: rng.random(16, np.float32), 16, 1)

    fresh = first()
    stream(policy, lambda _: np.ones(16, np.float32), 16, 50)
    assert first() != fresh
    policy.rewind()
    assert first() == fresh


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("shares", {"shares": (0.3,)}),
        ("shares", {"shares": (0.3, 1.2)}),
        ("scores_EQ", {"scores_EQ": np.ones((2, 1))}),
        ("scores_EQ", {"scores_EQ": np.tile([1.0, 0.0], (2, 1))}),
        ("scores_EQ", {"scores_EQ": np.ones(4)}),
        ("gain", {"gain": 0.0}),
        ("column", {"column": "mood"}),
    ],
)
def test_what_is_no_share_or_quantile_is_refused_by_name(
    field: str, options: dict[str, object]
) -> None:
    with pytest.raises(RequestError) as caught:
        make_kept(**options)
    assert caught.value.field == field
