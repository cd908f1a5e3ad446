"""Edit similarity lost in line completion, on the reference model."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.agents.calibration.calibration_documents import (
    LINES,
    LONGEST,
    CalibrationDocument,
    calibration_windows,
    with_lines,
)
from offramp.agents.calibration.losses import CompletedLines
from offramp.agents.evaluation.lines import Line
from offramp.agents.recording.corpus import load_corpus
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.engine_config import EngineConfig

REFERENCE = Path(__file__).parents[3] / "models" / "reference"
CONTEXT, LENGTH = 24, 81

Cut = list[tuple[CalibrationDocument, list[Line]]]


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    torch.set_num_threads(1)
    return AdaptiveEngine.from_pretrained(REFERENCE, slots=4)


@pytest.fixture(scope="module")
def cut(engine: AdaptiveEngine) -> Cut:
    windows = calibration_windows(str(REFERENCE), load_corpus(None, limit=8), LENGTH, 2)
    return with_lines(windows, engine.tokenizer, CONTEXT)


def similarity(engine: AdaptiveEngine, line: Line, policy: Policy) -> float:
    """One line, alone."""
    sampling = SamplingParams(max_tokens=LONGEST, stop=("\n",))
    [done] = engine.generate([list(line.prompt)], sampling, policy)
    return round(100 * SequenceMatcher(None, done.text.strip(), line.target).ratio()) / 100


def test_a_documents_loss_is_what_its_lines_lose(engine: AdaptiveEngine, cut: Cut) -> None:
    losses = CompletedLines(engine, [lines for _, lines in cut])
    assert (losses.decode_mode, losses.new_tokens) == ("project", LINES * LONGEST)
    assert losses.losses(NeverExit(), "document").tolist() == [0.0] * len(cut)
    policy = FixedExit(3)
    expected, drop = [], []
    for _, lines in cut:
        full, mine = (
            [similarity(engine, line, each) for line in lines] for each in (NeverExit(), policy)
        )
        expected.append(np.mean([max(0.0, a - b) for a, b in zip(full, mine, strict=True)]))
        drop.append(np.mean(full) - np.mean(mine))
    found_N = losses.losses(policy, "document")
    np.testing.assert_allclose(found_N, expected)
    assert 0 < found_N.mean() <= 1
    assert all(found_N >= np.asarray(drop) - 1e-12)


def test_windows_without_a_line_are_left_out(engine: AdaptiveEngine, cut: Cut) -> None:
    assert cut
    assert all(1 <= len(lines) <= LINES for _, lines in cut)
    assert all(len(line.prompt) <= CONTEXT for _, lines in cut for line in lines)
    space = engine.tokenizer.encode("a b")[-1]
    endless = CalibrationDocument("ab" * 32, (space,) * LENGTH)
    document, lines = cut[0]
    assert with_lines([endless, document], engine.tokenizer, CONTEXT) == [(document, lines)]
    with pytest.raises(TraceError, match="calibration documents: none of 1 windows holds a line"):
        with_lines([endless], engine.tokenizer, CONTEXT)


def test_tokens_are_no_units_of_lines(engine: AdaptiveEngine, cut: Cut) -> None:
    losses = CompletedLines(engine, [cut[0][1]])
    with pytest.raises(ConfigError, match="unit: a line's loss is not of any token"):
        losses.losses(FixedExit(3), "token")


def test_a_verifying_engine_has_no_loss_to_bound(cut: Cut) -> None:
    engine = AdaptiveEngine.from_pretrained(REFERENCE, config=EngineConfig(kv_mode="verify"))
    with pytest.raises(ConfigError, match="kv_mode: verify emits what full depth would"):
        CompletedLines(engine, [lines for _, lines in cut])
