from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offramp.agents.calibration.pick import EVALUATION, Wish, load_rows, pick
from offramp.controller.errors import ConfigError

Rows = dict[str, list[dict[str, Any]]]


def row(setting: float, agreement: float, wall: float | None, **more: Any) -> dict[str, Any]:
    return {
        "policy": f"PPO λ={setting}",
        "family": "PPO",
        "setting": setting,
        "agreement": agreement,
        "mean_layers": 12 - 4 * setting,
        "wall_ratio": wall,
        **more,
    }


@pytest.fixture
def rows() -> Rows:
    return {
        "validation": [row(0.2, 0.96, None), row(0.5, 0.92, None), row(1.0, 0.85, None)],
        "test": [row(0.2, 0.95, 0.9), row(0.5, 0.93, 0.8), row(1.0, 0.84, 0.7)],
    }


def test_a_quality_is_kept_as_cheaply_as_was_measured(rows: Rows) -> None:
    found = pick(rows, "PPO", Wish(quality=0.9))
    assert (found.setting, found.value, found.split) == (0.5, 0.92, "validation")
    assert pick(rows, "PPO", Wish(quality=0.95)).setting == 0.2


def test_a_budget_buys_the_most_quality_and_names_the_documents(rows: Rows) -> None:
    found = pick(rows, "PPO", Wish(latency=0.85))
    assert (found.setting, found.value, found.split) == (0.5, 0.8, "test")
    for each in rows["validation"]:
        each["wall_ratio"] = 0.95
    assert pick(rows, "PPO", Wish(latency=0.96)).split == "validation"
    rows["test"] = [row(0.2, 0.95, 0.9, energy_ratio=0.7), row(0.5, 0.93, 0.8, energy_ratio=0.5)]
    assert pick(rows, "PPO", Wish(energy=0.6)).setting == 0.5


def test_an_energy_budget_reads_validation_and_says_the_method(rows: Rows) -> None:
    for split, shares in (("validation", (0.9, 0.7, 0.5)), ("test", (0.8, 0.6, 0.4))):
        for each, share in zip(rows[split], shares, strict=True):
            each.update(energy_ratio=share, energy_method="measured_shared")
    found = pick(rows, "PPO", Wish(energy=0.8))
    assert (found.setting, found.value, found.split) == (0.5, 0.7, "validation")
    assert found.how == " (energy, measured shared)"
    assert pick(rows, "PPO", Wish(latency=0.85)).how == ""
    with pytest.raises(ConfigError) as told:
        pick(rows, "PPO", Wish(energy=0.3))
    assert told.value.field == "energy_budget"
    assert told.value.problem.endswith("within 0.3; the least is 0.5 (energy, measured shared)")
    assert "--targets" in told.value.remedy


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({}, "run `offramp evaluate` again"),
        ({"energy_ratio": None, "energy_method": "unavailable"}, "where joules can be had"),
    ],
)
def test_an_evaluation_without_energy_says_what_to_do(
    rows: Rows, more: dict[str, Any], remedy: str
) -> None:
    for each in (*rows["validation"], *rows["test"]):
        each.update(more)
    with pytest.raises(ConfigError, match="the evaluation has no energy_ratio of 'PPO'") as told:
        pick(rows, "PPO", Wish(energy=0.9))
    assert remedy in told.value.remedy


def test_what_no_point_fulfils_is_said_with_the_nearest(rows: Rows) -> None:
    with pytest.raises(ConfigError, match=r"quality: no measured point keeps 0.99; the best 0.96"):
        pick(rows, "PPO", Wish(quality=0.99))
    with pytest.raises(ConfigError, match=r"latency_budget: .* within 0.5; the least is 0.7"):
        pick(rows, "PPO", Wish(latency=0.5))
    with pytest.raises(ConfigError, match=r"the evaluation has no energy_ratio of 'PPO'"):
        pick(rows, "PPO", Wish(energy=0.5))
    with pytest.raises(ConfigError, match=r"the evaluation has no agreement of 'p̂'"):
        pick(rows, "p̂", Wish(quality=0.5))


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        ({}, "quality"),
        ({"quality": 0.9, "latency": 0.9}, "quality"),
        ({"quality": 1.5}, "quality"),
        ({"latency": 0.0}, "latency_budget"),
        ({"energy": float("nan")}, "energy_budget"),
    ],
)
def test_a_wish_is_one_thing_within_its_range(wish: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        Wish(**wish)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"validation": []}', '{"validation": 3}'])
def test_an_unreadable_evaluation_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / EVALUATION).write_text(content)
    with pytest.raises(ConfigError, match=r"evaluation\.json is no readable evaluation"):
        load_rows(tmp_path)


def test_a_saved_evaluation_is_read_by_split(tmp_path: Path, rows: Rows) -> None:
    (tmp_path / EVALUATION).write_text(json.dumps({**rows, "chosen": "x"}))
    assert load_rows(tmp_path) == rows
