"""Cost tables as files: what is written is read again, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offramp.controller.costs.cost_file import load_costs, save_costs, to_json
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from support.cost_tables import measured


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    save_costs(tmp_path / "costs.json", measured())
    assert load_costs(tmp_path / "costs.json") == measured()


def test_a_table_without_a_copy_says_nothing_of_one(tmp_path: Path) -> None:
    assert "copies" in to_json(measured())
    plain = replace(measured(), copies={})
    assert "copies" not in to_json(plain)
    save_costs(tmp_path / "costs.json", plain)
    assert load_costs(tmp_path / "costs.json") == plain


def test_constants_are_written_as_one_batch(tmp_path: Path) -> None:
    costs = CostTable(
        layer_s=1, head_s=2, probe_s=0, policy_s=0, fill_s=0, step_s=0, layers=8, machine="none"
    )
    save_costs(tmp_path / "costs.json", costs)
    read = load_costs(tmp_path / "costs.json")
    assert read.at(1) == costs.at(1)
    assert read.largest == 1


def first_timing(record: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = record["batches"][0]["parts"]["head"]
    return found


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version 1": (lambda r: r.pop("version"), "version: is 1, not 4"),
    "version 5": (lambda r: r.update(version=5), "version: is 5, not 4"),
    "passes of another kind": (lambda r: r.update(passes=[]), "passes: are no object"),
    "passes of one row": (lambda r: r.update(passes={"1": []}), "passes: are of"),
    "field gone": (lambda r: r.pop("threads"), r"lacks \['threads'\]"),
    "field too many": (lambda r: r.update(color="red"), r"unknown \['color'\]"),
    "a word for a number": (lambda r: r.update(layers="12"), "layers: '12' is no int"),
    "a truth for a number": (lambda r: r.update(threads=True), "threads: True is no int"),
    "copies of another kind": (lambda r: r.update(copies=[]), "copies: are no object"),
    "no batches": (lambda r: r.update(batches=[]), "batches: are empty"),
    "batches of another kind": (lambda r: r.update(batches={}), "batches: are no list"),
    "probes of another kind": (lambda r: r.update(probes=[]), "probes: are no object"),
    "part gone": (lambda r: r["batches"][0]["parts"].pop("step"), r"lacks \['step'\]"),
    "part gone later": (lambda r: r["batches"][1]["parts"].pop("step"), "batches: hold"),
    "parts of another kind": (lambda r: r["batches"][0].update(parts=3), "batches: have parts"),
    "timing of another kind": (lambda r: r["batches"][0]["parts"].update(head=3), "head: is no"),
    "timing cut": (lambda r: first_timing(r).pop("low_s"), r"lacks \['low_s'\]"),
    "negative time": (lambda r: first_timing(r).update(low_s=-1.0), "timing: -1"),
    "not a number": (lambda r: first_timing(r).update(high_s=float("nan")), "timing: "),
    "energy of no method": (lambda r: r.update(energy_method="guessed"), "energy_method"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, damage: str) -> None:
    record = to_json(measured())
    change, told = DAMAGES[damage]
    change(record)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=told) as refused:
        load_costs(path)
    assert refused.value.field == str(path)
    assert "offramp profile" in refused.value.remedy


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_costs(path)
    assert refused.value.field == str(path)


def test_a_full_disk_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "costs.json"
    save_costs(path, measured())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        save_costs(path, measured().scaled("head", 2))
    monkeypatch.undo()
    assert load_costs(path) == measured()
    assert os.listdir(tmp_path) == ["costs.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        save_costs(tmp_path / "file" / "costs.json", measured())
