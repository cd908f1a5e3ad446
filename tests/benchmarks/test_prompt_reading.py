"""The benchmark of exits in the prompt: its needles, its intervals, and what it times."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from offramp.agents.evaluation.lines import Line
from offramp.controller.policies.protocols import FixedExit
from offramp.worker.model.loading import load_model, load_tokenizer, parse_dtype

ROOT = Path(__file__).parents[2]
PROMPT = 512


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    path = ROOT / "benchmarks" / "learning" / "prompt_reading.py"
    return SimpleNamespace(**runpy.run_path(str(path)))


def test_needles_stand_as_far_from_their_question_as_is_said(bench: SimpleNamespace) -> None:
    tokenizer = load_tokenizer(ROOT / "models" / "reference")
    line = Line(prompt=(300,) * PROMPT, target="")
    [first, second] = bench.needles_of(tokenizer, [bench.ReadTask(0, line, ())] * 2, 100)
    assert len(first.prompt) == len(second.prompt) == PROMPT
    text = tokenizer.decode(list(first.prompt))
    value = tokenizer.decode(list(first.following))
    assert text.endswith('assert BIRCH_0 == "')
    fact = text.index(f'BIRCH_0 = "{value}')
    filler = tokenizer.decode([300])
    assert text[fact:].count(filler) >= 100 > text[fact:].count(filler) - 20
    assert first.following != second.following


def test_a_mean_of_documents_lies_in_its_interval_and_a_sure_one_is_sharp(
    bench: SimpleNamespace,
) -> None:
    tasks = [SimpleNamespace(document=n // 2) for n in range(40)]
    mean, low, high = bench.with_interval(tasks, np.arange(40.0))
    assert mean == 19.5
    assert low < mean < high
    assert bench.with_interval(tasks, np.full(40, 2.0), np.full(40, 4.0)) == (0.5, 0.5, 0.5)


def test_a_reading_with_exits_is_measured_against_full_depth(bench: SimpleNamespace) -> None:
    """On the reference model, of prompts of other text than the benchmark's: no time is judged."""
    folder = ROOT / "models" / "reference"
    model, tokenizer = load_model(folder, parse_dtype("float32"), "cpu"), load_tokenizer(folder)
    tokens = tokenizer.encode("def f(x):\n    return x\n\n" * 100)
    prompt = tuple(tokens[:PROMPT])
    task = bench.ReadTask(0, Line(prompt=prompt, target="def f(x):"), tuple(tokens[:8]))
    ways = (bench.Reading("full", None), bench.Reading("fixed", FixedExit(6)))
    needles = bench.needles_of(tokenizer, [task], 100)
    found = [bench.outcome_of(way.engine(model, tokenizer, None), [task], needles) for way in ways]
    kept = 4 + 32
    assert found[0].layer_tokens == 1
    assert found[1].layer_tokens == pytest.approx(0.5 + 0.5 * kept / PROMPT)
    row = bench.row_of(ways[1], [task], found[1], found[0])
    assert row["needles_found"] in (0, 1)
    assert row["loss_more"][0] == pytest.approx(found[1].losses_N[0] - found[0].losses_N[0])
    ratios = bench.times_of(ways[1].engine(model, tokenizer, None), [task], 2, 1)
    assert ratios.shape == (1, 2)
    assert (ratios > 0).all()
