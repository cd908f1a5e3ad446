"""On-policy evaluation on the reference model, and the choice of what to publish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.agents.assess import choose, expected_cost
from offramp.agents.contenders import Contender
from offramp.agents.corpus import load_corpus
from offramp.agents.evaluate import EvaluationRow, bootstrap_ratio, evaluate
from offramp.agents.plots import draw_exit_depths, draw_frontier
from offramp.agents.record import quarters, tokenize, window
from offramp.agents.study import Study
from offramp.controller.costs import CostTable
from offramp.controller.policy import FixedExit, NeverExit
from offramp.worker import AdaptiveEngine

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
CONTENDERS = [
    Contender(family="full depth", setting=None, offline_agreement=None, policy=NeverExit()),
    Contender(family="fixed exit", setting=12, offline_agreement=1.0, policy=FixedExit(12)),
    Contender(family="fixed exit", setting=6, offline_agreement=0.8, policy=FixedExit(6)),
    Contender(family="fixed exit", setting=3, offline_agreement=0.6, policy=FixedExit(3)),
]


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    corpus = [doc for doc in load_corpus(None, limit=60) if doc.split == "test"]
    encoded = tokenize(str(REFERENCE), corpus)
    return [window(doc, tokens, 64) for doc, tokens in encoded if len(tokens) >= 64][:4]


@pytest.fixture(scope="module")
def rows(documents: list[list[int]]) -> list[EvaluationRow]:
    torch.set_num_threads(1)
    engine = AdaptiveEngine.from_pretrained(REFERENCE)
    return evaluate(
        engine, CONTENDERS, documents, prompt_tokens=24, timed_documents=2, timed_tokens=16
    )


def test_full_depth_is_its_own_reference(rows: list[EvaluationRow]) -> None:
    assert rows[0].agreement == rows[1].agreement == 1.0
    assert rows[0].wall_ratio == 1.0
    assert rows[0].mean_layers == 12


def test_earlier_exits_run_fewer_layers_and_agree_less(rows: list[EvaluationRow]) -> None:
    assert [row.mean_layers for row in rows] == [12, 12, 6, 3]
    assert rows[3].agreement < rows[2].agreement < 1
    assert all(row.agreement_low <= row.agreement <= row.agreement_high for row in rows)
    assert rows[2].tokens == sum(rows[2].depths.values()) == 4 * 39


def test_accuracy_and_agreement_equal_an_independent_pass(
    rows: list[EvaluationRow], documents: list[list[int]]
) -> None:
    engine = AdaptiveEngine.from_pretrained(REFERENCE)
    right = agree = 0
    for tokens in documents:
        logits = engine.model(torch.tensor([tokens])).logits[0]
        emitted = logits.argmax(-1)[24:-1].tolist()
        right += sum(a == b for a, b in zip(emitted, tokens[25:], strict=True))
        agree += len(emitted)
    assert rows[0].accuracy == pytest.approx(right / agree, abs=1 / agree)


def test_the_bootstrap_covers_a_known_ratio() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        below = rng.uniform(50, 150, size=30)
        above = below * rng.normal(0.8, 0.1, size=30)
        _, low, high = bootstrap_ratio(above, below, rng)
        covered += low <= 0.8 <= high
    assert 0.88 <= covered / 200 <= 0.99


def _row(agreement: float, depths: dict[int, int]) -> EvaluationRow:
    tokens = sum(depths.values())
    return EvaluationRow(
        policy=f"p{agreement}",
        family="p̂",
        setting=agreement,
        agreement=agreement,
        agreement_low=agreement,
        agreement_high=agreement,
        accuracy=0.5,
        mean_layers=sum(k * v for k, v in depths.items()) / tokens,
        wall_ratio=None,
        wall_ratio_low=None,
        wall_ratio_high=None,
        us_per_token=None,
        offline_agreement=None,
        tokens=tokens,
        exits=tuple(layer for layer in depths if layer < 8),
        depths=depths,
    )


def test_the_cheapest_that_keeps_the_target_is_chosen(study: Study) -> None:
    rows = [_row(0.99, {8: 10}), _row(0.95, {4: 5, 8: 5}), _row(0.90, {2: 10})]
    assert choose(rows, study.costs, 0.93)[0] == 1
    assert choose(rows, study.costs, 0.98)[0] == 0
    index, reason = choose(rows, study.costs, 0.999)
    assert index == 0
    assert "no learned policy kept" in reason


def test_expected_cost_charges_only_the_layers_that_were_run(study: Study) -> None:
    costs: CostTable = study.costs
    assert expected_cost(_row(1, {8: 10}), costs) == pytest.approx(1.0)
    assert expected_cost(_row(1, {2: 10}), costs) < expected_cost(_row(1, {4: 10}), costs) < 1
    free = replace(costs, probe_s=0.0, policy_s=0.0, fill_s=0.0)
    expected = (0.1 + 2 * 1.0 + 0.5) / (0.1 + 8 * 1.0 + 0.5)
    assert expected_cost(_row(1, {2: 10}), free) == pytest.approx(expected)


def test_pictures_are_drawn(rows: list[EvaluationRow], tmp_path: Path) -> None:
    draw_frontier(rows, rows[2].policy, tmp_path / "frontier.png")
    draw_exit_depths({row.policy: row.depths for row in rows}, 12, tmp_path / "depths.png")
    for name in ("frontier.png", "depths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_quarters_of_a_depth() -> None:
    assert quarters(12) == (3, 6, 9)
    assert quarters(30) == (7, 15, 22)
    assert quarters(2) == (1,)
