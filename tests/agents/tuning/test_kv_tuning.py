"""What ``offramp tune --kv`` fits, and that what it reports is what decoding does.

Shape suffixes: L layers filled, N tokens, D width, r rank.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offramp.agents.tuning.kv_moments import FillMoments
from offramp.agents.tuning.kv_quality import (
    FilledTokens,
    by_token,
    compare_fills,
    full_depth,
    said_over,
)
from offramp.agents.tuning.kv_tuning import fill_inputs, fit
from offramp.worker import AdaptiveEngine, EngineConfig
from offramp.worker.model.families import stack_for
from offramp.worker.model.filling.kv_map import ExitMap
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.model.loading import model_fingerprint
from offramp.worker.model.translators import FILL, save_exits
from support.models import LAYERS, VOCAB, make_model
from support.rows import ReplayedExits, drain

WIDTH, DEEPER, EXIT = 12, 3, 2
WEIGHTS = [torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(n)) for n in range(DEEPER)]


def planted(rank: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """States, and what layers read of them: maps of a rank and shifts, noise aside."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(400, WIDTH, generator=generator)
    down_rD = torch.randn(rank, WIDTH, generator=generator)
    ups_LDr = torch.randn(DEEPER, WIDTH, rank, generator=generator)
    return x_ND, [x_ND + x_ND @ down_rD.T @ up_Dr.T + 2.0 for up_Dr in ups_LDr]


def left_over(
    exit_map: ExitMap,
    x_ND: torch.Tensor,
    read_LND: list[torch.Tensor],
    before_NK: torch.Tensor | None = None,
) -> float:
    """Share of the squared error of keys and values that the map leaves."""
    plain, mapped = 0.0, 0.0
    x_NI = x_ND if before_NK is None else torch.cat((x_ND, before_NK), 1)
    parts = zip(exit_map.B_LDr, exit_map.b_LD, read_LND, WEIGHTS, strict=True)
    for B_Dr, b_D, read_ND, weight_RD in parts:
        found_ND = x_ND + x_NI @ exit_map.A_rI.T @ B_Dr.T + b_D
        plain += ((read_ND - x_ND) @ weight_RD.T).square().sum().item()
        mapped += ((read_ND - found_ND) @ weight_RD.T).square().sum().item()
    return mapped / plain


def test_a_planted_map_is_found_by_its_rank() -> None:
    x_ND, read_LND = planted(2)
    moments = FillMoments(WIDTH, WEIGHTS)
    moments.add(x_ND[:150], [each[:150] for each in read_LND])
    moments.add(x_ND[150:], [each[150:] for each in read_LND])
    assert left_over(moments.solve(2), x_ND, read_LND) < 1e-3
    assert left_over(moments.solve(1), x_ND, read_LND) > 0.05


@pytest.mark.parametrize("matters", [True, False])
def test_the_token_before_is_read_where_it_tells_more(matters: bool) -> None:
    x_ND, read_LND = planted(2)
    generator = torch.Generator().manual_seed(4)
    before_NK = torch.randn(len(x_ND), 4, generator=generator)
    if matters:
        ups_LDK = 3 * torch.randn(DEEPER, WIDTH, 4, generator=generator)
        pairs = zip(read_LND, ups_LDK, strict=True)
        read_LND = [read_ND + before_NK @ up_DK.T for read_ND, up_DK in pairs]
    noise = torch.randn(DEEPER, *x_ND.shape, generator=generator)
    read_LND = [read_ND + part for read_ND, part in zip(read_LND, noise, strict=True)]
    alone, both = FillMoments(WIDTH, WEIGHTS), FillMoments(WIDTH, WEIGHTS, 4)
    alone.add(x_ND, read_LND)
    both.add(torch.cat((x_ND, before_NK), 1), read_LND)
    found = both.solve(6)
    assert found.reads_before == matters
    if matters:
        assert left_over(found, x_ND, read_LND, before_NK) < 0.5 * left_over(
            alone.solve(6), x_ND, read_LND
        )
    else:
        assert all(map(torch.equal, found, alone.solve(6)))


