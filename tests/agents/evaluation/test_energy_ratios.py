"""Energy beside time: what counts, what is said of it, and what an unknown amount becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offramp.agents.evaluation.energy_ratios import Metered, energy_of, metered
from offramp.agents.evaluation.evaluation_rows import Measured, energy_ratio, evaluation_row
from offramp.agents.evaluation.matched import matched_row
from offramp.agents.evaluation.measure import (
    TIME_ALONE,
    HeldOut,
    Pair,
    PairedCosts,
    Protocol,
    held_out,
    measure_time,
)
from offramp.agents.evaluation.page import energy_section
from offramp.agents.evaluation.scores import AGREEMENT, Scores
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus
from offramp.controller.costs.readings import EnergyMethod, EnergyReading, unavailable
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy
from offramp.worker import AdaptiveEngine
from offramp.worker.energy import Meter
from offramp.worker.energy.modelled import MemoryTraffic, weight_bytes
from support.models import REFERENCE

PROTOCOL = Protocol(prompt_tokens=16, new_tokens=12, lines=0, timed_tokens=6)
DEVICE, SHARED = EnergyMethod.MEASURED_DEVICE, EnergyMethod.MEASURED_SHARED


def reading(joules: float, method: EnergyMethod = DEVICE) -> EnergyReading:
    return EnergyReading(
        joules=joules, method=method, source="a counter", scope="all", window_s=10 * joules
    )


def pair(mine: float, before: float, after: float, method: EnergyMethod = DEVICE) -> Pair:
    return Pair(reading(mine, method), (reading(before), reading(after)))


def test_a_pair_sets_a_policy_against_both_its_neighbours() -> None:
    assert pair(1.0, 2.0, 4.0).joules == (1.0, 3.0)
    assert pair(1.0, 2.0, 4.0).seconds == (10.0, 30.0)
    unknown = Pair(unavailable(2.0, "no counter"), (reading(0.1), reading(0.3)))
    assert unknown.joules is None
    assert unknown.seconds == pytest.approx((2.0, 2.0))


def test_ratios_are_of_sums_over_documents() -> None:
    pairs_CD = [
        [pair(1.0, 2.0, 2.0), pair(3.0, 3.0, 5.0)],
        [pair(0.5, 2.0, 2.0), pair(1.0, 4.0, 4.0)],
    ]
    full, *policies = metered(pairs_CD)
    assert full.joules is not None
    np.testing.assert_array_equal(full.joules, [[2.0, 4.0], [2.0, 4.0]])
    found = energy_of(policies, timed_tokens=4)
    assert [ratio and ratio.value for ratio in found.ratios] == [4 / 6, 1.5 / 6]
    assert found.full_j == pytest.approx(3.0 / 4)
    assert found.label == "measured device: a counter"


def test_a_device_that_was_shared_for_a_while_is_called_shared() -> None:
    found = metered([[pair(1.0, 2.0, 2.0)], [pair(1.0, 2.0, 2.0, SHARED)]])
    assert {each.method for each in found} == {SHARED}


def test_a_counter_that_stood_still_told_nothing() -> None:
    for still in (pair(0.0, 2.0, 2.0), pair(1.0, 0.0, 0.0)):
        found = metered([[pair(1.0, 2.0, 2.0)] * 2, [still] * 2])
        unclear = Metered(EnergyMethod.UNAVAILABLE, "a counter is too coarse for these runs", None)
        assert found == [unclear] * 3
    assert metered([[pair(0.0, 2.0, 2.0), pair(1.0, 2.0, 2.0)]])[1].joules is not None


def unknown(policies: int) -> list[Metered]:
    silent = unavailable(1.0, "no counter")
    return metered([[Pair(silent, (silent, silent))]] * policies)


def test_unknown_energy_has_a_method_and_no_number(tmp_path: Path) -> None:
    everyone = unknown(2)
    assert everyone == [Metered(EnergyMethod.UNAVAILABLE, "no counter", None)] * 3
    found = energy_of(everyone[1:], timed_tokens=4)
    assert (found.ratios, found.full_j) == ([None, None], None)
    section = energy_section([("a", "p̂"), ("b", "p̂")], found, 1, tmp_path)
    assert "no counter" in section.text
    assert (section.picture, section.table) == ("", None)
    assert not list(tmp_path.iterdir())


def test_a_known_one_is_drawn_and_tabled_under_its_method(tmp_path: Path) -> None:
    pairs_CD = [[pair(1.0, 2.0, 2.0)] * 2, [pair(1.5, 2.0, 2.0)] * 2]
    found = energy_of(metered(pairs_CD)[1:], timed_tokens=4)
    section = energy_section([("p̂ τ=0.9", "p̂"), ("p̂ τ=0.5", "p̂")], found, 2, tmp_path)
    assert section.title == "Energy (measured device)"
    assert "Full depth takes 500.0 mJ a token. 2 documents" in section.text
    assert section.table is not None
    assert section.table.head[1] == "energy ÷ full, measured device"
    assert section.table.rows[1] == ("p̂ τ=0.5", "0.750 [0.750, 0.750]")
    assert (tmp_path / section.picture).read_bytes().startswith(b"\x89PNG")


def measured(energy: Metered | None) -> Measured:
    ten, ones = np.full(2, 10.0), np.ones(2)
    scores = Scores(
        tokens_D=ten, agreeing_D=ten, right_D=ten, surprisal_D=ones, lines_D=0 * ones,
        exact_D=0 * ones, similarity_D=0 * ones, depths={6: 20},
    )  # fmt: skip
    contender = Contender(family="p̂", setting=0.9, offline_agreement=None, policy=FixedExit(6))
    return Measured(contender, None, scores, PairedCosts(ones, ones), energy=energy)


def test_rows_say_the_ratio_and_how_it_was_come_by() -> None:
    half = Metered(SHARED, "x", (np.array([1.0, 3.0]), np.array([2.0, 6.0])))
    row = evaluation_row(measured(half), timed_tokens=4)
    ratios = (row.energy_ratio, row.energy_ratio_low, row.energy_ratio_high)
    assert ratios == pytest.approx((0.5, 0.5, 0.5))
    assert row.energy_method == "measured_shared"
    silent = evaluation_row(measured(unknown(1)[1]), timed_tokens=4)
    assert (silent.energy_ratio, silent.energy_method) == (None, "unavailable")
    unasked = evaluation_row(measured(None), timed_tokens=4)
    assert (unasked.energy_ratio, unasked.energy_method) == (None, None)


def test_a_family_takes_the_mean_over_its_seeds() -> None:
    full_D = np.array([2.0, 2.0])
    seeds = [measured(Metered(SHARED, "x", (share * full_D, full_D))) for share in (0.4, 0.6)]
    full = measured(Metered(SHARED, "x", (full_D, full_D)))
    row = matched_row("p̂", seeds, full, AGREEMENT, 0.05)
    assert row.energy_ratio == pytest.approx(0.5)
    assert row.energy_ratio_low == pytest.approx(0.4)
    assert row.energy_ratio_high == pytest.approx(0.6)
    assert row.energy_method == "measured_shared"
    assert energy_ratio([*seeds, measured(None)]) is None


class Bytes:
    """Calls a byte of weights a joule, so that what a window covers can be counted exactly."""

    def __init__(self, engine: AdaptiveEngine) -> None:
        self.engine = engine

    def start(self) -> MemoryTraffic:
        return MemoryTraffic(self.engine)

    def stop(self, before: Any, window_s: float) -> EnergyReading:
        return replace(reading(float(before.close())), window_s=window_s)


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    torch.set_num_threads(1)
    return AdaptiveEngine.from_pretrained(REFERENCE)


@pytest.fixture(scope="module")
def documents(engine: AdaptiveEngine) -> list[HeldOut]:
    corpus = load_corpus(None, limit=60)
    return held_out(str(REFERENCE), corpus, "test", 2, PROTOCOL, engine.tokenizer)


def test_the_prompt_is_not_metered_and_every_timed_token_is(
    engine: AdaptiveEngine, documents: list[HeldOut]
) -> None:
    meter = Meter(Bytes(engine))
    told: list[int] = []
    policies: list[Policy] = [NeverExit(), FixedExit(6)]
    pairs_CD = measure_time(
        engine, policies, documents, PROTOCOL, meter, lambda done, _: told.append(done)
    )
    assert told == [1, 2]
    head = weight_bytes(engine.stack.head)
    layers = [weight_bytes(block) for block in engine.stack.blocks]
    full = PROTOCOL.timed_tokens * (sum(layers) + head)
    half = PROTOCOL.timed_tokens * (sum(layers[:6]) + head)
    for staying, leaving in zip(*pairs_CD, strict=True):
        assert staying.joules == (full, full)
        # No fill: none is due before a token goes deeper, or more tokens wait for it than these.
        assert leaving.joules == (half, full)


def test_time_alone_tells_no_energy(engine: AdaptiveEngine, documents: list[HeldOut]) -> None:
    [[timed]] = measure_time(engine, [FixedExit(3)], documents[:1], PROTOCOL)
    assert timed.joules is None
    assert all(seconds > 0 for seconds in timed.seconds)
    assert TIME_ALONE.source.start() is None
