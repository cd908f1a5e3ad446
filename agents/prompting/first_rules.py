"""Rules that a learned policy for prompts begins with, and the random choice it is held against.

Shape suffixes: N tokens of a chunk, F feature columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.controller.features import PROMPT_V1, BoolArray, FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy
from offramp.controller.policies.rules.prompt_rules import RandomShare

PLACE, AHEAD, DEPTH = (PROMPT_V1.index(name) for name in ("place", "ahead", "depth"))
SCALE = 256
"""Tokens that PROMPT_V1 counts as 1."""


def far_rule(exits: Sequence[int], layers: int, far: float) -> MlpPolicy:
    """Let tokens go the earlier, the more of the prompt follows them.

    At the first exit those leave that have more than ``far`` tokens ahead, at the last all, and
    between them the bound falls linearly with depth. With one exit, only those that are far leave.

    Args:
        exits: Layers to ask after, ascending.
        layers: Layers of the model.
        far: Tokens ahead.
    """
    weight_F1 = np.zeros((PROMPT_V1.width, 1), np.float32)
    weight_F1[AHEAD] = 1
    fall = far / SCALE * layers / (exits[-1] - exits[0]) if len(exits) > 1 else 0.0
    weight_F1[DEPTH] = fall
    bias_1 = np.array([-far / SCALE - fall * exits[0] / layers], np.float32)
    return MlpPolicy(tuple(exits), PROMPT_V1, [(weight_F1, bias_1)])


class CountedExits:
    """Another policy over PROMPT_V1, whose decisions about tokens that may leave are counted.

    Attributes:
        exits, schema, candidates_VK: What an ``ExitPolicy`` declares under these names.

    Args:
        policy: Policy that decides.
        layers: Layers of the model.
        keep_first, keep_last: Tokens that it is not heeded about.
    """

    schema, candidates_VK = PROMPT_V1, None

    def __init__(self, policy: ExitPolicy, layers: int, keep_first: int, keep_last: int) -> None:
        self.exits = policy.exits
        self._policy, self._layers, self._kept = policy, layers, (keep_first, keep_last)
        self._asked = dict.fromkeys(self.exits, 0)
        self._left = dict.fromkeys(self.exits, 0)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the tokens asked at each exit that left there."""
        return tuple(self._left[e] / max(1, self._asked[e]) for e in self.exits)

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Tokens that leave, [N]."""
        leave_N = self._policy.leave(features_NF)
        first, last = self._kept
        free_N = np.rint(SCALE * features_NF[:, PLACE]) >= first
        free_N &= np.rint(SCALE * features_NF[:, AHEAD]) >= last
        here = _exit_of(features_NF, self._layers)
        self._asked[here] += int(free_N.sum())
        self._left[here] += int((free_N & leave_N).sum())
        return leave_N


class AnybodyElse:
    """As many tokens leave at each exit as under another policy, but whichever: the control.

    Attributes:
        exits, schema, candidates_VK: What an ``ExitPolicy`` declares under these names.

    Args:
        exits: Layers to ask after, ascending.
        shares: Share of the tokens asked at each that leaves there.
        layers: Layers of the model.
    """

    schema, candidates_VK = PROMPT_V1, None

    def __init__(self, exits: Sequence[int], shares: Sequence[float], layers: int) -> None:
        self.exits = tuple(exits)
        self._layers = layers
        self._rules = {
            exit_: RandomShare(exits=(exit_,), share=share)
            for exit_, share in zip(exits, shares, strict=True)
        }

    def leave(self, features_NF: FloatArray) -> BoolArray:
        """Tokens that leave, [N]."""
        return self._rules[_exit_of(features_NF, self._layers)].leave(features_NF)


def _exit_of(features_NF: FloatArray, layers: int) -> int:
    """Layers executed before these tokens were asked about."""
    return round(layers * float(features_NF[0, DEPTH]))
