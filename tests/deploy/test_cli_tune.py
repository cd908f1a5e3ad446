"""``offramp tune`` as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.recordings import make_corpus

SMALL = ("--steps", 2, "--batch-tokens", 64, "--length", 32, "--held-out", 2)


def test_tune_prints_each_exit_before_and_after(cli: Any, tmp_path: Path) -> None:
    out, corpus = tmp_path / "out", make_corpus(tmp_path / "corpus")
    status, output = cli(
        "tune", "--out", out, "--corpus", corpus, "--exits", "3,9", "--rank", 2, *SMALL
    )
    assert status == 0, output
    lines = [line.split() for line in output.splitlines()]
    assert [line[0] for line in lines if "→" in line][:5] == ["3", "9", "full", "3", "9"]
    assert {path.name for path in out.iterdir()} == {
        "candidates.npy",
        "checkpoint.pt",
        "own_text.jsonl",
        "translators.safetensors",
        "tune.json",
        "tune.png",
    }


@pytest.mark.parametrize(
    ("option", "value", "field", "said"),
    [
        ("--exits", "3,12", "exits", "The model has 12 layers"),
        ("--exits", "x", "exits", "Write it like 3,6,9"),
        ("--rank", "0", "rank", "below 1"),
        ("--kind", "tree", "kind", "translator or layer"),
        ("--steps", "0", "steps", "below 1"),
        ("--lr", "-1", "lr", "not in (0, 1]"),
        ("--batch-tokens", "100", "batch_tokens", "no multiple"),
        ("--model", "nowhere", "model", "there is no folder"),
        ("--corpus", "nowhere", "corpus", "is no folder"),
        ("--dtype", "int8", "dtype", "unknown"),
        ("--device", "tpu", "device", "unknown"),
    ],
)
def test_an_unusable_option_is_named_and_nothing_written(
    cli: Any,
    tmp_path: Path,
    untouched: Callable[[], None],
    option: str,
    value: str,
    field: str,
    said: str,
) -> None:
    untouched()
    message = cli.refused("tune", "--out", tmp_path / "out", option, value)
    assert message.startswith(f"{field}: ")
    assert said in message


def test_a_folder_in_use_is_refused(
    cli: Any, tmp_path: Path, untouched: Callable[[], None]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    untouched()
    assert cli.refused("tune", "--out", tmp_path).startswith("out: ")


def test_a_folder_that_is_not_ours_is_not_resumed(
    cli: Any, tmp_path: Path, untouched: Callable[[], None]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    untouched()
    message = cli.refused("tune", "--out", tmp_path, "--resume", *SMALL)
    assert message.startswith("resume: ")
    assert "no checkpoint of `offramp tune`" in message


def test_tune_kv_prints_what_the_fill_destroys(cli: Any, tmp_path: Path) -> None:
    out, corpus = tmp_path / "out", make_corpus(tmp_path / "corpus")
    few = ("--kv", "--corpus", corpus, "--length", 40, "--held-out", 2)
    status, output = cli("tune", "--out", out, "--exits", "6,9", "--rank", 4, *few)
    assert status == 0, output
    rows = [line.split() for line in output.splitlines()]
    assert [row[0] for row in rows if len(row) == 3 and row[0].isdigit()] == ["6", "9"]
    assert {path.name for path in out.iterdir()} == {"translators.safetensors", "tune.json"}
    facts = json.loads((out / "tune.json").read_text())
    assert (facts["kind"], facts["exits"], facts["kv"]["rank"]) == ("kv", [6, 9], 4)
    both = tmp_path / "both"
    status, output = cli("tune", "--out", both, "--translators", out, "--rank", 2, *few)
    assert status == 0, output
    assert json.loads((both / "tune.json").read_text())["exits"] == [6, 9]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--kv", "--steps", "3"), "steps: means nothing with --kv"),
        (("--kv", "--kind", "layer"), "kind: means nothing with --kv"),
        (("--kv", "--resume"), "resume: means nothing with --kv"),
        (("--kv", "--exits", "3,12"), "exits: 3,12 do not ascend"),
        (("--kv", "--rank", "0"), "rank: 0 is below 1"),
        (("--kv", "--held-out", "0.3"), "held_out: 0.3 is no number of documents"),
        (("--held-out", "nan"), "held_out: nan is no number of documents"),
        (("--kv", "--exits", "3", "--translators", "x"), "exits: are those of --translators"),
        (("--translators", "x"), "translators: means nothing without --kv"),
    ],
)
def test_an_option_that_does_not_fit_kv_is_refused(
    cli: Any, tmp_path: Path, untouched: Callable[[], None], options: tuple[str, ...], said: str
) -> None:
    untouched()
    assert said in cli.refused("tune", "--out", tmp_path / "out", *options)


def labelled(path: Path) -> Path:
    lines = ["text,category", *(f"w{n} good fine,a\nw{n} bad poor,b" for n in range(20))]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tune_fits_heads_that_classify(cli: Any, tmp_path: Path) -> None:
    data, out = labelled(tmp_path / "data.csv"), tmp_path / "out"
    status, output = cli(
        "tune", "--task", "classify", "--data", data, "--out", out, "--exits", "2,6"
    )
    assert status == 0, output
    lines = [line.split() for line in output.splitlines()]
    assert [line[0] for line in lines if "→" in line][:3] == ["2", "6", "full"]
    assert "2 classes, 28 texts learned from" in output
    assert json.loads((out / "tune.json").read_text())["labels"] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "field", "said"),
    [
        (("--task", "classify"), "data", "Name a .csv or .jsonl file"),
        (("--task", "classify", "--data", "d.csv", "--steps", 9), "steps", "with --task classify"),
        (("--task", "classify", "--data", "d.csv", "--pool", "max"), "pool", "mean, first, last"),
        (("--task", "classify", "--data", "d.csv", "--held-out", 3), "held_out", "within (0, 1)"),
        (("--task", "classify", "--data", "d.txt"), "data", "neither .csv nor .jsonl"),
        (("--task", "rank"), "task", "tokens or classify"),
        (("--data", "d.csv"), "data", "without --task classify"),
    ],
)
def test_what_cannot_be_classified_is_named(
    cli: Any,
    tmp_path: Path,
    untouched: Callable[[], None],
    arguments: tuple[Any, ...],
    field: str,
    said: str,
) -> None:
    untouched()
    message = cli.refused("tune", "--out", tmp_path / "out", *arguments)
    assert message.startswith(f"{field}: ")
    assert said in message
