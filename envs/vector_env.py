"""Many tokens at once as a Gymnasium vector environment.

Shape suffixes: B parallel episodes, K of them that ended, D observation columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from offramp.controller.costs import CostTable
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.core import DEFAULT_LAMBDA_RANGE, Finals, TokenExitCore
from offramp.envs.spaces import action_space, observation_space, start_arguments
from offramp.envs.store import open_traces
from offramp.envs.tokens import Quality, TokenTraces


class TokenExitVectorEnv(VectorEnv[FloatArray, NDArray[np.int64], NDArray[Any]]):
    """``TokenExitEnv`` for ``num_envs`` tokens in one vectorised core.

    Autoreset is SAME_STEP: where an episode ends, the observation is already the next episode's,
    ``final_obs`` holds the last one and ``final_info`` the info columns. Options of ``reset`` are
    those of ``TokenExitEnv``, one value or one per episode.

    Args:
        num_envs: Number B of parallel episodes.
        costs: As for ``TokenExitEnv``, like all that follow.
        traces: Tokens in memory.
        store: Folder of a ``TraceStore``.
        split: With ``store``, which split.
        lambda_range: Lowest and highest λ.
        quality: How an exit's token is scored.

    Raises:
        ConfigError: an argument is unusable.
        TraceError: the store is unusable.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 - gymnasium declares it an instance attribute
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        *,
        num_envs: int = 1,
        costs: CostTable,
        traces: TokenTraces | None = None,
        store: Path | str | None = None,
        split: str | None = None,
        lambda_range: tuple[float, float] = DEFAULT_LAMBDA_RANGE,
        quality: Quality = "logprob_gap",
    ) -> None:
        self._core = TokenExitCore(
            open_traces(traces, store, split),
            costs,
            num_envs=num_envs,
            lambda_range=lambda_range,
            quality=quality,
        )
        self.num_envs = num_envs
        self.single_observation_space = observation_space(self._core.num_columns)
        self.single_action_space = action_space()
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start B episodes: observations [B, D] and an empty info.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        super().reset(seed=seed)
        return self._core.reset(self.np_random, **start_arguments(options)), {}

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[FloatArray, NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Act in every episode: observations [B, D], rewards, terminated, truncated [B], infos.

        Raises:
            ConfigError: the actions are not B whole numbers of 0 and 1.
        """
        obs_BD, reward_B, terminated_B, finals = self._core.step(actions)
        infos = _final_infos(finals, terminated_B) if terminated_B.any() else {}
        return obs_BD, reward_B, terminated_B, np.zeros_like(terminated_B), infos


def _final_infos(finals: Finals, ended_B: BoolArray) -> dict[str, Any]:
    # Each mask is its own copy: a caller may write to one.
    final_obs_B = np.full(len(ended_B), None, dtype=object)
    for place, obs_D in zip(finals.place_K.tolist(), finals.obs_KD, strict=True):
        final_obs_B[place] = obs_D
    final_info: dict[str, Any] = {}
    for name, values_K in finals.info.items():
        values_B = np.zeros(len(ended_B), values_K.dtype)
        values_B[finals.place_K] = values_K
        final_info[name] = values_B
        final_info[f"_{name}"] = ended_B.copy()
    return {
        "final_obs": final_obs_B,
        "_final_obs": ended_B.copy(),
        "final_info": final_info,
        "_final_info": ended_B.copy(),
    }
