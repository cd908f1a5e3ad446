"""Trade-off weights: how many units of quality a unit of time, or of energy, is worth.

Shape suffixes: B parallel episodes, K of them, W weights (latency, and energy if it is weighed),
V objectives of a reward vector.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.envs.cores.batch import IndexArray, RewardArray

Range = tuple[float, float]

LAMBDA_LIMITS = (1e-6, 1e6)
"""Preferences outside are refused: the observation's declared bounds rest on it."""

DEFAULT_LAMBDA_RANGE = (0.01, 1.0)
"""From "1 % of a full token's time for 0.0001 quality" to "a full token's time for all of it"."""

NAMES = ("lambda", "mu")
"""The weights of latency and of energy, in options and infos."""


class Weights:
    """Each episode's weights, drawn log-uniformly; kept as the rounded logarithms it observes.

    Args:
        num_envs: Number B of parallel episodes.
        lambda_range: Lowest and highest weight λ of latency; equal for a single one.
        energy_range: The same of energy's, μ; None does not weigh energy.
        knows_energy: Whether the costs hold joules.

    Attributes:
        log_BW: Natural logarithms, float32, as observed.
        value_BW: Their exponentials, float64, as rewarded.

    Raises:
        ConfigError: a range is none within the limits, or energy is weighed but unknown.
    """

    def __init__(
        self, num_envs: int, lambda_range: Range, energy_range: Range | None, knows_energy: bool
    ) -> None:
        _check_range("lambda_range", lambda_range)
        ranges = [lambda_range]
        if energy_range is not None:
            _check_range("energy_range", energy_range)
            _check_energy(knows_energy)
            ranges.append(energy_range)
        logs = np.log(np.array(ranges, np.float64))
        self._low_W, self._high_W = logs[:, 0], logs[:, 1]
        self.names = NAMES[: len(ranges)]
        self.log_BW: FloatArray = np.zeros((num_envs, len(ranges)), np.float32)
        self.value_BW: RewardArray = np.ones((num_envs, len(ranges)), np.float64)

    def draw(self, rng: np.random.Generator, place_K: IndexArray) -> None:
        """New weights for some episodes, in order of place."""
        for w in range(len(self.names)):
            drawn_K = rng.uniform(self._low_W[w], self._high_W[w], size=len(place_K))
            self._set(w, place_K, drawn_K)

    def assign(self, name: str, values: ArrayLike) -> None:
        """Give all episodes a weight, one or B.

        Raises:
            ConfigError: it is out of range, or not weighed here.
        """
        if name not in self.names:
            raise ConfigError(name, "is no weight here", "Give an energy_range to weigh energy")
        given = np.asarray(values, np.float64)
        low, high = LAMBDA_LIMITS
        if not ((given >= low) & (given <= high)).all():
            raise ConfigError(name, f"must be from {low:g} to {high:g}")
        everyone = np.arange(len(self.log_BW))
        self._set(self.names.index(name), everyone, np.log(given))

    def reward(self, vector_BV: RewardArray) -> RewardArray:
        """(quality − λ·latency − μ·energy) / (1 + λ + μ), [B]; without μ where it is no weight."""
        reward_B = vector_BV[:, 0] + self.value_BW[:, 0] * vector_BV[:, 1]
        if len(self.names) > 1:
            reward_B += self.value_BW[:, 1] * vector_BV[:, 2]
        reward_B /= 1 + self.value_BW.sum(-1)
        return reward_B

    def _set(self, w: int, place_K: IndexArray, log_K: RewardArray) -> None:
        self.log_BW[place_K, w] = log_K
        # The weight comes from the rounded logarithm, so that the observation tells it exactly.
        self.value_BW[place_K, w] = np.exp(self.log_BW[place_K, w].astype(np.float64))


def largest_log() -> int:
    """Bound of an observed logarithm, nats."""
    return math.ceil(math.log(LAMBDA_LIMITS[1]))


def _check_range(name: str, bounds: Range) -> None:
    low, high = bounds
    if not LAMBDA_LIMITS[0] <= low <= high <= LAMBDA_LIMITS[1]:
        raise ConfigError(
            name, f"({low}, {high}) is no range within {LAMBDA_LIMITS}", "Give the lower end first"
        )


def _check_energy(knows_energy: bool) -> None:
    if not knows_energy:
        raise ConfigError(
            "energy_range",
            "weighs energy, of which the cost table holds none",
            "Profile with an energy meter or a model of it, or leave energy_range out",
        )
