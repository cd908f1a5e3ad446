"""One episode at a time as a Gymnasium environment, over any core."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, SupportsInt

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.adapters.spaces import (
    Core,
    action_space,
    observation_space,
    reward_space,
    start_arguments,
)
from offramp.envs.traces.store import open_traces
from offramp.envs.traces.tokens import TokenTraces


class CoreEnv(gym.Env[FloatArray, np.int64]):
    """A core of one episode, which does not reset itself.

    Args:
        costs: Measured costs of the model that was recorded.
        traces: Recorded tokens in memory.
        store: Instead, the folder of a ``TraceStore``.
        split: Which split of the store; None takes all.
        options: Passed on to the core, which says what they mean.

    Attributes:
        core: The episode that is stepped.
        reward_space: Bounds of ``reward_vector`` in the info, as mo-gymnasium declares them.
        objectives: Names of its entries.

    Raises:
        ConfigError: an argument is unusable.
        TraceError: the traces or the store are.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]  # gymnasium's is no ClassVar
    core_type: ClassVar[Callable[..., Core]]
    """Makes the core; what a subclass sets, beside its docstring, which is the specification."""

    def __init__(
        self,
        *,
        costs: CostTable,
        traces: TokenTraces | None = None,
        store: Path | str | None = None,
        split: str | None = None,
        **options: Any,
    ) -> None:
        recorded = open_traces(traces, store, split)
        core = type(self).core_type(recorded, costs, num_envs=1, autoreset=False, **options)
        self.core = core
        self._running = False
        self.observation_space = observation_space(core)
        self.action_space = action_space(core)
        self.objectives = core.objectives
        self.reward_space = reward_space(core)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Start an episode: observation [D]; of jumps, ``action_mask`` in the info.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        super().reset(seed=seed)
        obs_1D = self.core.reset(self.np_random, **start_arguments(options))
        self._running = True
        return obs_1D[0], self._mask_info()

    def step(self, action: SupportsInt) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Act in the episode.

        Raises:
            ConfigError: the action is none.
            ResetNeeded: no episode is running.
        """
        if not self._running:
            raise ResetNeeded("no episode is running: call reset() before step()")
        if not self.action_space.contains(action):
            raise ConfigError("action", f"is {action!r}", self.core.actions.meaning)
        batch = self.core.step(np.array([int(action)]))
        ended = bool(batch.terminated_B[0])
        self._running = not ended
        columns = batch.finals.info.items()
        info = {name: of_K[0].item() for name, of_K in columns} if ended else self._mask_info()
        info["reward_vector"] = batch.vector_BV[0]
        return batch.obs_BD[0], float(batch.reward_B[0]), ended, False, info

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [A] (sb3-contrib's name)."""
        masks_A: BoolArray = self.core.action_masks()[0]
        return masks_A

    def _mask_info(self) -> dict[str, Any]:
        if not self.core.actions.is_jump:
            return {}
        return {"action_mask": self.action_masks().astype(np.int8)}
