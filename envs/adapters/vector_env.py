"""Many episodes at once as a Gymnasium vector environment.

Shape suffixes: B parallel episodes, K of them that ended, A actions, D observation columns,
V objectives of a reward vector.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.adapters.spaces import (
    Core,
    action_space,
    observation_space,
    reward_space,
    start_arguments,
)
from offramp.envs.cores.batch import StepBatch
from offramp.envs.cores.sequence_core import SequenceExitCore
from offramp.envs.cores.token_core import TokenExitCore
from offramp.envs.traces.store import open_traces
from offramp.envs.traces.tokens import TokenTraces


class CoreVectorEnv(VectorEnv[FloatArray, NDArray[np.int64], NDArray[Any]]):
    """Any core as a Gymnasium vector environment.

    Autoreset is SAME_STEP: where an episode ends, the observation is already the next episode's,
    ``final_obs`` holds the last one and ``final_info`` the info columns. Infos are those of
    Gymnasium's own vector of single environments, masks and all.

    Args:
        num_envs: Number B of parallel episodes.
        costs, traces, store, split: What episodes replay and are charged, as for ``CoreEnv``.
        options: Passed on to the core, which says what they mean. Options of ``reset`` are those
            of the single environment, one value or one per episode.

    Attributes:
        core: The episodes that are stepped.

    Raises:
        ConfigError: an argument is unusable.
        TraceError: the traces or the store are.
    """

    core_type: ClassVar[Callable[..., Core]]
    """Makes the core; what a subclass sets."""

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
        **options: Any,
    ) -> None:
        recorded = open_traces(traces, store, split)
        core = type(self).core_type(recorded, costs, num_envs=num_envs, **options)
        self.core = core
        self.num_envs = core.num_envs
        self.single_observation_space = observation_space(core)
        self.single_action_space = action_space(core)
        self.objectives = core.objectives
        self.reward_space = reward_space(core)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start B episodes: observations [B, D], and the masks of jumps in the info.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        super().reset(seed=seed)
        obs_BD = self.core.reset(self.np_random, **start_arguments(options))
        return obs_BD, self._mask_infos()

    def step(
        self, actions: NDArray[np.int64]
    ) -> tuple[FloatArray, NDArray[np.float64], BoolArray, BoolArray, dict[str, Any]]:
        """Act in every episode: observations [B, D], rewards, terminated, truncated [B], infos.

        Raises:
            ConfigError: the actions are not B whole numbers in range.
        """
        batch = self.core.step(actions)
        infos = self._mask_infos() | _infos(batch)
        truncated_B = np.zeros_like(batch.terminated_B)
        return batch.obs_BD, batch.reward_B, batch.terminated_B, truncated_B, infos

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [B, A]."""
        return self.core.action_masks()

    def _mask_infos(self) -> dict[str, Any]:
        if not self.core.actions.is_jump:
            return {}
        masks_BA = self.action_masks().astype(np.int8)
        return {"action_mask": masks_BA, "_action_mask": np.ones(self.num_envs, np.bool_)}


class TokenExitVectorEnv(CoreVectorEnv):
    """``TokenExitEnv`` for ``num_envs`` tokens in one vectorised core; see there."""

    core_type = TokenExitCore


class SequenceExitVectorEnv(CoreVectorEnv):
    """``SequenceExitEnv`` for ``num_envs`` sequences in one vectorised core; see there."""

    core_type = SequenceExitCore


def _infos(batch: StepBatch) -> dict[str, Any]:
    ended_B = batch.terminated_B
    infos: dict[str, Any] = {}
    if not ended_B.all():
        vector_BV = np.where(ended_B[:, None], 0.0, batch.vector_BV)
        infos = {"reward_vector": vector_BV, "_reward_vector": ~ended_B}
    return infos | _final_infos(batch) if ended_B.any() else infos


def _final_infos(batch: StepBatch) -> dict[str, Any]:
    # Each mask is its own copy: a caller may write to one.
    finals, ended_B = batch.finals, batch.terminated_B
    final_obs_B = np.full(len(ended_B), None, dtype=object)
    for place, obs_D in zip(finals.place_K.tolist(), finals.obs_KD, strict=True):
        final_obs_B[place] = obs_D
    columns = {**finals.info, "reward_vector": batch.vector_BV[finals.place_K]}
    final_info: dict[str, Any] = {}
    for name, values_K in columns.items():
        values_B = np.zeros((len(ended_B), *values_K.shape[1:]), values_K.dtype)
        values_B[finals.place_K] = values_K
        final_info[name] = values_B
        final_info[f"_{name}"] = ended_B.copy()
    return {
        "final_obs": final_obs_B,
        "_final_obs": ended_B.copy(),
        "final_info": final_info,
        "_final_info": ended_B.copy(),
    }
