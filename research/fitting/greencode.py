"""GREEN-CODE's agent: PPO on the hidden state, with its authors' reward, over recorded states.

Shape suffixes: B parallel episodes, N tokens, E exits, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from offramp.agents.learning.export import Normaliser, Weights, linear_weights
from offramp.controller.errors import TraceError
from offramp.controller.features import BoolArray, FloatArray, hidden_schema
from offramp.controller.policies.mlp import MlpPolicy
from offramp.envs.traces.tokens import TokenTraces

LATE_RIGHT, EARLY_WRONG, LATE_ON = 0.75, 1.0, 1.0
"""α, β and γ of the authors' reward: per layer left too late, left too early, gone on too far."""


ROLLOUT, BATCH = 32, 4096
"""Steps per environment between updates; rows per gradient step at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GreenCodeConfig:
    """How the agent is trained.

    Attributes:
        steps: Steps taken in the environment.
        envs: Episodes that run in parallel.
        seed: Seeds the environment, the initial weights and the actions.
    """

    steps: int = 300_000
    envs: int = 512
    seed: int = 0


def rewards(traces: TokenTraces) -> FloatArray:
    """Reward of going on (0) and of leaving (1) at each exit, [N, E, 2].

    Ilager, Briem and Brandic 2025 (GREEN-CODE, arXiv 2501.11006), as their published environment
    computes it. With o the first layer whose token is full depth's, l this exit's layer and p its
    place among the exits from 0 to 1: leaving pays p where l is the best exit, −α (l − o) where
    the token is right but late, −β (o − l) where it is too early, −1 where it is wrong behind o;
    going on pays p before o, else −γ (next − o). What is negative is divided by the last exit's
    layer. Here o is one of the recorded exits, or L.
    """
    exits = np.asarray(traces.header.exits, np.float32)
    layers = float(traces.header.layers)
    right_NE = traces.agree_NE > 0
    first_N = np.argmax(traces.quality("agreement") > 0, axis=1)
    best_N1 = np.append(exits, np.float32(layers))[first_N][:, None]
    position_E = np.linspace(0, 1, len(exits), dtype=np.float32)
    next_E = np.append(exits[1:], np.float32(layers))
    leave_NE = np.where(
        exits == best_N1,
        position_E,
        np.where(
            right_NE,
            -LATE_RIGHT * (exits - best_N1),
            np.where(exits < best_N1, -EARLY_WRONG * (best_N1 - exits), -1.0),
        ),
    )
    go_on_NE = np.where(exits < best_N1, position_E, -LATE_ON * (next_E - best_N1))
    both_NE2 = np.stack([go_on_NE, leave_NE], axis=-1)
    return np.where(both_NE2 < 0, both_NE2 / exits[-1], both_NE2).astype(np.float32)


class HiddenStateVecEnv(VecEnv):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Recorded tokens as GREEN-CODE's agent meets them: one episode walks one token's exits.

    The authors' episodes are 15 tokens; no reward depends on an earlier token, so one token is
    the same problem with less noise. Observations are normalised columns of the state.

    Args:
        traces: With hidden states.
        normaliser: Scales the D columns of a state.
        envs: Number B of parallel episodes.
        seed: Seeds the order of tokens.

    Raises:
        TraceError: no hidden states were recorded.
    """

    render_mode: str | None = None

    def __init__(
        self, traces: TokenTraces, normaliser: Normaliser, envs: int, seed: int = 0
    ) -> None:
        self._state_NED = states(traces)
        self._reward_NE2 = rewards(traces)
        self._normaliser = normaliser
        self._rng = np.random.default_rng(seed)
        self._row_B = np.zeros(envs, np.int64)
        self._exit_B = np.zeros(envs, np.int64)
        self._actions_B: NDArray[Any] = np.zeros(envs, np.int64)
        width = self._state_NED.shape[2]
        super().__init__(envs, Box(-np.inf, np.inf, (width,), np.float32), Discrete(2))

    def reset(self) -> FloatArray:
        """Start B episodes: observations [B, D]."""
        self._restart(np.ones(self.num_envs, np.bool_))
        return self._observe()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Remember the actions [B] for ``step_wait``."""
        self._actions_B = actions

    def step_wait(self) -> tuple[FloatArray, FloatArray, BoolArray, list[dict[str, Any]]]:
        """Observations [B, D], rewards [B], dones [B] and one info per episode."""
        reward_B = self._reward_NE2[self._row_B, self._exit_B, self._actions_B]
        last = self._state_NED.shape[1] - 1
        done_B = (self._actions_B == 1) | (self._exit_B == last)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        seen_BD = self._observe()
        for place in np.flatnonzero(done_B):
            infos[place] = {"terminal_observation": seen_BD[place]}
        self._exit_B += 1
        self._restart(done_B)
        return self._observe(), reward_B, done_B, infos

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """One value, for each episode asked about."""
        value = getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> NoReturn:
        """Refuse: the episodes share one environment."""
        raise AttributeError(f"{attr_name!r} cannot be set: the episodes share one environment")

    def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the episodes share one environment."""
        raise AttributeError(f"{method_name!r} is no method of an episode")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No episode is wrapped."""
        return [False for _ in self._get_indices(indices)]

    def _restart(self, done_B: BoolArray) -> None:
        count = int(done_B.sum())
        self._row_B[done_B] = self._rng.integers(len(self._state_NED), size=count)
        self._exit_B[done_B] = 0

    def _observe(self) -> FloatArray:
        state_BD = self._state_NED[self._row_B, self._exit_B].astype(np.float32)
        return np.asarray((state_BD - self._normaliser.mean_F) / self._normaliser.std_F)


def states(traces: TokenTraces) -> NDArray[np.float16]:
    """The recorded hidden states [N, E, D].

    Raises:
        TraceError: none were recorded.
    """
    if traces.state_NED is None:
        raise TraceError("traces", "hold no hidden states", "Run `offramp record --states`")
    return traces.state_NED


def train_greencode(traces: TokenTraces, config: GreenCodeConfig) -> Weights:
    """Train the agent; the weights of logit(leave) − logit(go on) on raw states.

    SB3's PPO with its default net, two tanh layers of 64, as the authors train theirs.

    Raises:
        TraceError: no hidden states were recorded.
    """
    state_NED = states(traces)
    normaliser = Normaliser.fit(state_NED.reshape(-1, state_NED.shape[2]).astype(np.float32))
    env = HiddenStateVecEnv(traces, normaliser, config.envs, config.seed)
    model = PPO(
        "MlpPolicy", env, n_steps=ROLLOUT, batch_size=min(BATCH, ROLLOUT * config.envs), n_epochs=6,
        learning_rate=1e-3, seed=config.seed, device="cpu",
    )  # fmt: skip
    model.learn(config.steps)
    hidden = [m for m in model.policy.mlp_extractor.policy_net if isinstance(m, nn.Linear)]
    first, *rest = [linear_weights(layer) for layer in hidden]
    weight_H2, bias_2 = linear_weights(model.policy.action_net)
    difference = (
        np.ascontiguousarray(weight_H2[:, 1:] - weight_H2[:, :1]),
        bias_2[1:] - bias_2[:1],
    )
    return [normaliser.fold(*first), *rest, difference]


def greencode_policy(weights: Weights, exits: tuple[int, ...], threshold: float) -> MlpPolicy:
    """Leave where the agent's probability of leaving exceeds the authors' threshold T.

    Args:
        weights: From ``train_greencode``.
        exits: Layers to ask after.
        threshold: The authors' T as a logit, ln(T / (1 − T)).
    """
    return MlpPolicy(exits, hidden_schema(len(weights[0][0])), weights, threshold)
