"""The engine's settings as they are typed: they reach the workers, and bad ones are named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.controller.costs.cost_file import load_costs, save_costs
from offramp.deploy.cli import options, record_drift
from offramp.deploy.demo import demo_command
from offramp.deploy.demo.demo_config import DemoConfig
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.serve.pool_config import PoolConfig
from offramp.worker import AdaptiveEngine, EngineConfig, Schedule
from offramp.worker.model.precision import Precision
from offramp.worker.model.translators import ExitTranslators, Translator
from offramp.worker.spec import WorkerSpec, load_engine
from support.cost_tables import measured

Untouched = Callable[[], None]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Translators of the reference model, and beside them some of another."""
    folder = tmp_path_factory.mktemp("tuned")
    stack = (engine := load_engine(WorkerSpec(model="models/reference"))).stack
    zeros = Translator(
        torch.zeros(2, stack.width), torch.zeros(stack.width, 2), torch.zeros(stack.width)
    )
    for name, model in (("right", engine.model_fingerprint), ("foreign", "f" * 64)):
        facts = {"model": model, "layers": stack.layers, "width": stack.width}
        ExitTranslators({6: zeros}).save(folder / name, facts)
    return folder


def test_settings_left_out_are_the_engines_own(served: Callable[..., PoolConfig]) -> None:
    assert served().models[0].worker.engine == EngineConfig()
    assert served().limits == HttpLimits()


def test_every_limit_reaches_the_pool(served: Callable[..., PoolConfig]) -> None:
    pool = served(
        *("--max-body-bytes", 1000, "--max-choices", 3, "--deadline", 2.5, "--drain", 7),
        *("--slots", 5, "--max-waiting", 6),
    )
    assert pool.limits == HttpLimits(body_bytes=1000, choices=3, deadline_s=2.5, drain_s=7.0)
    assert pool.models[0].room == 5 + 6


def test_a_limit_that_nothing_is_within_is_named(cli: Any) -> None:
    status, output = cli("serve", "--deadline", 0)
    assert status == 1
    assert "deadline_s" in output


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_reach_the_workers(served: Callable[..., PoolConfig], dtype: str) -> None:
    asked = ("--dtype", dtype, "--weights", "int8", "--draft-weights", "int4:64,native")
    engine = served(*asked).models[0].worker.engine
    assert engine.precision == Precision(weights="int8")
    assert engine.draft_precision == Precision(weights="int4", group_size=64, head="native")


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (("--weights", "int3", "--dtype", "bfloat16"), "int3"),
        (("--draft-weights", "native"), "draft_weights"),
        (("--draft-weights", "int4:128,int4", "--dtype", "bfloat16"), "group_size"),
    ],
)
def test_weights_that_cannot_be_had_are_refused_before_anything_starts(
    cli: Callable[..., tuple[int, str]], asked: tuple[str, ...], problem: str
) -> None:
    status, output = cli("serve", *asked)
    assert status != 0
    assert problem in output


@pytest.mark.parametrize("hold", [["--hold", "3,6"], ["--hold", "3", "--hold", "6"]])
def test_every_setting_reaches_the_workers(
    served: Callable[..., PoolConfig], tuned: Path, hold: list[str]
) -> None:
    engine = (
        served(
            *("--kv-mode", "verify", *hold, "--hold-rows", 2, "--hold-patience", 0),
            *("--prefill-tokens", 32, "--max-pending", 3, "--kv-budget-mb", 64.5),
            *("--prefix-cache-mib", 32),
            *("--translators", tuned / "right"),
        )
        .models[0]
        .worker.engine
    )
    assert engine == EngineConfig(
        kv_mode="verify",
        schedule=Schedule(holds=(3, 6), rows=2, patience=0),
        prefill_tokens=32,
        max_pending=3,
        kv_budget_mb=64.5,
        prefix_cache_mib=32,
        translators=tuned / "right",
    )


def test_a_pool_can_verify_together_or_be_paced_by_costs(
    served: Callable[..., PoolConfig], tmp_path: Path
) -> None:
    together = served("--kv-mode", "verify", "--together", "--hold-rows", 2).models[0].worker.engine
    assert together.schedule == Schedule(together=True, rows=2)
    save_costs(tmp_path / "own", measured())
    paced = served("--kv-mode", "verify", "--costs", tmp_path / "own").models[0].worker.engine
    assert paced.schedule == Schedule(costs=load_costs(tmp_path / "own"))


def test_costs_of_another_model_are_refused_before_anything_is_started(
    cli: Any, untouched: Untouched, tmp_path: Path
) -> None:
    save_costs(tmp_path / "foreign", measured())
    untouched()
    assert "were measured on model" in cli.refused("serve", "--costs", tmp_path / "foreign")


