"""``offramp profile`` as it is typed, and its table in the hands of other commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.controller.costs.cost_file import load_costs
from offramp.worker.model.loading import load_model, model_fingerprint

SMALL = ("--rows", "1", "--tokens", "1,2", "--context", 8, "--exits", "6", "--limit-s", 0)


def test_profile_writes_a_table_and_says_what_it_is_worth(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "new" / "costs.json"
    status, output = cli("profile", "--out", out, *SMALL, "--draft-weights", "int4")
    assert status == 0, output
    costs = load_costs(out)
    assert costs.model == model_fingerprint(load_model("models/reference", torch.float32, "cpu"))
    assert (costs.layers, costs.largest, costs.context) == (12, 1, 8)
    assert costs.on_copy("int4").layer_s > 0
    assert costs.on_copy("int4").step_s == costs.step_s
    assert "layer, copy in int4" in output
    assert "warning no interval (±?) of rows 1, tokens 1" in output
    assert f"({costs.energy_method}: " in output


@pytest.mark.parametrize(
    ("option", "value", "field", "said"),
    [
        ("--rows", "2,4", "rows", "do not ascend from 1"),
        ("--rows", "x", "rows", "is no list"),
        ("--tokens", "1,1", "tokens", "does not ascend"),
        ("--exits", "12", "exits", "within [1, 11]"),
        ("--context", "1020", "context", "exceed the model's 1024"),
        ("--half-width", "0", "half_width", "not in (0, 1)"),
        ("--limit-s", "nan", "limit_s", "no number of seconds"),
        ("--candidates", "5000", "candidates", "exceed the vocabulary of 4096"),
        ("--dtype", "float16", "dtype", ""),
        ("--model", "no/such/model", "model", ""),
    ],
)
def test_profile_names_the_bad_option(
    cli: Any,
    tmp_path: Path,
    untouched: Callable[[], None],
    option: str,
    value: str,
    field: str,
    said: str,
) -> None:
    untouched()
    message = cli.refused("profile", "--out", tmp_path / "costs.json", option, value)
    assert message.startswith(f"{field}: ")
    assert said in message


@pytest.mark.parametrize("place", ["folder", "below a file"])
def test_profile_names_a_file_that_cannot_be_written(
    cli: Any, tmp_path: Path, untouched: Callable[[], None], place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    untouched()
    out = tmp_path / "folder" if place == "folder" else tmp_path / "file" / "costs.json"
    assert cli.refused("profile", "--out", out, *SMALL).startswith("out: ")


def test_profile_refuses_traces_without_a_candidate_table(
    cli: Any, tmp_path: Path, untouched: Callable[[], None]
) -> None:
    untouched()
    traces = tmp_path / "none"
    message = cli.refused("profile", "--out", tmp_path / "c.json", "--traces", traces, *SMALL)
    assert message.startswith(str(traces))


def test_a_table_is_strict_json(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    cli("profile", "--out", out, *SMALL)
    record = json.loads(out.read_text())
    assert record["version"] == 4
    assert [batch["size"] for batch in record["spans"]] == [1, 2]
