"""The exact value against enumeration of all paths, its gradient against finite differences.

Shape suffixes: N tokens, E exits, A actions; E1 = E + 1 exits with the end.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offramp.agents.game import JumpPrices, StoppingGame
from offramp.agents.study import Study

EXITS = (2, 4, 6)
N = 5


def prices(study: Study) -> JumpPrices:
    return JumpPrices.of(study.costs, EXITS)


def enumerate_return(
    priced: JumpPrices,
    start_E1: np.ndarray,
    pi_EA: np.ndarray,
    quality_E1: np.ndarray,
    lam: float,
) -> float:
    """Sum over every path of its probability times its return: an independent recursion."""
    exits = len(priced.leave_E)

    def walk(place: int, target: int, chance: float, cost: float) -> float:
        cost += float(priced.hop_SE1[place, target])
        if target == exits:
            return chance * (quality_E1[exits] - lam * cost)
        left = cost + float(priced.leave_E[target])
        total = chance * pi_EA[target, 0] * (quality_E1[target] - lam * left)
        for action in range(1, pi_EA.shape[1]):
            if target + action <= exits:
                total += walk(target + 1, target + action, chance * pi_EA[target, action], cost)
        return float(total)

    paths = (walk(0, first, start_E1[first], 0.0) for first in range(exits + 1))
    return sum(paths) / (1 + lam)


def log_chances(game: StoppingGame, logits_NEA: torch.Tensor) -> torch.Tensor:
    return logits_NEA.masked_fill(game.invalid_EA, -torch.inf).log_softmax(-1)


def draw(jumps: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(jumps)
    logits = torch.randn(N, len(EXITS), jumps + 1)
    start = torch.randn(N, len(EXITS) + 1)
    return logits, start, torch.rand(N, len(EXITS) + 1), torch.rand(N) * 2


@pytest.mark.parametrize("jumps", [1, 2, 3])
def test_the_value_is_the_mean_over_all_paths(study: Study, jumps: int) -> None:
    game = StoppingGame(prices(study), jumps)
    logits, start, quality, lam = draw(jumps)
    log_pi, log_start = log_chances(game, logits), start.log_softmax(-1)
    found = game.expected_return(log_start, log_pi, quality, lam)
    expected = [
        enumerate_return(
            prices(study),
            log_start[n].exp().numpy(),
            log_pi[n].exp().numpy(),
            quality[n].numpy(),
            float(lam[n]),
        )
        for n in range(N)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_for_the_gate_it_is_the_sum_over_stopping_times(study: Study) -> None:
    game = StoppingGame(prices(study), 1)
    logits, _, quality, lam = draw(1)
    log_pi = log_chances(game, logits)
    first = torch.full((N, 4), -torch.inf)
    first[:, 0] = 0
    found = game.expected_return(first, log_pi, quality, lam)
    costs = torch.from_numpy(study.costs.leaving(EXITS))
    leave_NE = log_pi[:, :, 0].exp()
    survive = torch.cumprod(1 - leave_NE, dim=1)
    before = torch.cat([torch.ones(N, 1), survive], dim=1)
    stop_NE1 = before * torch.cat([leave_NE, torch.ones(N, 1)], dim=1)
    expected = (stop_NE1 * (quality - lam[:, None] * costs)).sum(1) / (1 + lam)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jumps", [1, 3])
def test_the_gradient_is_that_of_finite_differences(study: Study, jumps: int) -> None:
    game = StoppingGame(prices(study), jumps)
    logits, start, quality, lam = draw(jumps)
    # Double precision, so that differences of 1e-6 mean something.
    values = [each.double().requires_grad_() for each in (logits, start)]

    def mean(logits: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return game.expected_return(
            start.log_softmax(-1), log_chances(game, logits), quality.double(), lam.double()
        ).mean()

    mean(*values).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
    largest = 0.0
    for which, value in enumerate(values):
        assert value.grad is not None
        for index in np.ndindex(*value.shape):
            step = torch.zeros_like(value)
            step[index] = 1e-6
            shifted = [
                [v.detach() + (step if i == which else 0) * sign for i, v in enumerate(values)]
                for sign in (1, -1)
            ]
            slope = (mean(*shifted[0]) - mean(*shifted[1])) / 2e-6
            assert float(slope) == pytest.approx(float(value.grad[index]), abs=1e-8)
            largest = max(largest, abs(float(slope)))
    assert largest > 1e-3


def test_visiting_every_exit_costs_what_the_cost_table_says(study: Study) -> None:
    priced = prices(study)
    paid, total = 0.0, []
    for place in range(len(EXITS)):
        paid += float(priced.hop_SE1[place, place])
        total.append(paid + float(priced.leave_E[place]))
    total.append(paid + float(priced.hop_SE1[len(EXITS), len(EXITS)]))
    np.testing.assert_allclose(total, study.costs.leaving(EXITS), rtol=1e-5)
    assert float(priced.hop_SE1[0, -1]) == pytest.approx(1.0)  # unasked full depth
