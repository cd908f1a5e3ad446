"""Energy: counters that are there are read, others are named as missing, and none is ever zero."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offramp.controller.costs.readings import EnergyMethod, EnergyReading, total, unavailable
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.energy import COEFFICIENTS, EnergyModel, Meter, open_meter
from offramp.worker.energy.meter import NoSource
from offramp.worker.energy.modelled import MemoryTraffic, ModelledSource, weight_bytes
from offramp.worker.energy.nvml import NvmlSource, open_nvml
from offramp.worker.energy.rapl import open_rapl
from support.models import LAYERS, make_model

LIMIT = 1_000_000


def domain(root: Path, name: str, label: str, energy_uj: int) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{LIMIT - 1}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder


def advance(folder: Path, microjoules: int) -> None:
    file = folder / "energy_uj"
    file.write_text(f"{(int(file.read_text()) + microjoules) % LIMIT}\n")


@pytest.fixture
def domains(tmp_path: Path) -> list[Path]:
    """Two packages and memory, and what they contain or are contained in."""
    domain(tmp_path, "intel-rapl:0:0", "core", 5)
    domain(tmp_path, "intel-rapl:2", "psys", 5)
    return [
        domain(tmp_path, "intel-rapl:0", "package-0", 100),
        domain(tmp_path, "intel-rapl:0:1", "dram", 0),
        domain(tmp_path, "intel-rapl:1", "package-1", LIMIT - 10),
    ]


def test_packages_and_memory_are_added_and_wraps_survived(
    tmp_path: Path, domains: list[Path]
) -> None:
    def work() -> None:
        for folder in domains:
            advance(folder, 1)

    source, why = open_rapl(tmp_path, work)
    assert (why, source is not None) == ("", True)
    meter = Meter(source)  # type: ignore[arg-type]
    with meter.measure() as span:
        for microjoules, folder in zip((200, 30, 4000), domains, strict=True):
            advance(folder, microjoules)
    assert int((domains[2] / "energy_uj").read_text()) < 4000  # it did start again
    assert span.reading.joules == pytest.approx(4230e-6)
    assert span.reading.method is EnergyMethod.MEASURED_SHARED
    assert span.reading.source == "RAPL package-0, dram, package-1"
    assert span.reading.window_s > 0


def test_a_counter_that_does_not_move_is_none(tmp_path: Path, domains: list[Path]) -> None:
    source, why = open_rapl(tmp_path, lambda: advance(domains[0], 1))
    assert source is None
    assert why == "RAPL counters do not move: dram, package-1"


@pytest.mark.parametrize("damage", ["unreadable", "no number"])
def test_a_counter_that_cannot_be_read_is_none(
    tmp_path: Path, domains: list[Path], damage: str
) -> None:
    file = domains[1] / "energy_uj"
    if damage == "unreadable":
        file.unlink()
        file.mkdir()
    else:
        file.write_text("many\n")
    source, why = open_rapl(tmp_path)
    assert source is None
    assert why.startswith("RAPL counters cannot be read (")


def test_without_counters_the_place_is_named(tmp_path: Path) -> None:
    assert open_rapl(tmp_path) == (None, f"no RAPL counters under {tmp_path}")
    assert open_rapl(tmp_path / "none")[0] is None


def test_without_nvml_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml() == (None, "nvidia-ml-py is not installed")


class NVMLError(Exception):
    """As the package names it."""


def nvml_of(millijoules: list[int], users: int) -> SimpleNamespace:
    """The four functions that are used, of a GPU that this machine has not."""
    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: millijoules.pop(0),
        nvmlDeviceGetComputeRunningProcesses=lambda _: [0] * users,
    )


@pytest.mark.parametrize(
    ("users", "method"), [(1, EnergyMethod.MEASURED_DEVICE), (2, EnergyMethod.MEASURED_SHARED)]
)
def test_a_gpus_millijoules(users: int, method: EnergyMethod) -> None:
    meter = Meter(NvmlSource(nvml_of([5, 1000, 3500], users), 0))
    with meter.measure() as span:
        pass
    assert span.reading.joules == pytest.approx(2.5)
    assert (span.reading.method, span.reading.scope) == (method, "GPU 0")


def test_a_gpu_without_a_counter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise NVMLError("Not Supported")

    nvml = nvml_of([], 1)
    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert open_nvml(3) == (None, "NVML has no energy counter of GPU 3 (Not Supported)")


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(make_model("llama"))


def decode(engine: AdaptiveEngine, layer: int | None = None) -> None:
    policy = None if layer is None else FixedExit(layer)
    engine.generate([[3, 4, 5]], SamplingParams(max_tokens=9, ignore_eos=True), policy)


def test_traffic_is_that_of_the_layers_and_heads_run(engine: AdaptiveEngine) -> None:
    layer, head = weight_bytes(engine.stack.blocks[0]), weight_bytes(engine.stack.head)
    traffic = MemoryTraffic(engine)
    decode(engine)
    assert traffic.close() == 9 * (LAYERS * layer + head)
    decode(engine)
    assert traffic.bytes == 9 * (LAYERS * layer + head)  # nothing is counted any more
    assert "fill" not in vars(engine.decoder.projector)


def test_exits_save_traffic_and_fills_are_counted(engine: AdaptiveEngine) -> None:
    layer, head = weight_bytes(engine.stack.blocks[0]), weight_bytes(engine.stack.head)
    calls: list[int] = []
    projector = engine.decoder.projector
    assert projector is not None
    fill_in: Callable[..., object] = projector.fill
    projector.fill = lambda *args: calls.append(args[1]) or fill_in(*args)  # type: ignore
    traffic = MemoryTraffic(engine)
    engine.generate([[3] * 40], SamplingParams(max_tokens=40, ignore_eos=True), FixedExit(2))
    counted = traffic.close()
    vars(projector).pop("fill", None)
    fill = sum(LAYERS - first for first in calls) * projector.rows * projector.weight_RD[0].nbytes
    assert calls
    assert counted == LAYERS * layer + 39 * 2 * layer + 40 * head + fill


def test_the_model_is_its_formula(engine: AdaptiveEngine) -> None:
    model = EnergyModel()
    watts, per_byte = COEFFICIENTS["watts_per_busy_core"], COEFFICIENTS["joules_per_dram_byte"]
    assert model.joules(2, 0) == 2 * watts.value
    assert model.joules(0, 1e9) == pytest.approx(1e9 * per_byte.value)
    width = (watts.high - watts.low) / 2 / watts.value
    assert model.uncertainty(2, 0) == pytest.approx(width)
    assert model.uncertainty(0, 0) is None
    assert all(each.low < each.value < each.high for each in COEFFICIENTS.values())


def test_a_modelled_reading_says_so(engine: AdaptiveEngine) -> None:
    meter = Meter(ModelledSource(engine))
    with meter.measure() as span:
        decode(engine)
    reading = span.reading
    assert reading.method is EnergyMethod.MODELLED
    assert "3 W" in reading.source
    assert reading.joules is not None
    assert reading.joules > EnergyModel().joules(0, 9 * weight_bytes(engine.stack.head))
    assert reading.uncertainty is not None


def test_work_that_fails_leaves_nothing_hooked(engine: AdaptiveEngine) -> None:
    meter = Meter(ModelledSource(engine))
    with pytest.raises(ZeroDivisionError), meter.measure() as span:
        _ = 1 / 0
    assert not any(block._forward_hooks for block in engine.stack.blocks)
    with pytest.raises(AssertionError):
        _ = span.reading


def test_the_engines_device_decides(engine: AdaptiveEngine) -> None:
    meter = open_meter(engine)
    with meter.measure() as span:
        decode(engine)
    assert span.reading.method in (EnergyMethod.MEASURED_SHARED, EnergyMethod.MODELLED)
    assert span.reading.joules is not None


def test_an_unknown_device_has_unknown_energy() -> None:
    stack = SimpleNamespace(device=torch.device("meta"))
    meter = open_meter(SimpleNamespace(stack=stack))  # type: ignore[arg-type]
    with meter.measure() as span:
        pass
    assert span.reading.joules is None
    assert span.reading.method is EnergyMethod.UNAVAILABLE


def reading(joules: float, **changes: object) -> EnergyReading:
    values = {"method": EnergyMethod.MODELLED, "source": "a", "scope": "b", "window_s": 2.0}
    return EnergyReading(joules=joules, **{**values, **changes})  # type: ignore[arg-type]


def test_readings_of_one_kind_are_added() -> None:
    both = total([reading(1, uncertainty=0.1), reading(2, uncertainty=0.3)])
    assert (both.joules, both.window_s, both.uncertainty) == (3, 4, 0.3)
    assert both.watts == 0.75


def test_an_unknown_part_makes_the_sum_unknown() -> None:
    unknown = unavailable(1, "no counter")
    assert total([unknown, unknown]).joules is None
    assert unknown.watts is None


@pytest.mark.parametrize(
    "other",
    [
        reading(1, method=EnergyMethod.MEASURED_SHARED),
        reading(1, source="other coefficients"),
        reading(1, scope="GPU 0"),
        unavailable(1, "no counter"),
    ],
)
def test_readings_of_different_kinds_are_not(other: EnergyReading) -> None:
    with pytest.raises(ConfigError, match="cannot be added up"):
        total([reading(1), other])
    with pytest.raises(ConfigError, match="no readings"):
        total([])


@pytest.mark.parametrize(
    ("joules", "method"),
    [
        (0.0, EnergyMethod.UNAVAILABLE),
        (None, EnergyMethod.MODELLED),
        (float("nan"), EnergyMethod.MODELLED),
        (-1.0, EnergyMethod.MEASURED_DEVICE),
    ],
)
def test_no_reading_pretends_to_know(joules: float | None, method: EnergyMethod) -> None:
    with pytest.raises(ConfigError, match="joules"):
        EnergyReading(joules=joules, method=method, source="a", scope="b", window_s=1)


def test_where_nothing_is_there_the_reason_is_the_source() -> None:
    meter = Meter(NoSource("nothing here"))
    with meter.measure() as span:
        pass
    assert span.reading.source == "nothing here"
