"""A priced schedule learns what drafting is worth, and leaves it where it costs more."""

from __future__ import annotations

import pytest

from offramp.controller.costs.table import CostTable
from offramp.controller.policies.drafts.static_draft import StaticDraft
from offramp.worker.decoding.pricing import REST, DraftingPrice
from offramp.worker.decoding.request import KVMode, PolicySnapshot, Request
from offramp.worker.decoding.sampler import Draft, Sampler
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.decoding.sequence import Sequence

LAYERS, DEPTH, LENGTH = 12, 3, 2
COSTS = CostTable(
    layer_s=1.0,
    head_s=0.5,
    probe_s=0,
    policy_s=0,
    fill_s=0,
    step_s=0.5,
    layers=LAYERS,
    machine="invented",
)


def new_row(policy: StaticDraft | None = None, kv_mode: KVMode = "verify") -> Sequence:
    sampling = SamplingParams(max_tokens=4096)
    policy = policy or StaticDraft(layer=DEPTH, length=LENGTH)
    snapshot = PolicySnapshot(0, "", policy)
    request = Request(id="r", prompt=(1,), sampling=sampling, snapshot=snapshot, kv_mode=kv_mode)
    return Sequence(request, 0, Sampler(sampling, (1,), frozenset(), 8), emitted=[1], prefilled=1)


def drive(
    price: DraftingPrice,
    row: Sequence,
    launches: int,
    *,
    right: bool = True,
    drag: float = 1.0,
    slow: float = 1.0,
) -> float:
    """Let a row draft and be verified; the share of launches that drafted.

    All its drafts are right, or none. A launch takes ``slow`` times what the table says, and one
    that drafts, or verifies drafts, ``drag`` times as long again.
    """
    drafted = 0
    for _ in range(launches):
        pending = len(row.drafts)
        if price([row], ()) or pending == LENGTH:
            expected_s = price.pacer.verify_s(1, DEPTH, pending)
            price.took(expected_s * slow * (drag if pending else 1.0))
            for _ in range(pending if right else min(pending, 1)):
                row.note_verdict(right)
            row.drafts.clear()
        else:
            drafted += 1
            row.drafts.append(Draft(1, DEPTH))
            price.took(price.pacer.draft_s(1, DEPTH) * slow * drag)
    return drafted / launches


@pytest.mark.parametrize("slow", [1.0, 2.5])
def test_rows_draft_where_it_pays_however_slow_the_machine(slow: float) -> None:
    assert drive(DraftingPrice(COSTS, 8), new_row(), 300, slow=slow) > 0.6


@pytest.mark.parametrize(("drag", "right"), [(3.0, True), (1.0, False)])
def test_drafting_ends_where_it_costs_more_than_the_table_says_or_is_never_right(
    drag: float, right: bool
) -> None:
    price, row = DraftingPrice(COSTS, 8), new_row()
    drive(price, row, 100, drag=drag, right=right)
    assert drive(price, row, 300, drag=drag, right=right) < 0.05


def test_what_a_policy_was_worth_holds_for_its_other_requests_until_it_is_long_ago() -> None:
    price, policy = DraftingPrice(COSTS, 8), StaticDraft(layer=DEPTH, length=LENGTH)
    drive(price, new_row(policy), 100, right=False)
    assert drive(price, new_row(policy), 50, right=True) == 0
    drive(price, new_row(policy, "defer"), 1000 * REST)
    assert drive(price, new_row(policy), 600, right=True) > 0.5


def test_other_modes_teach_it_nothing() -> None:
    price = DraftingPrice(COSTS, 8)
    assert price([new_row(kv_mode="defer")], ())
    price.took(1e6)
    drive(price, new_row(kv_mode="defer"), REST)
    assert drive(price, new_row(), REST + 200) > 0.5
