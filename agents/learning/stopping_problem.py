"""The stopping problem of one token: its states, what is seen there, and exact expected returns.

Shape suffixes: N tokens, S states, A actions, E exits; E1 = E + 1 exits with the end (all layers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.agents.learning.export import Normaliser
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.envs.charges.token_costs import LATENCY, TokenCosts
from offramp.envs.traces.pairs import PairFeatures, schema_of
from offramp.envs.traces.tokens import TokenTraces

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

        It is divided by 1 + λ as the environment's reward is; the first is that of whole tokens.

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

    def paid_S(self) -> Tensor:
        """What the environment has charged for the way before a state is decided in, [S].

        It charges the way to an exit with the decision made there. So its value function is
        ``values`` + λ·paid / (1 + λ).
        """
        before = [0.0 if s.before == START else self.leave_E1[s.before] for s in self.states]
        return torch.tensor(before)


SAMPLED = 4096
"""Tokens that the normalisation is fitted on."""

UNREAD = "run_length"
"""Depends on the whole path, where a state knows one step of it: jumping actors do not read it."""


class StateObservations:
    """Observations of ``TokenExitCore`` with ``jump`` actions, for every state at once.

    Args:
        traces: Recorded tokens, each probed at every exit.
        states: Where a token can be asked, the start first.

    Raises:
        TraceError: the schema has a column that cannot be had for a jump.
    """

    def __init__(self, traces: TokenTraces, states: tuple[State, ...]) -> None:
        self.traces = traces
        self.schema = schema_of(traces.header)
        self._pairs = PairFeatures(traces)
        self._here_S = np.asarray([state.here for state in states])
        self._before_S = np.asarray([state.before for state in states])

    def of(self, rows_N: IndexArray, log_lambda_N: FloatArray) -> FloatArray:
        """Observations of some tokens under some preferences, [N, S, D]."""
        rows_N1 = rows_N[:, None]
        here_S = np.maximum(self._here_S, 0)
        width = self.schema.width
        obs_NSD = np.empty((len(rows_N), len(here_S), width + 1), np.float32)
        obs_NSD[:, :, :width] = self.traces.features_NEF[rows_N1, here_S]
        compared = self._pairs.values_NPEQ[rows_N1, self._before_S + 1, here_S]
        obs_NSD[:, :, self._pairs.columns] = compared
        obs_NSD[:, self._here_S == START, :width] = 0
        obs_NSD[:, :, width] = log_lambda_N[:, None]
        return obs_NSD

    def at(self, state: State, rows_N: IndexArray | None = None) -> FloatArray:
        """Features of some tokens, or of all, in one state at an exit, [N, F]."""
        rows = slice(None) if rows_N is None else rows_N
        features_NF = self.traces.features_NEF[rows, state.here].copy()
        compared = self._pairs.values_NPEQ[rows, state.before + 1, state.here]
        features_NF[:, self._pairs.columns] = compared
        return features_NF

    def normaliser(self, lambda_range: tuple[float, float], seed: int) -> Normaliser:
        """Fitted on a sample of tokens in all states; log λ in closed form; UNREAD is left out."""
        rng = np.random.default_rng(seed)
        rows_N = rng.choice(len(self.traces), min(SAMPLED, len(self.traces)), replace=False)
        obs_NSD = self.of(rows_N, np.zeros(len(rows_N), np.float32))[:, self._here_S != START]
        fitted = Normaliser.fit(obs_NSD.reshape(-1, obs_NSD.shape[2]))
        low, high = (math.log(value) for value in lambda_range)
        mean_D, std_D = fitted.mean_F.copy(), fitted.std_F.copy()
        # Mean and deviation of a uniform distribution.
        mean_D[-1], std_D[-1] = (low + high) / 2, max((high - low) / math.sqrt(12), 1.0)
        if UNREAD in self.schema.columns:
            std_D[self.schema.index(UNREAD)] = np.inf
        return Normaliser(mean_D, std_D)
