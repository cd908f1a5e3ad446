"""Energy by track and request: steps are charged to those that ran in them, prompts to nobody."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest

from offramp.controller.costs.readings import EnergyMethod, EnergyShare
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.controller.watching.guardrails import Guardrails, PolicyWatch
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import CompletionStats, KVMode, PolicySnapshot
from offramp.worker.decoding.schedule import Schedule
from offramp.worker.energy.step_meter import (
    BATCH_TOKENS,
    MOST_READING,
    BusyCores,
    StepMeter,
    serving_source,
)
from offramp.worker.energy.track_meter import TrackMeter
from offramp.worker.engine.engine_config import EngineConfig
from support.cost_tables import OneJoule
from support.models import LAYERS, make_model

TOKENS = 3 * BATCH_TOKENS + 1
LONG = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


def snapshots() -> tuple[PolicySnapshot, PolicySnapshot]:
    stable, canary = (
        PolicySnapshot(number, "d" * 64, policy, None, PolicyWatch(Guardrails(), print, number))
        for number, policy in ((1, NeverExit()), (2, FixedExit(1)))
    )
    return stable, canary


def engine() -> AdaptiveEngine:
    config = EngineConfig(audit_share=0.0, schedule=Schedule())
    return AdaptiveEngine.from_pretrained(make_model("llama"), slots=2, config=config)


class Decoded(NamedTuple):
    steps: int
    totals: dict[tuple[str, str], tuple[float, int]]
    ends: list[CompletionStats]


def decode(
    meter_source: object,
    tracks: tuple[PolicySnapshot, ...],
    also: tuple[PolicySnapshot, ...] = (),
    kv_mode: KVMode = "project",
    sampling: SamplingParams = LONG,
    most: float | None = None,
) -> Decoded:
    """Decode one request under each snapshot, in the same steps, all of which may be read."""
    made = engine()

    def watches() -> Iterator[PolicyWatch]:
        return (each.watch for each in tracks if each.watch is not None)

    shares = (math.inf, math.inf) if most is None else (most, most)
    meter = TrackMeter(made, meter_source, watches, *shares)  # type: ignore[arg-type]
    for each in (*tracks, *also):
        made.submit([5, 6], sampling, each, kv_mode=kv_mode)
    steps, ends = 0, []
    while made.load != (0, 0):
        ends += [event.stats for event in meter(made.step) if event.stats is not None]
        steps += 1
    return Decoded(steps, meter.totals, ends)


def test_a_step_is_shared_by_the_layers_that_each_track_ran() -> None:
    tracks = stable, canary = snapshots()
    decode(OneJoule(), tracks)
    assert stable.watch is not None
    assert canary.watch is not None
    ours, theirs = canary.watch.tally, stable.watch.tally
    assert ours.meter == theirs.meter == "attributed: a counter"
    assert ours.batches == theirs.batches >= 1
    # A joule for both tokens of a step: one of one layer, one of all.
    assert ours.token_j == pytest.approx(1 / (1 + LAYERS))
    assert theirs.token_j == pytest.approx(LAYERS / (1 + LAYERS))


def test_alone_a_track_is_charged_all_of_it_but_the_prompt() -> None:
    _, canary = snapshots()
    decode(OneJoule(), (canary,))
    assert canary.watch is not None
    assert canary.watch.tally.token_j == 1.0


def test_a_worker_without_releases_is_charged_by_method_and_source() -> None:
    alone = replace(snapshots()[0], watch=None)
    steps, totals, _ = decode(OneJoule(), (), also=(alone, alone))
    (joules, tokens) = totals.pop(("measured_shared", "a counter"))
    assert totals == {}
    # A joule and two tokens per step, but for those of the steps that read the prompts.
    assert joules == tokens / 2 == pytest.approx(TOKENS - 1, abs=1)
    assert joules <= steps


def test_requests_of_no_track_bear_their_share() -> None:
    stable, canary = snapshots()
    decode(OneJoule(), (canary,), also=(replace(stable, watch=None),))
    assert canary.watch is not None
    assert canary.watch.tally.token_j == pytest.approx(1 / (1 + LAYERS))


def test_where_nothing_can_be_read_nothing_is_said() -> None:
    tracks = snapshots()
    assert decode(OneJoule(known=False), tracks).totals == {}
    assert [each.watch.tally.token_j for each in tracks if each.watch] == [None, None]


def test_a_slow_counter_is_read_seldom() -> None:
    source = OneJoule(slow_s=0.05)
    steps = decode(source, snapshots(), most=MOST_READING).steps
    assert 1 <= source.looks < steps / 4


def test_what_is_made_of_a_reading_counts_as_reading() -> None:
    meter = StepMeter(OneJoule())
    meter.pass_by(lambda: time.sleep(0.1))
    assert meter.is_due(MOST_READING)
    meter.run(lambda: None, lambda _: 1, lambda *_: time.sleep(0.02))
    assert not meter.is_due(MOST_READING)
    assert meter.is_due(most=0.5)


def test_a_request_of_which_nothing_was_read_is_read_sooner() -> None:
    made, source = engine(), OneJoule()
    meter = TrackMeter(made, source, lambda: iter(()), most=0.0, most_first=math.inf)
    looks = []
    for _ in range(2):
        made.submit([5, 6], SamplingParams(max_tokens=4, ignore_eos=True))
        while made.load != (0, 0):
            before = source.looks
            meter(made.step)
            looks.append(source.looks - before)
    # A step for the prompt and then, of each request, the first that is none.
    assert looks == [0, 1, 0, 0] * 2


@pytest.mark.parametrize("kv_mode", ["project", "verify"])
def test_what_requests_took_adds_up_to_what_was_read(kv_mode: KVMode) -> None:
    full, early = (replace(each, watch=None) for each in snapshots())
    found = decode(OneJoule(), (), also=(full, early), kv_mode=kv_mode)
    [(joules, _)] = found.totals.values()
    shares = {each.generation: shared(each) for each in found.ends}
    assert sum(each.joules * each.read_share for each in shares.values()) == pytest.approx(joules)
    assert {(each.method, each.source) for each in shares.values()} == {
        (EnergyMethod.ATTRIBUTED, "a counter")
    }
    if kv_mode == "project":  # all of whose steps had a layer of one and all layers of the other
        assert shares[1].joules / shares[2].joules == pytest.approx(LAYERS)


def test_steps_that_were_not_read_are_taken_to_need_as_much_per_layer() -> None:
    slow, request = OneJoule(slow_s=0.05), replace(snapshots()[0], watch=None)
    found = decode(slow, (), also=(request,), most=MOST_READING)
    [(joules, tokens)], [stats] = found.totals.values(), found.ends
    share = shared(stats)
    assert share.read_share == tokens * LAYERS / stats.layer_calls < 0.25
    assert share.joules == pytest.approx(joules / tokens * (TOKENS - 1))


@pytest.mark.parametrize(
    ("source", "tokens"), [(OneJoule(), 1), (OneJoule(known=False), 4), (OneJoule(joules=0), 4)]
)
def test_of_requests_without_a_reading_nothing_is_said(source: OneJoule, tokens: int) -> None:
    # The first token comes from the prompt; and a counter that has not moved knows of nothing.
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    [stats] = decode(
        source, (), also=(replace(snapshots()[0], watch=None),), sampling=sampling
    ).ends
    assert stats.energy is None


def shared(stats: CompletionStats) -> EnergyShare:
    assert stats.energy is not None
    return stats.energy


def test_without_counters_busy_cores_are_charged() -> None:
    stable, _ = snapshots()
    decode(BusyCores(), (stable,))
    assert stable.watch is not None
    assert stable.watch.tally.meter == "modelled: 3 W per busy core"
    assert (stable.watch.tally.token_j or 0.0) > 0.0
    source = serving_source(engine().stack.device)
    assert source.stop(source.start(), 0.1).joules is not None


@pytest.mark.parametrize("part", ["start", "stop"])
def test_a_counter_that_fails_is_given_up_and_no_step_with_it(
    part: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = OneJoule()
    meter = StepMeter(source)

    def fail(*_: object) -> None:
        raise OSError("the counter is gone")

    setattr(source, part, fail)
    for _ in range(3):
        assert meter.run(lambda: "done", lambda _: 1) == ("done", None)
    assert not meter.totals
    assert caplog.text.count("energy is not read any more") == 1
