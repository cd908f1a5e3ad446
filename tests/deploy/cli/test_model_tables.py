"""Several models as a file tells them: each has its own options, and those of the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offramp.deploy.cli import options
from offramp.deploy.serve.pool_config import PoolConfig
from offramp.worker.model.precision import Precision

BOTH = """
[reference]
replicas = 1

["org/quick one"]
channel = "quick"
max_replicas = 3
dtype = "bfloat16"
draft_weights = "int4:64,native"
kv_mode = "verify"
hold = ["6", "8,9"]
together = false
kv_budget_mb = 3.5
"""


@pytest.fixture
def tables(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        file = tmp_path / "models.toml"
        file.write_text(text)
        return file

    return write


def test_each_model_has_its_own_options_and_else_the_commands(
    served: Callable[..., PoolConfig],
    tables: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: 9)
    pool = served("--models", tables(BOTH), "--slots", 5, "--port", 8123, "--replicas", 2)
    first, second = pool.models
    assert pool.port == 8123
    assert (first.name, second.name) == ("reference", "org/quick one")
    assert (first.replicas, second.replicas, second.most_replicas) == (1, 2, 3)
    assert first.worker.slots == second.worker.slots == 5
    assert (first.channel, second.channel) == ("default", "quick")
    assert (first.worker.dtype, second.worker.dtype) == ("float32", "bfloat16")
    assert first.worker.engine.kv_mode == "project"
    engine = second.worker.engine
    assert engine.kv_mode == "verify"
    assert engine.draft_precision == Precision(weights="int4", group_size=64, head="native")
    assert engine.schedule.holds == (6, 8, 9)
    assert engine.kv_budget_mb == 3.5
    assert first.worker.threads == 9 // (1 + 3)


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ("", "models", "is empty"),
        ("[a\n", "models", "is no TOML"),
        ("replicas = 2\n", "models", "says 'replicas' outside of a table"),
        ("[a]\nport = 8000\n", "models: a.port", "is no option of a model"),
        ("[a]\nreplica = 1\n", "models: a.replica", "Use channel, classify"),
        ("[a]\nreplicas = 0\n", "models: a.replicas", "greater than or equal to 1"),
        ("[a]\nslots = 'many'\n", "models: a.slots", "a valid integer"),
        ("[a]\n[b]\nmodel = 'models/minilm'\n", "channel", "a release is for one"),
        ("[a]\ntarget_tokens = 9\n", "target_tokens", "the pool does not grow"),
        ("[a]\nchannel = 'no such name'\n", "OFFRAMP_CHANNEL", "match pattern"),
    ],
)
def test_what_is_no_model_is_named(
    cli: Any, tables: Callable[[str], Path], text: str, field: str, problem: str
) -> None:
    message = cli.refused("serve", "--models", tables(text))
    assert message.startswith(f"{field}: ")
    assert problem in message


def test_a_file_that_is_not_there_and_a_name_beside_it_are_refused(
    cli: Any, tables: Callable[[str], Path], tmp_path: Path
) -> None:
    assert "cannot be read" in cli.refused("serve", "--models", tmp_path / "none.toml")
    named = cli.refused("serve", "--models", tables(BOTH), "--served-model-name", "x")
    assert named.startswith("served_model_name: ")
