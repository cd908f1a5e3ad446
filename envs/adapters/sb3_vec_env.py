"""Many episodes at once for Stable-Baselines3.

Shape suffixes: B parallel episodes, A actions, D observation columns,
V objectives of a reward vector.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.adapters.spaces import Core, action_space, observation_space, start_arguments
from offramp.envs.cores.batch import StepBatch


class CoreVecEnv(VecEnv):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Any core as an SB3 vector of environments: ``CoreVecEnv(TokenExitCore(traces, costs, …))``.

    ``infos[i]`` is empty but where an episode ended: there it holds the environment's info about it
    and ``terminal_observation``. ``reward_vectors`` has the last step's rewards by objective, as
    one array, since a dict for each episode and step would take longer than the step. Rewards are
    float32. ``seed`` and ``set_options`` count from
    the next ``reset``; the first episode's seed seeds them all. Wrap in ``VecMonitor`` for SB3's
    episode statistics. sb3-contrib's ``MaskablePPO`` finds the masks by
    ``env_method("action_masks")``.

    Args:
        core: The episodes that are stepped.

    Attributes:
        core: The episodes that are stepped.
        objectives: Names of the V entries of a reward vector.
        reward_vectors: [B, V] float64, unweighted; zeros before the first step.
    """

    render_mode: str | None = None

    def __init__(self, core: Core) -> None:
        self.core = core
        self._actions_B: NDArray[Any] | None = None
        self.objectives = core.objectives
        self.reward_vectors = np.zeros((core.num_envs, len(core.objectives)), np.float64)
        super().__init__(core.num_envs, observation_space(core), action_space(core))

    def reset(self) -> FloatArray:
        """Start B episodes: observations [B, D].

        Raises:
            ConfigError: an option is unknown, missing for an episode, or out of range.
        """
        obs_BD = self.core.reset(self._seeds[0], **start_arguments(self._merged_options()))
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
        batch = self.core.step(np.asarray(self._actions_B))
        self.reward_vectors = batch.vector_BV
        return batch.obs_BD, batch.reward_B.astype(np.float32), batch.terminated_B, _infos(batch)

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [B, A]."""
        return self.core.action_masks()

    def close(self) -> None:
        """Do nothing: there is nothing to release."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Give the value once for each episode asked about: they share one environment."""
        value = getattr(self, attr_name)
        return [value for _ in self._get_indices(indices)]

    # ARG002: SB3's base class fixes these signatures.
    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> NoReturn:
        """Refuse: the episodes share one environment."""
        raise AttributeError(f"{attr_name!r} cannot be set: the episodes share one environment")

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        """The masks [A] of each episode asked about; anything else is refused."""
        if method_name != "action_masks":
            raise AttributeError(f"{method_name!r} is no method of an episode")
        return list(self.action_masks()[list(self._get_indices(indices))])

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """No episode is wrapped."""
        return [False for _ in self._get_indices(indices)]

    def _merged_options(self) -> dict[str, list[Any]]:
        names = set().union(*self._options)
        if any(names != set(options) for options in self._options):
            raise ConfigError("options", "differ in their names", "Set the same for each episode")
        return {name: [options[name] for options in self._options] for name in sorted(names)}


def _infos(batch: StepBatch) -> list[dict[str, Any]]:
    # A dict of its own for each: wrappers and callbacks write into them.
    infos: list[dict[str, Any]] = [{} for _ in batch.terminated_B]
    for place, row in zip(batch.finals.place_K.tolist(), batch.finals.rows(), strict=True):
        infos[place] = row
    return infos
