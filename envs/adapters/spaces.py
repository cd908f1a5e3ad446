"""What the adapters share: the core they adapt, Gymnasium spaces, reset options.

Shape suffixes: B parallel episodes, A actions, D observation columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.envs.charges.tradeoffs import largest_log
from offramp.envs.cores.batch import StepBatch
from offramp.envs.cores.token_core import FEATURE_LIMIT
from offramp.envs.cores.walk import Actions

OPTIONS = {"token": "tokens", "lambda": "lambdas", "mu": "mus"}
"""Names that Gymnasium's reset options have as arguments of a core's ``reset``."""


class Weighed(Protocol):
    """What observations end with: the logarithms of these weights."""

    @property
    def names(self) -> tuple[str, ...]: ...  # noqa: D102


class Core(Protocol):
    """Many episodes at once, as the adapters drive them."""

    num_envs: int
    num_columns: int
    actions: Actions
    objectives: tuple[str, ...]

    @property
    def weights(self) -> Weighed: ...  # noqa: D102

    def reset(
        self,
        seed: int | np.random.Generator | None = None,
        *,
        tokens: ArrayLike | None = None,
        lambdas: ArrayLike | None = None,
        mus: ArrayLike | None = None,
    ) -> FloatArray:
        """Start B episodes: observations [B, D]."""
        ...

    def step(self, actions_B: NDArray[Any]) -> StepBatch:
        """Act in every episode."""
        ...

    def action_masks(self) -> BoolArray:
        """Which actions lead somewhere that no lower action does, [B, A]."""
        ...


def action_space(core: Core) -> spaces.Discrete:
    """The core's actions. New each time: a space holds its own generator."""
    return spaces.Discrete(core.actions.count)


def observation_space(core: Core) -> spaces.Box[np.float32]:
    """Features (and outlook), then logarithms of the weights: a float32 Box of shape (D,)."""
    return box_of(core.num_columns - len(core.weights.names), core.weights)


def box_of(columns: int, weights: Weighed) -> spaces.Box[np.float32]:
    """That many columns, then logarithms of the weights.

    The bounds are the same for every trace and preference range, so that a policy trained on one
    can be loaded for another.
    """
    high = np.full(columns + len(weights.names), FEATURE_LIMIT, np.float32)
    high[columns:] = largest_log()
    return spaces.Box(-high, high, dtype=np.float32)


def reward_space(core: Core) -> spaces.Box[np.float32]:
    """Bounds of the core's reward vectors."""
    return reward_box(core.objectives)


def reward_box(objectives: tuple[str, ...]) -> spaces.Box[np.float32]:
    """Bounds of ``reward_vector``, float32: quality from 0 on, −latency and −energy up to 0."""
    low = np.full(len(objectives), -np.inf, np.float32)
    low[0] = 0
    return spaces.Box(low, np.where(low < 0, 0, np.inf).astype(np.float32), dtype=np.float32)


def start_arguments(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of a core's ``reset`` from Gymnasium's ``options``.

    Raises:
        ConfigError: an option is unknown.
    """
    return {OPTIONS[name]: value for name, value in checked_options(options, OPTIONS).items()}


def checked_options(options: Mapping[str, Any] | None, known: Iterable[str]) -> dict[str, Any]:
    """The options given, if all are known.

    Raises:
        ConfigError: one is not.
    """
    given = dict(options or {})
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError("options", f"{unknown[0]!r} is unknown", f"Use {', '.join(known)}")
    return given
