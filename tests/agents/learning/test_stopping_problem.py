"""The exact value against enumeration of all paths, its gradient against finite differences.

Shape suffixes: N tokens, S states, A actions; E1 = exits with the end.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from offramp.agents.learning.stopping_problem import START, State, StoppingProblem, states_of
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.errors import ConfigError
from offramp.envs.charges.token_costs import TokenCosts
from support.cost_tables import leaving

EXITS = (2, 4, 6)
N = 5


def make_game(data: TrainingData, jumps: int) -> StoppingProblem:
    return StoppingProblem(TokenCosts.of(replace(data.costs, build_s=0.05), EXITS), jumps)


def enumerated(
    problem: StoppingProblem, pi_SA: np.ndarray, quality_E1: np.ndarray, lam: float
) -> float:
    """Sum over every path of its probability times its return: forward, path by path."""
    place = {state: s for s, state in enumerate(problem.states)}

    def walk(state: State, chance: float, probes: int) -> float:
        total = 0.0
        for action, pi in enumerate(pi_SA[place[state]]):
            target = state.here + action
            if pi == 0:
                continue
            if action == 0 or target == problem.exits:
                cost = problem.leave_E1[target] + probes * problem.decide + problem.begin
                cost += problem.build * (probes > 0)
                total += chance * pi * (quality_E1[target] - lam * cost)
            else:
                total += walk(State(state.here, target), chance * pi, probes + 1)
        return total

    return walk(State(START, START), 1.0, 0) / (1 + lam)


def log_chances(problem: StoppingProblem, logits_NSA: torch.Tensor) -> torch.Tensor:
    return logits_NSA.masked_fill(problem.invalid_SA(), -torch.inf).log_softmax(-1)


def draw(problem: StoppingProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(problem.jumps)
    logits = torch.randn(N, len(problem.states), problem.jumps + 1)
    return logits, torch.rand(N, len(EXITS) + 1), torch.rand(N) * 2


def test_states_are_those_that_jumps_reach() -> None:
    assert len(states_of(3, 1)) == 4
    assert len(states_of(3, 3)) == len(states_of(3, 4)) == 1 + 6
    assert State(0, 2) in states_of(3, 2)
    assert State(START, 2) not in states_of(3, 2)


@pytest.mark.parametrize("jumps", [1, 2, 3, 4])
def test_the_value_is_the_mean_over_all_paths(data: TrainingData, jumps: int) -> None:
    problem = make_game(data, jumps)
    logits, quality, lam = draw(problem)
    log_pi = log_chances(problem, logits)
    found = problem.values(log_pi, quality, lam)[:, 0]
    expected = [
        enumerated(problem, log_pi[n].exp().numpy(), quality[n].numpy(), float(lam[n]))
        for n in range(N)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_for_jumps_of_one_exit_it_is_the_sum_over_stopping_times(data: TrainingData) -> None:
    problem = make_game(data, 1)
    logits, quality, lam = draw(problem)
    log_pi = log_chances(problem, logits)
    found = problem.values(log_pi, quality, lam)[:, 0]
    costs = torch.from_numpy(leaving(replace(data.costs, build_s=0.05), EXITS)) + problem.begin
    leave_NE = log_pi[:, 1:, 0].exp()
    survive = torch.cumprod(1 - leave_NE, dim=1)
    before = torch.cat([torch.ones(N, 1), survive], dim=1)
    stop_NE1 = before * torch.cat([leave_NE, torch.ones(N, 1)], dim=1)
    expected = (stop_NE1 * (quality - lam[:, None] * costs)).sum(1) / (1 + lam)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jumps", [1, 4])
def test_the_gradient_is_that_of_finite_differences(data: TrainingData, jumps: int) -> None:
    problem = make_game(data, jumps)
    logits, quality, lam = (each.double() for each in draw(problem))  # differences of 1e-6 need it

    def mean(logits: torch.Tensor) -> torch.Tensor:
        return problem.values(log_chances(problem, logits), quality, lam)[:, 0].mean()

    logits.requires_grad_()
    mean(logits).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
    assert logits.grad is not None
    for index in np.ndindex(*logits.shape):
        step = torch.zeros_like(logits)
        step[index] = 1e-6
        slope = (mean(logits.detach() + step) - mean(logits.detach() - step)) / 2e-6
        assert float(slope) == pytest.approx(float(logits.grad[index]), abs=1e-8)
    assert logits.grad.abs().max() > 1e-3


def test_more_jumps_than_exits_are_refused(data: TrainingData) -> None:
    with pytest.raises(ConfigError, match="jumps: 5 is not from 1 to 4: 3 exits were recorded"):
        make_game(data, 5)