def test_full_rank_is_the_least_squares_of_torch() -> None:
    x_ND, read_LND = planted(WIDTH)
    noise = torch.randn(DEEPER, *x_ND.shape, generator=torch.Generator().manual_seed(7))
    read_LND = [each + part for each, part in zip(read_LND, noise, strict=True)]
    moments = FillMoments(WIDTH, WEIGHTS)
    moments.add(x_ND, read_LND)
    exit_map = moments.solve(WIDTH)
    with_one = torch.cat((x_ND, torch.ones(len(x_ND), 1)), 1)
    for B_Dr, b_D, read_ND in zip(exit_map.B_LDr, exit_map.b_LD, read_LND, strict=True):
        expected_ND = with_one @ torch.linalg.lstsq(with_one, read_ND - x_ND).solution
        found_ND = x_ND @ exit_map.A_rI.T @ B_Dr.T + b_D
        assert (found_ND - expected_ND).norm() < 0.02 * expected_ND.norm()


def test_inputs_are_what_each_layers_projections_read() -> None:
    stack = stack_for(make_model("gpt2"))
    read_LTD = fill_inputs(stack, list(range(5, 25)), EXIT).read_LTD
    assert read_LTD.shape == (LAYERS - EXIT, 20, stack.width)
    torch.testing.assert_close(read_LTD.mean(-1), torch.zeros(LAYERS - EXIT, 20), atol=1e-5, rtol=0)
    torch.testing.assert_close(read_LTD.var(-1, correction=0), torch.ones(LAYERS - EXIT, 20))


def test_a_map_gains_on_texts_that_it_has_seen() -> None:
    stack = stack_for(make_model("llama"))
    texts = torch.randint(3, VOCAB, (6, 60), generator=torch.Generator().manual_seed(3)).tolist()
    [found] = compare_fills(stack, fit(stack, (EXIT,), texts, 16), texts, seed=5)
    assert 0 < found.mapped < found.plain < 1


@torch.inference_mode()
def test_the_pass_that_measures_is_what_decoding_does(tmp_path: Path) -> None:
    model, begun = make_model("llama"), 5
    stack = stack_for(model)
    texts = torch.randint(3, VOCAB, (3, 40), generator=torch.Generator().manual_seed(3)).tolist()
    kv_map, text = fit(stack, (EXIT,), texts, 16), texts[0]
    assert kv_map.reads_before(EXIT)
    facts = {"kind": FILL, "model": model_fingerprint(model), "exits": [EXIT]}
    save_exits(tmp_path, kv_map.tensors(), facts)
    left_T = torch.arange(len(text)) % 3 > 0
    left_T[:begun] = False
    engine = AdaptiveEngine(model, config=EngineConfig(translators=tmp_path))
    depths = [EXIT if left else LAYERS for left in left_T[begun - 1 :]]
    policy = ReplayedExits(depths, (EXIT,), asked=iter((EXIT,)))
    request = engine.submit(text[:begun], policy=policy, forced=text[begun:], kv_mode="project")
    [row] = drain(engine, [request])
    states, rotary, _ = full_depth(stack, text, (EXIT,))
    projector = KVProjector(stack)
    before_TK = projector.values_before(states[EXIT], EXIT)
    entries = projector.project(states[EXIT], EXIT, by_token(rotary), kv_map, before_TK)
    filled = FilledTokens(left_T, EXIT, *entries)
    said = said_over(stack, filled, states[EXIT], EXIT, rotary).tolist()
    deep = [place for place in range(begun - 1, len(text) - 1) if not left_T[place]]
    assert len(deep) > 10
    assert [row.emitted[place - begun + 1] for place in deep] == [said[place] for place in deep]
