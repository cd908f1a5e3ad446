"""Many tokens at once for Stable-Baselines3.

Shape suffixes: B parallel episodes, D observation columns.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.core import DEFAULT_LAMBDA_RANGE, Finals, TokenExitCore
from offramp.envs.spaces import action_space, observation_space, start_arguments
from offramp.envs.tokens import Quality, TokenTraces


class TokenExitVecEnv(VecEnv):  # type: ignore[misc]  # mypy skips stable_baselines3
    """``TokenExitEnv`` for ``num_envs`` tokens in one vectorised core.

    ``infos[i]`` is empty but where an episode ended: there it holds ``TokenExitEnv``'s info and
    ``terminal_observation``. Rewards are float32. ``seed`` and ``set_options`` count from the
    next ``reset``; the first episode's seed seeds them all. Wrap in ``VecMonitor`` for SB3's
    episode statistics.

    Args:
        traces: Recorded tokens.
        costs: As for ``TokenExitEnv``, like all that follow.
        num_envs: Number B of parallel episodes.
        lambda_range: Lowest and highest λ.
        quality: How an exit's token is scored.

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
        lambda_range: tuple[float, float] = DEFAULT_LAMBDA_RANGE,
        quality: Quality = "logprob_gap",
    ) -> None:
        self._core = TokenExitCore(
            traces, costs, num_envs=num_envs, lambda_range=lambda_range, quality=quality
        )
        self._actions_B: NDArray[Any] | None = None
        super().__init__(num_envs, observation_space(self._core.num_columns), action_space())

    def reset(self) -> FloatArray:
        """Start B episodes: observations [B, D].

        Raises:
            ConfigError: an option is unknown, missing for an episode, or out of range.
        """
        obs_BD = self._core.reset(self._seeds[0], **start_arguments(self._merged_options()))
        self._reset_seeds()
        self._reset_options()
        return obs_BD

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Remember the actions [B] for ``step_wait``."""
        self._actions_B = actions

    def step_wait(self) -> tuple[FloatArray, FloatArray, BoolArray, list[dict[str, Any]]]:
        """Observations [B, D], rewards [B], dones [B] and one info per episode.

        Raises:
            ConfigError: the actions are not B whole numbers of 0 and 1.
        """
        obs_BD, reward_B, done_B, finals = self._core.step(np.asarray(self._actions_B))
        return obs_BD, reward_B.astype(np.float32), done_B, self._infos(finals)

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

    def _infos(self, finals: Finals) -> list[dict[str, Any]]:
        # A dict of its own for each: wrappers and callbacks write into them.
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        rows = finals.rows()
        for place, row, obs_D in zip(finals.place_K.tolist(), rows, finals.obs_KD, strict=True):
            infos[place] = {**row, "terminal_observation": obs_D}
        return infos

    def _merged_options(self) -> dict[str, list[Any]]:
        names = set().union(*self._options)
        if any(names != set(options) for options in self._options):
            raise ConfigError("options", "differ in their names", "Set the same for each episode")
        return {name: [options[name] for options in self._options] for name in sorted(names)}
