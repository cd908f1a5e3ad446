"""Rules for the tokens of a prompt: every second window of them, and any of them at random.

``FixedExit`` lets all of a prompt go that are not kept; ``ThresholdPolicy`` over PROMPT_V1 those
whose state hardly changes any more (``cosine``), or that are nothing new (``seen``).

Shape suffixes: N tokens, F features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import PROMPT_V1, BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import Kind
from offramp.controller.strict import COUNT, NUMBER

PLACE, DEPTH = PROMPT_V1.index("place"), PROMPT_V1.index("depth")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedExit:
    """Tokens of every second window of the prompt leave at the first exit.

    Attributes:
        exits: The one layer after which they leave.
        window: Tokens of a window, at least 1; the prompt's first window stays.
        schema: Must be PROMPT_V1.

    Raises:
        RequestError: no window, or several exits.
    """

    exits: tuple[int, ...]
    window: int
    schema: FeatureSchema = PROMPT_V1
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        _require_prompts(self.schema)
        if self.window < 1:
            raise RequestError("window", f"{self.window} is below 1", "Use 1 or more")
        if len(self.exits) != 1:
            raise RequestError("exits", f"{self.exits} is not one layer", "Name one")

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Tokens in windows 1, 3, 5, …, [N]."""
        return np.asarray(_positions(features_NF) // self.window % 2 == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomShare:
    """A share of the tokens leaves at each exit, whichever: the control of every other rule.

    A token's draw is a hash (splitmix64) of seed, position and exit: read again, a prompt loses the
    same tokens.

    Attributes:
        exits: Layers to ask after, ascending.
        share: Chance of a token to leave at an exit that it reaches, in [0, 1].
        seed: Another seed lets others go.
        schema: Must be PROMPT_V1.

    Raises:
        RequestError: a share outside [0, 1], or a seed below 0.
    """

    exits: tuple[int, ...]
    share: float
    seed: int = 0
    schema: FeatureSchema = PROMPT_V1
    candidates_VK: IntArray | None = None

    def __post_init__(self) -> None:
        _require_prompts(self.schema)
        if not 0 <= self.share <= 1:
            raise RequestError("share", f"{self.share} is not in [0, 1]", "Give a share")
        if self.seed < 0:
            raise RequestError("seed", f"{self.seed} is below 0", "Use 0 or more")

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Tokens whose draw falls below the share, [N]."""
        # Layers as thousandths: exits of a token are to draw apart.
        depths_N = np.rint(1000 * features_NF[:, DEPTH]).astype(np.uint64)
        keys_N = _positions(features_NF).astype(np.uint64) << np.uint64(20) | depths_N
        draws_N = _mixed(keys_N ^ _mixed(np.array([self.seed], np.uint64)))
        return np.asarray((draws_N >> np.uint64(11)) * 2.0**-53 < self.share)


def _require_prompts(schema: FeatureSchema) -> None:
    if schema.digest != PROMPT_V1.digest:
        raise RequestError("schema", f"is {schema.name!r}", "Use PROMPT_V1, which names positions")


def _positions(features_NF: FloatArray) -> np.ndarray:
    return np.rint(256 * features_NF[:, PLACE]).astype(np.int64)


def _mixed(keys_N: np.ndarray) -> np.ndarray:
    """Splitmix64's output for each key, uint64 both."""
    with np.errstate(over="ignore"):
        z_N = keys_N + np.uint64(0x9E3779B97F4A7C15)
        z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_N ^ (z_N >> np.uint64(31))


WINDOWED = Kind(name="windowed_exit", type=WindowedExit, params={"window": COUNT})

RANDOM_SHARE = Kind(name="random_share", type=RandomShare, params={"share": NUMBER, "seed": COUNT})
