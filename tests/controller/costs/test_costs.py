"""The cost table against formulas written out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.controller.costs.prices import Timing
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.envs.charges.token_costs import ENERGY, TokenCosts
from support.cost_tables import leaving, measured, timing


def test_the_view_is_that_of_one_row() -> None:
    costs = measured()
    assert costs.layer_s == costs.at(1).layer_s == 10
    assert costs.full_s == 2 + 12 * 10 + 20


@given(rows=st.floats(1, 8))
def test_between_measured_rows_prices_are_interpolated(rows: float) -> None:
    prices = measured().at(rows)
    assert prices.layer_s == pytest.approx(10 * (1 + 0.1 * (rows - 1)))
    assert prices.head_j == pytest.approx(5 * (1 + 0.1 * (rows - 1)))


@pytest.mark.parametrize("rows", [0, 0.99, 8.01, 64, math.nan])
def test_outside_of_the_profile_nothing_is_guessed(rows: float) -> None:
    with pytest.raises(ConfigError, match=r"rows: .* 1 to 8 that were profiled\. Run"):
        measured().at(rows)


def test_a_launch_of_several_tokens() -> None:
    prices = measured().launch(5)
    assert prices.layer_s == pytest.approx(10 * 1.8)
    assert prices.full_s == pytest.approx(3.6 + 12 * 18 + 36)
    assert (prices.rows, prices.tokens, prices.probe_s) == (1, 5, 3)
    with pytest.raises(ConfigError, match="tokens"):
        measured().launch(10)


def test_leaving_charges_what_was_run() -> None:
    costs = measured()
    expected = [
        2 + 4 + 3 * 10 + 1 * (3 + 1) + 9 * 0.5 + 20,
        2 + 4 + 9 * 10 + 2 * (3 + 1) + 3 * 0.5 + 20,
        2 + 4 + 12 * 10 + 2 * (3 + 1) + 20,
    ]
    found = TokenCosts.of(costs, (3, 9)).asked_everywhere_E1
    np.testing.assert_allclose(found, np.asarray(expected) / 142, rtol=1e-6)
    np.testing.assert_allclose(found, leaving(costs, (3, 9)), rtol=1e-6)
    # A policy without exits builds no probe.
    assert TokenCosts.of(costs, ()).asked_everywhere_E1 == pytest.approx([1.0])


def test_at_more_rows_leaving_is_charged_their_prices() -> None:
    costs = measured()
    np.testing.assert_allclose(leaving(costs, (3, 9), 4), leaving(costs, (3, 9)), rtol=1e-6)
    four, alone = TokenCosts.of(costs, (3, 9), 4), costs.at(1)
    launch_s = 4 * alone.full_s
    assert launch_s * four.asked_everywhere_E1[0] == pytest.approx(1.3 * 64.5)
    assert alone.full_j is not None
    one = TokenCosts.of(costs, (3,), 4)
    asked = one.leave_OP[ENERGY, 1:] + one.probe_O[ENERGY] + one.policy_O[ENERGY]
    launch_j = 4 * alone.full_j * (asked + one.build_O[ENERGY])
    assert launch_j == pytest.approx([1.3 * 5 * v for v in (1 + 1 + 3 + 2 + 9 + 1, 17)])


def test_unknown_energy_stays_unknown() -> None:
    costs = measured()
    silent = tuple(
        replace(each, parts={**each.parts, "layer": timing(each.parts["layer"].median_s)})
        for each in costs.batches
    )
    silenced = replace(costs, batches=silent)
    prices = silenced.at(2)
    assert prices.layer_j is None
    assert prices.head_j is not None
    assert prices.full_j is None
    assert TokenCosts.of(silenced, (3,), 2).objectives == ("quality", "latency")


def test_another_schemas_probe() -> None:
    costs = measured().with_probe("softmax")
    assert costs.at(4).probe_s == costs.at(4).head_s
    assert costs.build_s == 0.25
    assert costs.schema == "softmax"
    with pytest.raises(ConfigError, match=r"'sketch' probes were not measured"):
        measured().with_probe("sketch")


def test_a_part_at_another_price() -> None:
    costs = measured().scaled("layer", 2)
    assert costs.layer_s == 20
    assert costs.at(4).layer_j == pytest.approx(2 * 5 * 1.3)
    assert costs.launch(9).layer_s == pytest.approx(20 * 2.6)
    assert costs.at(4).head_s == measured().at(4).head_s


def test_a_table_of_constants_is_the_same_at_any_number_of_rows() -> None:
    costs = CostTable(
        layer_s=1, head_s=2, probe_s=0, policy_s=0, fill_s=0, step_s=0, layers=8, machine="none"
    )
    assert costs.at(64).full_s == costs.launch(9).full_s == costs.full_s == 10
    assert costs.at(64).full_j is None
    costs.require_model("any")


@pytest.mark.parametrize(
    "change",
    [
        {"layer_s": 0.0},
        {"layers": 0},
        {"probe_s": 0.0},  # no longer what the batches say
        {"batches": measured().batches[1:]},
        {"batches": measured().batches[::-1]},
        {"spans": measured().batches},
        {"probes": {"softmax": measured().probes["softmax"][:2]}},
    ],
)
def test_tables_that_contradict_themselves_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(measured(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("low", "middle", "high"), [(2, 1, 3), (0, 1, 0.5), (-1, 1, 2), (0, math.nan, 1)]
)
def test_intervals_hold_their_median(low: float, middle: float, high: float) -> None:
    with pytest.raises(ConfigError, match="timing"):
        Timing(median_s=middle, low_s=low, high_s=high)


def test_another_model_is_refused() -> None:
    costs = measured(model="12" * 32)
    costs.require_model("12" * 32)
    with pytest.raises(ConfigError, match=r"measured on model 121212121212, not on abab.* profile"):
        costs.require_model("ab" * 32)
