"""The stopping problem of one token, and the exact expected return of a stochastic policy in it.

Shape suffixes: N tokens, S states, A actions, E exits; E1 = E + 1 exits with the end (all layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.controller.errors import ConfigError
from offramp.envs.charges.token_costs import LATENCY, TokenCosts

START = -1
"""Where a token stands before its first layer."""


class State(NamedTuple):
    """Where a token can be asked.

    Attributes:
        before: The exit probed before; START if none was.
        here: The exit it is asked at; START before the first layer.
    """

    before: int
    here: int


def states_of(exits: int, jumps: int) -> tuple[State, ...]:
    """Every state that jumps of up to ``jumps`` exits can reach, the start first.

    >>> states_of(2, 1)
    (State(before=-1, here=-1), State(before=-1, here=0), State(before=0, here=1))
    """
    reached = [
        State(before, here)
        for before in range(START, exits)
        for here in range(before + 1, min(before + jumps + 1, exits))
    ]
    return (State(START, START), *reached)


@dataclass(frozen=True, slots=True)
class StoppingProblem:
    """Expected return of a policy, by a dynamic programme over its states.

    With the answers of all exits recorded, the return of every path is known, so that the
    expectation over a policy's random choices is a polynomial in its probabilities:
    V(s) = -λ·d + Σ_a π(a|s)·V(target), where leaving at exit e is worth quality(e) - λ·c(e). With
    jumps of one exit that is the sum over stopping times of their returns, each weighted by a
    product of survival probabilities. PPO estimates from samples the gradient that this has
    exactly (Sutton and Barto 2018, section 13.2, for the theorem it replaces).

    Args:
        costs: What a token costs, by where it leaves and how often it is asked.
        jumps: Longest jump J, in exits; J + 1 actions, of which 0 leaves.

    Raises:
        ConfigError: jumps beyond the end.
    """

    costs: TokenCosts
    jumps: int

    def __post_init__(self) -> None:
        if not 1 <= self.jumps <= self.exits + 1:
            raise ConfigError(
                "jumps",
                f"{self.jumps} is not from 1 to {self.exits + 1}: {self.exits} exits were recorded",
                "Allow shorter jumps, or record more exits",
            )

    @property
    def exits(self) -> int:
        """Number of exits E."""
        return len(self.costs.leave_E1) - 1

    @property
    def leave_E1(self) -> tuple[float, ...]:
        """Cost c of leaving at each exit, and of the end, without any probe."""
        return tuple(self.costs.leave_E1.tolist())

    @property
    def decide(self) -> float:
        """Cost d of a probe with its decision."""
        return float(self.costs.probe_O[LATENCY] + self.costs.policy_O[LATENCY])

    @property
    def begin(self) -> float:
        """Cost of the decision before the first layer."""
        return float(self.costs.policy_O[LATENCY])

    @property
    def build(self) -> float:
        """Cost of preparing a token's probes, paid with the first."""
        return float(self.costs.build_O[LATENCY])

    @property
    def states(self) -> tuple[State, ...]:
        """Where a policy can be asked, the start first."""
        return states_of(self.exits, self.jumps)

    def invalid_SA(self) -> Tensor:
        """Which actions lead nowhere: leaving before the first layer, jumping beyond the end."""
        here_S1 = np.asarray([state.here for state in self.states])[:, None]
        action_A = np.arange(self.jumps + 1)
        invalid = (here_S1 + action_A > self.exits) | ((here_S1 == START) & (action_A == 0))
        return torch.from_numpy(invalid)

    def price(self, state: State) -> float:
        """What being asked there costs."""
        if state.here == START:
            return self.begin
        return self.decide + (self.build if state.before == START else 0)

    def values(self, log_pi_NSA: Tensor, quality_NE1: Tensor, lambda_N: Tensor) -> Tensor:
        """Expected return from each state on, the way to it already paid, [N, S].

        Args:
            log_pi_NSA: Log-probabilities of the actions in each state; of invalid ones −inf.
            quality_NE1: Quality of leaving at each exit, and of full depth, in [0, 1].
            lambda_N: Preferences: quality that one full-depth token's time is worth.
        """
        pi_NSA = log_pi_NSA.exp()
        cost_E1 = torch.tensor(self.leave_E1, dtype=quality_NE1.dtype)
        stop_NE1 = quality_NE1 - lambda_N[:, None] * cost_E1
        place = {state: s for s, state in enumerate(self.states)}
        value: dict[State, Tensor] = {}
        for state in sorted(self.states, key=lambda each: each.here, reverse=True):
            pi_NA = pi_NSA[:, place[state]]
            total_N = -lambda_N * self.price(state)
            if state.here != START:
                total_N = total_N + pi_NA[:, 0] * stop_NE1[:, state.here]
            for action in range(1, min(self.jumps, self.exits - state.here) + 1):
                target = state.here + action
                is_end = target == self.exits
                onward_N = stop_NE1[:, target] if is_end else value[State(state.here, target)]
                total_N = total_N + pi_NA[:, action] * onward_N
            value[state] = total_N
        return torch.stack([value[state] for state in self.states], dim=1) / (1 + lambda_N[:, None])

    def expected_return(self, log_pi_NSA: Tensor, quality_NE1: Tensor, lambda_N: Tensor) -> Tensor:
        """Expected return of whole tokens, divided by 1 + λ as the environment's reward is, [N].

        Arguments are those of ``values``.
        """
        return self.values(log_pi_NSA, quality_NE1, lambda_N)[:, 0]

    def paid_S(self) -> Tensor:
        """What the environment has charged for the way before a state is decided in, [S].

        It charges the way to an exit with the decision made there. So its value function is
        ``values`` + λ·paid / (1 + λ).
        """
        before = [0.0 if s.before == START else self.leave_E1[s.before] for s in self.states]
        return torch.tensor(before)