def test_a_worker_loads_with_its_settings(tuned: Path) -> None:
    config = EngineConfig(
        kv_mode="defer", schedule=Schedule(holds=(6,)), max_pending=2, translators=tuned / "right"
    )
    spec = WorkerSpec(model="models/reference", slots=2, engine=config)
    assert pickle.loads(pickle.dumps(spec)) == spec  # it travels to another process
    engine = load_engine(spec)
    assert isinstance(engine, AdaptiveEngine)
    assert engine.config == config
    assert engine.decoder.context.max_pending == 2
    assert engine.decoder.translators.exits == (6,)


@pytest.mark.parametrize(
    ("arguments", "field", "said"),
    [
        (["--kv-mode", "exact"], "kv_mode", "Use one of project, defer, verify"),
        (["--hold", "6,3"], "hold", "does not ascend"),
        (["--hold", "6", "--hold", "6"], "hold", "does not ascend"),
        (["--hold", "0"], "hold", "does not ascend"),
        (["--hold", "x"], "hold", "no list of layers"),
        (["--hold", "3,12"], "hold", "12 is not below the model's 12 layers"),
        (["--hold", "3", "--hold-rows", "0"], "hold_rows", "below 1"),
        (["--hold", "3", "--hold-patience", "-1"], "hold_patience", "below 0"),
        (["--hold-rows", "2"], "hold_rows", "does nothing without a hold"),
        (["--hold-patience", "2"], "hold_patience", "does nothing without a hold"),
        (["--hold", "3", "--together"], "hold", "are set where rows go deep together"),
        (["--costs", "no/such/file.json"], "no/such/file.json", "is unreadable"),
        (["--prefill-tokens", "0"], "prefill_tokens", "below 1"),
        (["--max-pending", "0"], "max_pending", "below 1"),
        (["--kv-budget-mb", "0"], "kv_budget_mb", "no amount of memory"),
        (["--kv-budget-mb", "-1"], "kv_budget_mb", "no amount of memory"),
        (["--kv-budget-mb", "nan"], "kv_budget_mb", "no amount of memory"),
        (["--kv-budget-mb", "inf"], "kv_budget_mb", "no amount of memory"),
        (["--kv-budget-mb", "0.01"], "kv_budget_mb", "less than 128 tokens in every slot"),
        (["--translators", "no/such/folder"], "translators", "holds no readable tune.json"),
        (["--threads", "0"], "threads", "no number of threads"),
        (["--threads", "-1"], "threads", "no number of threads"),
        (["--threads", "many"], "threads", "no number of threads"),
    ],
)
def test_serve_names_the_bad_setting(
    cli: Any, untouched: Untouched, arguments: list[str], field: str, said: str
) -> None:
    untouched()
    message = cli.refused("serve", *arguments)
    assert message.startswith(f"{field}: ")
    assert said in message


@pytest.mark.parametrize("command", ["serve", "record"])
def test_translators_of_another_model_are_refused_before_anything_is_started(
    cli: Any, tmp_path: Path, untouched: Untouched, tuned: Path, command: str
) -> None:
    out = ["--out", tmp_path / "out"] if command == "record" else []
    untouched()
    message = cli.refused(command, *out, "--translators", tuned / "foreign")
    assert message.startswith("translators: ")
    assert "was fitted to the model" in message


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--kv-mode", "exact"], "kv_mode"),
        (["--kv-mode", "verify"], "kv_mode"),
        (["--max-pending", "0"], "max_pending"),
    ],
)
def test_evaluate_names_the_bad_setting(
    cli: Any, tmp_path: Path, untouched: Untouched, arguments: list[str], field: str
) -> None:
    untouched()
    message = cli.refused("evaluate", "--traces", "none", "--policies", "none", *arguments)
    assert message.startswith(f"{field}: ")


@pytest.mark.parametrize("cores", [1, 2, 7, 16])
def test_automatic_threads_share_the_cores(
    served: Callable[..., PoolConfig], monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: cores)
    assert served().models[0].worker.threads == max(1, cores // 2)
    assert served("--replicas", 3).models[0].worker.threads == max(1, cores // 3)
    assert served("--replicas", 3, "--threads", 5).models[0].worker.threads == 5


def test_usable_cores_are_those_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert options.usable_cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    assert options.usable_cores() == 9
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert options.usable_cores() == 1


def test_recorders_and_the_demos_workers_share_the_cores_too(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: 8)
    found: list[int] = []

    def recordable(config: Any, *_: Any) -> None:
        found.append(config.worker.threads)
        raise OSError("enough was seen")

    def demo(config: DemoConfig, _: Any) -> None:
        found.append(config.threads)

    monkeypatch.setattr(record_drift, "_require_recordable", recordable)
    monkeypatch.setattr(demo_command, "run_demo", demo)
    cli("record", "--out", tmp_path / "out", "--recorders", 4)
    cli("record", "--out", tmp_path / "out", "--threads", 3)
    cli("demo", "--out", tmp_path / "out")
    cli("demo", "--out", tmp_path / "out", "--quick", "--threads", 1)
    assert found == [2, 3, 4, 1]
    assert cli.refused("demo", "--out", tmp_path / "out", "--threads", "0").startswith("threads: ")
