"""Many draft-and-verify episodes at once for Stable-Baselines3.

Shape suffixes: B parallel episodes, D observation columns.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from offramp.controller.costs import CostTable
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.draft_core import MAX_PENDING, DraftExitCore
from offramp.envs.draft_spaces import draft_action_space, draft_observation_space, draft_start
from offramp.envs.tokens import TokenTraces


class DraftExitVecEnv(VecEnv):  # type: ignore[misc]  # mypy skips stable_baselines3
    """``DraftExitEnv`` for ``num_envs`` episodes in one vectorised core.

    ``infos[i]`` is empty but where an episode ended: there it holds ``DraftExitEnv``'s counts and
    ``terminal_observation``. Rewards are float32. ``seed`` and ``set_options`` count from the
    next ``reset``; the first episode's seed seeds them all, its options start them all.

    Args:
        traces: Recorded tokens.
        costs: As for ``DraftExitEnv``, like all that follow.
        num_envs: Number B of parallel episodes.
        max_pending, cycles, rate: As for ``DraftExitEnv``.

    Attributes:
        core: The episodes; ``core.set_rate`` changes ρ.

    Raises:
        ConfigError: an argument is unusable.
    """

    render_mode: str | None = None

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        max_pending: int = MAX_PENDING,
        cycles: int | None = None,
        rate: float = 1.0,
    ) -> None:
        self.core = DraftExitCore(
            traces,
            costs,
            num_envs=num_envs,
            max_pending=max_pending,
            cycles=cycles,
            rate=rate,
        )
        self._actions_B: NDArray[Any] | None = None
        self._earned = [0.0, 0.0]
        super().__init__(
            num_envs,
            draft_observation_space(self.core.num_columns),
            draft_action_space(self.core.exits),
        )

    def reset(self) -> FloatArray:
        """Start B episodes: observations [B, D].

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        obs_BD = self.core.reset(self._seeds[0], **draft_start(self._options[0]))
        self._reset_seeds()
        self._reset_options()
        return obs_BD

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Remember the actions [B] for ``step_wait``."""
        self._actions_B = actions

    def step_wait(self) -> tuple[FloatArray, FloatArray, BoolArray, list[dict[str, Any]]]:
        """Observations [B, D], rewards [B], dones [B] and one info per episode.

        Raises:
            ConfigError: the actions are not B whole numbers in range.
        """
        step = self.core.step(np.asarray(self._actions_B))
        self._earned[0] += float(step.tokens_B.sum())
        self._earned[1] += float(step.seconds_B.sum())
        # A dict of its own for each: wrappers and callbacks write into them.
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = zip(
            step.finals.place_K.tolist(), step.finals.rows(), step.finals.obs_KD, strict=True
        )
        for place, row, obs_D in ended:
            infos[place] = {**row, "terminal_observation": obs_D}
        return step.obs_BD, step.reward_B.astype(np.float32), step.terminated_B, infos

    def take_rate(self) -> float:
        """Tokens per full-depth token's time since the last call, over all episodes."""
        tokens, seconds = self._earned
        self._earned = [0.0, 0.0]
        return tokens / seconds * self.core.prices.full_s

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The same value for each episode asked about: they share one environment."""
        value = getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    # ARG002: SB3's base class fixes these signatures.
    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> NoReturn:
        """Refuse: the episodes share one environment."""
        raise AttributeError(f"{attr_name!r} cannot be set: the episodes share one environment")

    def env_method(self, method_name: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: the episodes share one environment."""
        raise AttributeError(f"{method_name!r} is no method of an episode")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No episode is wrapped."""
        return [False for _ in self._get_indices(indices)]
