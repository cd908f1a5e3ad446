"""A cost table in, a choice out: how long rows should draft before all are verified, if at all."""

from __future__ import annotations

import pytest

from offramp.controller.costs.pace import Drafting, Pacer, knee_of, verifying_prices
from offramp.controller.costs.prices import PARTS, SPAN_PARTS, Batch, Timing
from offramp.controller.costs.table import CostTable, view_of_one
from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import Exit
from support.cost_tables import measured

LAYERS = 12
ROWS = (1, 4, 8, 16)
TOKENS = (1, 5, 9)


def test_drafts_on_a_copy_cost_its_layers_and_are_verified_from_the_first_on() -> None:
    costs = measured()
    last = Exit(12, "int4")
    pacer = Pacer(costs, 8)
    own, copy = costs.at(4), costs.on_copy("int4", 4)
    assert pacer.draft_s(4, last) == own.step_s + 12 * copy.layer_s + copy.head_s
    assert pacer.draft_s(4, 12) == own.full_s > pacer.draft_s(4, last)
    passed = verifying_prices(costs, 4, 4)
    assert pacer.verify_s(4, last, 3) == passed.full_s
    assert pacer.best(1, last, 0.95).length > 0 == pacer.best(1, 12, 0.95).length


def priced(free: int, head_s: float = 0.5) -> CostTable:
    """A machine whose layer takes one second for up to so many tokens, and grows in line beyond."""

    def part(name: str, tokens: int) -> Timing:
        worth = {"layer": max(1.0, tokens / free), "head": head_s, "step": 0.1}.get(name, 0.0)
        return Timing(median_s=worth, low_s=worth, high_s=worth)

    def batch(size: int, tokens: int, parts: tuple[str, ...]) -> Batch:
        return Batch(size=size, parts={name: part(name, tokens) for name in parts})

    batches = tuple(batch(rows, rows, PARTS) for rows in ROWS)
    passes = {
        rows: tuple(batch(tokens, rows * tokens, SPAN_PARTS) for tokens in TOKENS) for rows in ROWS
    }
    return CostTable(
        **view_of_one(batches),
        layers=LAYERS,
        machine="invented",
        batches=batches,
        spans=passes.pop(1),
        passes=passes,
    )


@pytest.mark.parametrize(("free", "knee"), [(1, 1), (4, 4), (8, 8), (64, 16)])
def test_the_knee_is_where_a_layers_time_begins_to_grow(free: int, knee: int) -> None:
    assert knee_of(priced(free)) == knee


def test_passes_of_several_rows_are_interpolated_in_rows_and_tokens() -> None:
    costs = priced(1)
    assert verifying_prices(costs, 8, 5).layer_s == pytest.approx(40)
    assert verifying_prices(costs, 6, 3).layer_s == pytest.approx(18)
    assert verifying_prices(costs, 1, 9) == costs.launch(9)
    for rows, tokens in ((17, 3), (8, 10)):
        with pytest.raises(ConfigError):
            verifying_prices(costs, rows, tokens)
    constants = CostTable(**view_of_one(costs.batches), layers=LAYERS, machine="none")
    assert verifying_prices(constants, 64, 9).layer_s == 1


@pytest.mark.parametrize("acceptance", [0.7, 0.95])
def test_below_the_knee_rows_draft_and_above_it_there_are_no_exits(acceptance: float) -> None:
    """Launches count where rows are free; where each row costs, rejected drafts are pure loss."""
    free, dear = Pacer(priced(256), 8), Pacer(priced(1), 8)
    for rows in ROWS:
        assert free.best(rows, 3, acceptance).length > 0
        assert dear.best(rows, 3, acceptance).length == 0
        row = [Drafting(0, 3, acceptance)] * rows
        assert not free.goes_deep(row, rows, 0)
        assert dear.goes_deep(row, rows, 0)


def test_one_machine_is_on_both_sides_of_its_knee() -> None:
    pacer = Pacer(priced(8), 8)
    assert pacer.best(1, 6, 0.8).length > pacer.best(16, 6, 0.8).length == 0


def test_the_best_cycle_is_the_best_of_all_lengths() -> None:
    costs, rows, depth, right = priced(8), 4, 3, 0.8
    rates = [rows / costs.at(rows).full_s]
    for drafts in range(1, 9):
        draft_s = 0.1 + depth * 1.0 + 0.5
        deep_s = 0.1 + depth * 1.0 + 9 * verifying_prices(costs, rows, drafts + 1).layer_s + 0.5
        tokens = rows * sum(right**n for n in range(drafts + 1))
        rates.append(tokens / (drafts * draft_s + deep_s))
    best = Pacer(costs, 8).best(rows, depth, right)
    assert best.length == rates.index(max(rates))
    assert best.rate == pytest.approx(max(rates))


def test_drafts_that_are_never_right_are_not_made() -> None:
    assert Pacer(priced(256), 8).best(4, 3, 0.05).length == 0


def test_waiting_rows_wait_while_the_others_drafts_are_worth_it() -> None:
    pacer = Pacer(priced(256), 8)
    promising, hopeless = Drafting(0, 3, 0.95), Drafting(7, 3, 0.5)
    assert not pacer.goes_deep([promising] * 7, 8, 1)
    assert pacer.goes_deep([hopeless] * 7, 8, 1)
    assert pacer.goes_deep([promising], 8, 7)  # one row's draft is not worth seven rows' wait
    assert pacer.goes_deep([], 8, 8)


def test_no_more_is_drafted_than_was_profiled() -> None:
    assert Pacer(priced(256), 100).most == TOKENS[-1] - 1
    assert Pacer(measured(), 3).most == 3
