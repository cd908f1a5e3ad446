"""Where translators start, and that attention sinks do not spoil it."""

from __future__ import annotations

import copy

import pytest
import torch

from offramp.agents.tuning.distil import fresh_translators, states_at
from offramp.agents.tuning.exit_losses import mean_loss, typical_rows
from offramp.agents.tuning.ridge import Moments, start_translators
from offramp.worker.model.families import stack_for
from support.models import VOCAB, make_model

EXITS = (1, 3)
WIDTH = 12


def test_full_rank_is_the_least_squares_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(500, WIDTH, generator=generator).double()
    added_ND = x_ND @ torch.randn(WIDTH, WIDTH, generator=generator).double() + 3.0
    added_ND += 0.1 * torch.randn(500, WIDTH, generator=generator).double()
    moments = Moments(WIDTH)
    moments.add(x_ND[:200], x_ND[:200] + added_ND[:200])
    moments.add(x_ND[200:], x_ND[200:] + added_ND[200:])
    down_rD, up_Dr, b_D = moments.solve(WIDTH)
    found_ND = x_ND @ (up_Dr @ down_rD).T + b_D
    with_one = torch.cat((x_ND, torch.ones(500, 1).double()), 1)
    expected_ND = with_one @ torch.linalg.lstsq(with_one, added_ND).solution
    assert torch.allclose(found_ND, expected_ND, atol=0.02)


def test_a_map_of_low_rank_is_found_by_as_low_a_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(500, WIDTH, generator=generator)
    added_ND = x_ND @ torch.randn(WIDTH, 2, generator=generator)
    added_ND = added_ND @ torch.randn(2, WIDTH, generator=generator)
    moments = Moments(WIDTH)
    moments.add(x_ND, x_ND + added_ND)

    def left_over(rank: int) -> float:
        down_rD, up_Dr, b_D = (each.float() for each in moments.solve(rank))
        assert (down_rD.shape, up_Dr.shape) == ((rank, WIDTH), (WIDTH, rank))
        found_ND = x_ND @ down_rD.T @ up_Dr.T + b_D
        return ((found_ND - added_ND).square().mean() / added_ND.square().mean()).item()

    assert left_over(2) < 1e-4
    assert left_over(1) > 1e-2


def test_sinks_count_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND, last_ND = torch.randn(2, 100, WIDTH, generator=generator)
    clean, spoilt = Moments(WIDTH), Moments(WIDTH)
    clean.add(x_ND[1:], last_ND[1:])
    x_ND[0] *= 1000
    assert typical_rows(x_ND).tolist() == [False] + [True] * 99
    spoilt.add(x_ND, last_ND)
    for one, other in zip(clean.solve(3), spoilt.solve(3), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_start_loses_less_than_the_identity(family: str) -> None:
    stack = stack_for(make_model(family, torch.float32))
    generator = torch.Generator().manual_seed(3)
    batches = [torch.randint(VOCAB, (8, 16), generator=generator) for _ in range(6)]
    found = start_translators(stack, EXITS, 16, batches, seed=0)
    unseen_BT = torch.randint(VOCAB, (8, 16), generator=generator)
    states, last_ND = states_at(stack, unseen_BT, EXITS)
    plain = fresh_translators(stack, EXITS, 16, batches[0], seed=0)
    for layer in EXITS:
        losses = [mean_loss(stack, each[layer], states[layer], last_ND) for each in (plain, found)]
        assert losses[1] < 0.9 * losses[0]


def test_where_the_identity_loses_less_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_for(make_model("llama", torch.float32))
    batches = [torch.randint(VOCAB, (2, 16)) for _ in range(3)]
    # Least squares that says the opposite of every state.
    opposite = (torch.eye(stack.width)[:4], -2 * torch.eye(stack.width)[:, :4], torch.zeros(1))
    monkeypatch.setattr(Moments, "solve", lambda *_: copy.deepcopy(opposite))
    found = start_translators(stack, EXITS, 4, batches, seed=0)
    plain = fresh_translators(stack, EXITS, 4, batches[0], seed=0)
    for layer in EXITS:
        assert torch.equal(found[layer].B, plain[layer].B)
