"""Profiling: the steps are real, their parts add up, and intervals mean what they say."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.controller.costs.prices import LEAST_REPEATS, ROUTED, Timing
from offramp.controller.costs.readings import EnergyMethod
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, SCHEMAS, IntArray
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.schedule import Schedule
from offramp.worker.energy import COEFFICIENTS
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.precision import Precision
from offramp.worker.profiling.joules import PartEnergy
from offramp.worker.profiling.loop import (
    PROCESSOR,
    SILENT,
    STAY,
    WALL,
    PartClock,
    ScriptedPolicy,
    Step,
    clocked,
    decode_steps,
)
from offramp.worker.profiling.profile import measure_costs
from offramp.worker.profiling.rounds import COPY, DRAFT, ProfileConfig, Rounds, cycle_script
from offramp.worker.profiling.samples import (
    Key,
    Samples,
    eager_drafter,
    median_interval,
    random_policy,
)
from offramp.worker.recording.recording_actor import TraceRecorder
from offramp.worker.spec import WorkerSpec, describe
from support.cost_tables import leaving
from support.models import LAYERS, REFERENCE, VOCAB, make_model, save_adapters

EXITS = (1, 3)
QUICK = ProfileConfig(rows=(1, 3), tokens=(1, 4), context=24, exits=EXITS, limit_s=0.0)


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(make_model("llama"), slots=3)


@pytest.fixture(scope="module")
def table_VK() -> IntArray:
    return np.tile(np.arange(8, dtype=np.int32), (VOCAB, 1))


def decoded(engine: AdaptiveEngine, table_VK: IntArray, rows: int, script: list[int]) -> list[Step]:
    acts = ScriptedPolicy(random_policy(CANDIDATES_V1, EXITS, table_VK))
    with clocked(engine) as clock:
        prompts = [[5, 6, 7, 8 + row] for row in range(rows)]
        return decode_steps(engine, clock, acts, prompts, script)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_engine_does_what_the_script_says(
    engine: AdaptiveEngine, table_VK: IntArray, rows: int
) -> None:
    silent, stay, first, fill, second, deep = decoded(
        engine, table_VK, rows, [SILENT, STAY, 0, SILENT, 1, SILENT]
    )
    assert silent.calls == {"layer": LAYERS, "head": 1}
    whole = {"layer": LAYERS, "head": 1, "build": 1}
    assert stay.calls == whole | {"probe": len(EXITS), "ask": len(EXITS)}
    assert first.calls == {"layer": 1, "head": 1, "build": 1, "probe": 1, "ask": 1}
    assert second.calls == {"layer": 3, "head": 1, "build": 1, "probe": 1, "ask": 1}
    assert fill.calls == deep.calls == whole | {"fill": 1}


def test_the_parts_of_a_step_and_its_rest_are_the_step(
    engine: AdaptiveEngine, table_VK: IntArray
) -> None:
    for step in decoded(engine, table_VK, 3, [STAY, SILENT]):
        assert 0 < step.rest_s < step.whole_s
        apart = sum(seconds for part, seconds in step.parts_s.items() if part != "probe")
        assert math.isclose(step.rest_s + apart, step.whole_s)
        assert step.parts_s.get("probe", 0.0) <= step.parts_s.get("ask", 0.0)


def test_nothing_stays_on_the_engine(engine: AdaptiveEngine, table_VK: IntArray) -> None:
    decoded(engine, table_VK, 1, [STAY])
    decoder = engine.decoder
    owners = (engine.stack, decoder.probes, decoder.grouper, decoder.projector)
    names = {"run_layers", "logits", "probe", "group_rows", "fill"}
    assert not any(names & set(vars(owner)) for owner in owners)


def test_prompts_that_take_several_steps_are_read_first(table_VK: IntArray) -> None:
    slow = AdaptiveEngine.from_pretrained(
        make_model("llama"), slots=3, config=EngineConfig(prefill_tokens=3)
    )
    steps = decoded(slow, table_VK, 3, [SILENT] * 4)
    assert [step.calls for step in steps] == [{"layer": LAYERS, "head": 1}] * 4
    assert slow.load == (0, 0)


def test_cohorts_are_refused(table_VK: IntArray) -> None:
    config = EngineConfig(schedule=Schedule(holds=(2,)))
    engine = AdaptiveEngine.from_pretrained(make_model("llama"), slots=3, config=config)
    with pytest.raises(ConfigError, match="holds: make cohorts"):
        measure_costs(engine, table_VK, QUICK)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cycle_drafts_at_the_first_exit_and_verifies_all(
    engine: AdaptiveEngine, table_VK: IntArray, rows: int
) -> None:
    drafter = ScriptedPolicy(eager_drafter(EXITS, table_VK, engine.config.max_pending))
    shapes: list[tuple[int, ...]] = []
    hook = engine.stack.blocks[-1].register_forward_hook(
        lambda _, __, out: shapes.append(tuple(out.shape))
    )
    prompts = [[5, 6, 7, 8 + row] for row in range(rows)]
    with clocked(engine) as clock:
        steps = decode_steps(engine, clock, drafter, prompts, cycle_script(4, 2), "verify")
    hook.remove()
    draft = {"layer": EXITS[0], "build": 1, "ask": 1, "probe": 1}
    deep = {"layer": EXITS[0], "span": LAYERS - EXITS[0], "head": 1}
    unasked = [{part: n for part, n in step.calls.items() if part != "build"} for step in steps]
    assert [step.calls for step in steps[:3]] == [draft] * 3
    assert unasked[3::4] == [deep] * 2
    assert shapes[-2:] == [(rows, 4, engine.stack.width)] * 2


def test_drafts_on_a_copy_run_the_copys_layers(table_VK: IntArray) -> None:
    copied = AdaptiveEngine(
        make_model("llama"), slots=3, config=EngineConfig(draft_precision=Precision.of_copy("int8"))
    )
    copy = copied.decoder.context.copy
    assert copy is not None
    ran: list[tuple[int, int, int]] = []
    run_layers = copy.stack.run_layers
    copy.stack.run_layers = lambda *a: ran.append((*a[:2], len(a[2]))) or run_layers(*a)  # type: ignore[method-assign,func-returns-value]
    samples = Samples()
    with clocked(copied) as clock:
        rounds = Rounds(copied, clock, table_VK, QUICK, samples)
        for cell in rounds.cells[-len(QUICK.rows) :]:
            ran.clear()
            cell()
    drafts = cycle_script(9, 1).count(DRAFT)
    assert ran[-drafts:] == [(0, LAYERS, QUICK.rows[-1])] * drafts
    assert {key.size for key in samples.bare() if key.table == COPY} == set(QUICK.rows)


def test_more_tokens_than_may_be_open_are_refused(
    engine: AdaptiveEngine, table_VK: IntArray
) -> None:
    with pytest.raises(ConfigError, match="tokens: 17 are more than the 8 drafts"):
        measure_costs(engine, table_VK, replace(QUICK, tokens=(1, 17)))


def test_one_thread_is_charged_its_own_time_and_several_the_wall() -> None:
    assert PartClock(torch.device("cpu")).kind == PROCESSOR
    torch.set_num_threads(2)
    assert PartClock(torch.device("cpu")).kind == WALL
    torch.set_num_threads(1)


def test_a_table_of_everything(engine: AdaptiveEngine, table_VK: IntArray) -> None:
    told: list[tuple[float, float]] = []
    found = measure_costs(engine, table_VK, QUICK, lambda *seconds: told.append(seconds))
    costs = found.costs
    assert found.rounds == 1
    assert told
    assert found.bare == found.loose
    assert found.enough_s > found.seconds > 0
    assert [batch.size for batch in costs.batches] == [1, 3]
    assert [span.size for span in costs.spans] == [1, 4]
    assert set(costs.probes) == {schema.name for schema in SCHEMAS.values()} | {ROUTED}
    assert costs.launch(4).step_s > 0
    assert costs.launch(4).step_s != costs.at(1).step_s
    assert costs.probes["candidates"][1].parts["probe"] == costs.batches[1].parts["probe"]
    assert costs.model == engine.model_fingerprint
    assert (costs.layers, costs.dtype, costs.threads) == (LAYERS, "float32", 1)
    assert (costs.context, costs.clock) == (24, PROCESSOR)
    timings = [each for batch in costs.batches for each in batch.parts.values()]
    assert all(each.median_s > 0 and each.repeats == 1 for each in timings)
    assert costs.energy_method in (EnergyMethod.MODELLED, EnergyMethod.ATTRIBUTED)
    assert all(each.joules is not None and each.joules > 0 for each in timings)
    if costs.energy_method is EnergyMethod.MODELLED:  # one busy core for all of its time
        watts = COEFFICIENTS["watts_per_busy_core"].value
        step = costs.batches[0].parts["step"]
        assert step.joules == pytest.approx(watts * step.median_s)
    assert set(costs.passes) == {3}
    assert [span.size for span in costs.passes[3]] == [1, 4]
    # One value gives no interval: parts by rows, spans, passes of three rows, probes.
    assert len(found.loose) == 2 * 7 + 2 * 3 + 2 * 3 + len(costs.probes) * 2 * 3
    grown = replace(QUICK, context=150)  # beyond the cache's first block
    measure_costs(engine, table_VK, grown)
    assert len(engine.generate([[3, 4]], SamplingParams(max_tokens=3))[0].token_ids) == 3
    with_softmax = costs.with_probe("softmax")
    assert with_softmax.at(2).probe_s != costs.at(2).probe_s


def test_a_recorder_measures_what_its_slots_and_exits_allow() -> None:
    recorder = TraceRecorder(WorkerSpec(model=str(REFERENCE), slots=2))
    table_VK = np.tile(np.arange(8, dtype=np.int32), (recorder.engine.stack.vocab, 1))
    recorder.prepare((6,), table_VK)
    costs = recorder.measure(0.0)
    assert [batch.size for batch in costs.batches] == [1, 2]
    costs.require_model(recorder.describe().model)
    assert leaving(costs, (6,))[0] < leaving(costs, (6,))[1]


def test_exits_with_adapter_layers_one_after_the_other_are_measured(
    table_VK: IntArray, tmp_path: Path
) -> None:
    config = EngineConfig(translators=save_adapters("llama", tmp_path / "adapters", EXITS))
    engine = AdaptiveEngine(make_model("llama"), slots=3, config=config)
    costs = measure_costs(engine, table_VK, QUICK).costs
    assert costs.layers == LAYERS
    assert costs.at(1).layer_s > 0
    assert describe(engine).adapters == EXITS


def test_it_ends_when_all_is_tight(engine: AdaptiveEngine, table_VK: IntArray) -> None:
    found = measure_costs(engine, table_VK, replace(QUICK, half_width=0.999, limit_s=1000.0))
    assert found.rounds >= LEAST_REPEATS
    assert found.loose == ()


def test_in_little_time_small_sizes_get_their_intervals(
    engine: AdaptiveEngine, table_VK: IntArray
) -> None:
    with clocked(engine) as clock:
        samples = Samples()
        rounds = Rounds(engine, clock, table_VK, QUICK, samples)
        rounds.first()
        costliest = max(range(len(rounds.cells)), key=lambda i: (rounds.rows[i], rounds.took_s[i]))
        assert rounds.rows[costliest] == 3
        rounds.took_s[costliest] = 1e6
        number = 1
        while number < LEAST_REPEATS and rounds.run(number, lambda: 1000.0):
            number += 1
    assert rounds.runs == [1 if i == costliest else 6 for i in range(len(rounds.cells))]
    assert 0 < len(samples.bare()) < len(samples.loose(0.0))
    assert not rounds.run(number, lambda: 0.0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"context": 240}, "context"),
        ({"rows": (1, 4)}, "rows"),
        ({"exits": (3, LAYERS)}, "exits"),
        ({"exits": (3, 1)}, "exits"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    engine: AdaptiveEngine, table_VK: IntArray, change: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        measure_costs(engine, table_VK, replace(QUICK, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rows": (2, 4)}, "rows"),
        ({"rows": ()}, "rows"),
        ({"tokens": (1, 1)}, "tokens"),
        ({"context": 0}, "context"),
        ({"half_width": 0.0}, "half_width"),
        ({"limit_s": math.nan}, "limit_s"),
    ],
)
def test_unusable_settings_are_named(change: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        replace(QUICK, **change)  # type: ignore[arg-type]


def test_intervals_are_order_statistics() -> None:
    assert median_interval([1.0]) == (1, 1, 1)
    assert median_interval([5, 1, 4, 2, 3, 6]) == (3.5, 1, 6)
    # Of twenty, the 6th and 15th: P(B < 6) = 0.0207 for B binomial (20, 1/2), P(B < 7) = 0.0577.
    assert median_interval([float(n) for n in range(1, 21)]) == (10.5, 6, 15)


@pytest.mark.parametrize("count", [6, 9, 20])
def test_intervals_hold_the_median_as_often_as_they_say(count: int) -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(4000):
        _, low, high = median_interval([rng.expovariate(1) for _ in range(count)])
        held += low <= math.log(2) <= high
    assert 0.95 - 0.01 < held / 4000 < 0.99


def test_a_part_is_loose_until_its_interval_is_narrow() -> None:
    samples = Samples()
    for value in (1.0, 1.01, 1.02, 1.0, 1.01):
        samples.add("rows", 1, {"layer": value, "head": value**30})
    assert len(samples.loose(0.05)) == 2  # five values give no interval
    samples.add("rows", 1, {"layer": 1.02, "head": 1.02**30})
    assert samples.loose(0.05) == [Key("rows", 1, "head")]
    assert samples.timing(Key("rows", 1, "layer")).repeats == 6


def test_joules_of_a_part_are_its_time_and_its_weights() -> None:
    energy = PartEnergy(
        EnergyMethod.MODELLED, "", watts=3.0, bytes_by_part={"head": 1000}, per_byte=1e-3
    )
    timing = Timing(median_s=2.0, low_s=1.0, high_s=3.0)
    assert energy.priced("rows", "step", timing).joules == 6
    assert energy.priced("rows", "head", timing).joules == 7
    assert energy.priced("candidates", "probe", timing).joules == 6
    assert energy.priced("softmax", "probe", timing).joules == 7  # it reads the whole head
    assert PartEnergy().priced("rows", "head", timing).joules is None
