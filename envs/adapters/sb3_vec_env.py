"""Many episodes at once for Stable-Baselines3.

Shape suffixes: B parallel episodes, A actions, D observation columns,
V objectives of a reward vector.
"""

from __future__ import annotations

from typing import Any, NoReturn, Unpack

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.adapters.options import SequenceOptions, TokenOptions
from offramp.envs.adapters.spaces import Core, action_space, observation_space, start_arguments
from offramp.envs.cores.batch import StepBatch
from offramp.envs.cores.sequence_core import SequenceExitCore
from offramp.envs.cores.token_core import TokenExitCore
from offramp.envs.traces.tokens import TokenTraces


class CoreVecEnv(VecEnv):  # type: ignore[misc]  # mypy skips stable_baselines3
    """Any core as an SB3 vector of environments.

    ``infos[i]`` is empty but where an episode ended: there it holds the environment's info about it
    and ``terminal_observation``. ``reward_vectors`` has the last step's rewards by objective, as
    one array, since a dict for each episode and step would take longer than the step. Rewards are
    float32. ``seed`` and ``set_options`` count from
    the next ``reset``; the first episode's seed seeds them all. Wrap in ``VecMonitor`` for SB3's
    episode statistics. sb3-contrib's ``MaskablePPO`` finds the masks by
    ``env_method("action_masks")``.

    Args:
        core: The episodes.

    Attributes:
        objectives: Names of the V entries of a reward vector.
        reward_vectors: [B, V] float64, unweighted; zeros before the first step.
    """

    render_mode: str | None = None

    def __init__(self, core: Core) -> None:
        self._core = core
        self._actions_B: NDArray[Any] | None = None
        self.objectives = core.objectives
        self.reward_vectors = np.zeros((core.num_envs, len(core.objectives)), np.float64)
        super().__init__(core.num_envs, observation_space(core), action_space(core))

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
            ConfigError: the actions are not B whole numbers in range.
        """
        batch = self._core.step(np.asarray(self._actions_B))
        self.reward_vectors = batch.vector_BV
        return batch.obs_BD, batch.reward_B.astype(np.float32), batch.terminated_B, _infos(batch)

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [B, A]."""
        return self._core.action_masks()

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


class TokenExitVecEnv(CoreVecEnv):
    """``TokenExitEnv`` for ``num_envs`` tokens in one vectorised core.

    Args:
        traces: Recorded tokens.
        costs: As for ``TokenExitEnv``, like all that follow.
        num_envs: Number B of parallel episodes.
        lambda_range: Lowest and highest weight λ of latency.
        quality: How an exit's token is scored.
        actions: ``gate`` or ``jump``.
        jumps: Of ``jump``: the longest.
        asks_first: Of ``jump``: begin before the first layer.
        ends: Of ``jump``: one more action, full depth.
        energy_range: Lowest and highest weight μ of energy.

    Raises:
        ConfigError: an argument is unusable.
        TraceError: the traces are.
    """

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        **options: Unpack[TokenOptions],
    ) -> None:
        core = TokenExitCore(
            traces,
            costs,
            num_envs=num_envs,
            **options,
        )
        super().__init__(core)


class SequenceExitVecEnv(CoreVecEnv):
    """``SequenceExitEnv`` for ``num_envs`` sequences in one vectorised core.

    The arguments are those of ``SequenceExitEnv``, and ``num_envs``, the number B of parallel
    episodes. Raises as that does.
    """

    def __init__(
        self,
        traces: TokenTraces,
        costs: CostTable,
        *,
        num_envs: int,
        **options: Unpack[SequenceOptions],
    ) -> None:
        core = SequenceExitCore(
            traces,
            costs,
            num_envs=num_envs,
            **options,
        )
        super().__init__(core)


def _infos(batch: StepBatch) -> list[dict[str, Any]]:
    # A dict of its own for each: wrappers and callbacks write into them.
    infos: list[dict[str, Any]] = [{} for _ in batch.terminated_B]
    for place, row in zip(batch.finals.place_K.tolist(), batch.finals.rows(), strict=True):
        infos[place] = row
    return infos
