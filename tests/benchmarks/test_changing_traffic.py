"""What the benchmark of changing traffic is made of: its prompts, its prices, its picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from swapping.traffic_lesson import PROMPT_TOKENS, layers_alone, prompts_of
from swapping.traffic_run import TrafficRun, draw
from transformers import AutoTokenizer

from offramp.controller.features import CANDIDATES_V1
from offramp.envs.charges.token_costs import TokenCosts
from support.cost_tables import measured
from support.models import REFERENCE


def test_prompts_end_in_the_middle_of_a_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
    prompts = prompts_of(tokenizer)
    assert {name: len(each) > 200 for name, each in prompts.items()} == {
        "code": True,
        "prose": True,
    }
    for each in (*prompts["code"], *prompts["prose"]):
        assert len(each) == PROMPT_TOKENS
        assert tokenizer.eos_token_id not in each


def test_priced_by_layers_nothing_else_counts() -> None:
    table = layers_alone(measured())
    costs = TokenCosts.under(CANDIDATES_V1, table, (3, 6))
    assert costs.price([0, 1, 2], [1, 2, 2]) == pytest.approx([3 / 12, 6 / 12, 1], abs=0.01)


def test_a_picture_is_drawn_of_what_happened(tmp_path: Path) -> None:
    run = TrafficRun(
        tokens=[(0.5 * i, 6 + i % 6, 2 + i // 40) for i in range(80)],
        audits=[(float(i), 10 * (i % 30), i % 30) for i in range(40)],  # counted anew in between
        settings=[(float(i), 2, 1.5 if i < 20 else float("nan")) for i in range(40)],
    )
    run.stories.append((20.0, "generation 2 moves to certified setting 3 of 4"))
    draw(run, 12.0, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
