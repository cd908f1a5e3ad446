"""What drafters read of states and text, in policies.

Shape suffixes: N rows, D width, R numbers of a projection.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import PolicyFaultError, PolicyRefusedError, RequestError
from offramp.controller.features import SOFTMAX_V2, FloatArray
from offramp.controller.policies.drafts import TrustedDraft
from offramp.controller.policies.drafts.draft_insight import (
    KIND_COLUMNS,
    SURE_COLUMNS,
    DraftInsight,
    inputs_of,
    kind_byte,
    kind_columns,
    pack_insight,
    unpack_insight,
)
from offramp.controller.policies.drafts.draft_trust import DraftChances
from offramp.controller.policies.drafts.leads import MOST_ODDS
from offramp.controller.policies.protocols import Seen, reads_state

WIDTH, NUMBERS = 6, 2
KINDS = np.array([kind_byte(text) for text in ("def", "\n", "   ", " x")], np.uint8)


def reading(column: int, weight: float) -> DraftInsight:
    """Insight that adds tanh of one of its inputs, times a weight."""
    inputs = SURE_COLUMNS + KIND_COLUMNS + NUMBERS
    first = np.zeros((inputs, 1), np.float32)
    first[column] = 1.0
    nothing = np.zeros(1, np.float32)
    layers = [(first, nothing), (np.full((1, 1), weight, np.float32), nothing)]
    projection_1DR = np.zeros((1, WIDTH, NUMBERS), np.float32)
    projection_1DR[0, 0, 0] = 1.0
    return DraftInsight(projection_1DR, [layers], KINDS)


def sure(top1: float, margin: float, rows: int = 1) -> FloatArray:
    row = np.zeros((rows, SOFTMAX_V2.width), np.float32)
    row[:, 0], row[:, 1] = top1, margin
    return row


def test_kinds_are_what_a_reader_would_say() -> None:
    columns = kind_columns(KINDS)
    assert columns[:, 0].tolist() == [0, 1, 0, 0]  # ends a line
    assert columns[:, 1].tolist() == [1, 0, 0, 1]  # ends in a letter
    assert columns[:, 2].tolist() == [0, 1, 1, 0]  # is blank
    assert columns[:, 3].tolist() == [0, 0, 1, 1]  # begins with a space
    np.testing.assert_allclose(columns[:, 4], [0.3, 0.1, 0.3, 0.2])


def test_the_state_and_the_token_read_move_the_odds() -> None:
    by_state = DraftChances(((0.0, 1.0),), (3,), reading(SURE_COLUMNS + KIND_COLUMNS, 3.0))
    state_ND = np.zeros((2, WIDTH), np.float32)
    state_ND[:, 0] = (5.0, -5.0)  # over their root mean square: ±√6
    shown = Seen(np.array([0, 1], np.int32), state_ND)
    odds_N = by_state.odds(0, sure(0.5, 0.0, rows=2), shown)
    np.testing.assert_allclose(odds_N, 3 * np.tanh([6**0.5, -(6**0.5)]), rtol=1e-5)
    assert by_state.odds(0, sure(0.5, 0.0)).tolist() == [0.0]  # without, the lead alone
    by_line = DraftChances(((0.0, 1.0),), (3,), reading(SURE_COLUMNS, 2.0))
    read = Seen(np.array([1, -1], np.int32), state_ND)  # a line's end, and one that is unknown
    np.testing.assert_allclose(by_line.odds(0, sure(0.5, 0.0, 2), read), [2 * np.tanh(1.0), 0.0])
    everything = DraftChances(((0.0, 1.0),), (3,), reading(SURE_COLUMNS, 99.0))
    assert everything.odds(0, sure(0.5, 0.0, 2), read)[0] == MOST_ODDS


def test_a_row_is_judged_alike_alone_and_among_others() -> None:
    chances = DraftChances(((0.5, 2.0),), (3,), reading(SURE_COLUMNS + KIND_COLUMNS, 1.5))
    rng = np.random.default_rng(0)
    state_ND = rng.standard_normal((5, WIDTH)).astype(np.float32)
    read_N = rng.integers(0, 4, 5).astype(np.int32)
    features_NF = sure(0.6, 0.3, rows=5)
    together_N = chances.odds(0, features_NF, Seen(read_N, state_ND))
    for n in range(5):
        alone = Seen(read_N[n : n + 1], state_ND[n : n + 1])
        np.testing.assert_allclose(
            chances.odds(0, features_NF[:1], alone), together_N[n], rtol=1e-5
        )


def test_a_stop_by_trust_reads_the_state_and_says_so() -> None:
    policy = TrustedDraft(3, (0.0, 1.0), 0.7, insight=reading(SURE_COLUMNS + KIND_COLUMNS, 4.0))
    assert reads_state(policy)
    assert not reads_state(TrustedDraft(3, (0.0, 1.0), 0.7))
    nothing = np.zeros((1, 8), np.float32)
    one_open = nothing.copy()
    one_open[0, 2] = 1 / 8
    for sign, decided in ((1.0, [0]), (-1.0, [1])):
        state_1D = np.full((1, WIDTH), 0.0, np.float32)
        state_1D[0, 0] = sign
        policy.start(nothing)
        policy.route(0, sure(0.6, 0.3), nothing, seen=Seen(np.zeros(1, np.int32), state_1D))
        assert policy.start(one_open).tolist() == decided


def test_an_insight_is_packed_whole_and_bad_ones_are_refused() -> None:
    whole = reading(SURE_COLUMNS, 2.0)
    tensors = pack_insight(whole)
    back = unpack_insight(tensors, 1)
    assert back is not None
    np.testing.assert_array_equal(back.kinds_V, whole.kinds_V)
    x_NI = inputs_of(
        sure(0.6, 0.3)[:, :3],
        np.ones((1, KIND_COLUMNS), np.float32),
        np.ones((1, NUMBERS), np.float32),
    )
    np.testing.assert_array_equal(back.nets[0].values(x_NI), whole.nets[0].values(x_NI))
    assert unpack_insight({}, 1) is None
    lacking = {name: each for name, each in tensors.items() if name != "insight_kinds"}
    no_bytes = tensors | {"insight_kinds": np.full(4, 0.5, np.float32)}
    for bad in (lacking, no_bytes):
        with pytest.raises(PolicyRefusedError):
            unpack_insight(bad, 1)
    with pytest.raises(RequestError):
        unpack_insight(tensors, 2)
    bad_arguments: list[dict[str, Any]] = [
        {"projections": np.full((1, WIDTH, NUMBERS), np.nan, np.float32)},
        {"projections": np.zeros((2, WIDTH, NUMBERS), np.float32)},
        {"kinds": KINDS.astype(np.int32)},
    ]
    good: dict[str, Any] = {
        "projections": whole.projection_EDR,
        "nets": [whole.nets[0].weights],
        "kinds": KINDS,
    }
    for change in bad_arguments:
        with pytest.raises(RequestError):
            DraftInsight(**good | change)
    with pytest.raises(RequestError, match="insight"):
        DraftChances(((0.0, 1.0), (0.0, 1.0)), (3, 6), whole)


def test_a_state_that_is_not_finite_is_a_policys_failure() -> None:
    chances = DraftChances(((0.0, 1.0),), (3,), reading(SURE_COLUMNS + KIND_COLUMNS, 1.0))
    broken = Seen(np.zeros(1, np.int32), np.full((1, WIDTH), np.nan, np.float32))
    with pytest.raises(PolicyFaultError):
        chances.odds(0, sure(0.5, 0.0), broken)
