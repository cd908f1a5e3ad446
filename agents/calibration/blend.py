"""One net at any preference, from two saved ones.

A preference-conditioned net reads log λ as one more observation, and export folds it into the first
layer's bias (``agents.export``, ``agents.routers``): all that differs between two exports of a net
is that bias, and it is linear in log λ. So two of them give every other one, up to float32.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.net import Weights
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.router import MlpRouter


def can_blend(first: Policy, last: Policy) -> bool:
    """Whether they are one net at two preferences: equal but for the first layer's bias."""
    if isinstance(first, MlpPolicy) and isinstance(last, MlpPolicy):
        return first.threshold == last.threshold and _same_but_bias(first, last)
    if isinstance(first, MlpRouter) and isinstance(last, MlpRouter):
        return (
            first.ends == last.ends
            and _same_start(first.first, last.first)
            and _same_but_bias(first, last)
        )
    return False


def blend(first: Policy, last: Policy, share: float) -> Policy:
    """The net at log λ = (1 − share)·log λ_first + share·log λ_last; share may lie beyond [0, 1].

    Args:
        first, last: For which ``can_blend`` holds.
        share: 0 is ``first``, 1 is ``last``.
    """
    if isinstance(first, MlpRouter) and isinstance(last, MlpRouter):
        start = first.first
        if not isinstance(start, int) and not isinstance(last.first, int):
            start = _mixed(start, last.first, share)
        return MlpRouter(
            first.exits,
            first.schema,
            _mixed(first.weights, last.weights, share),
            first=start,
            ends=first.ends,
            candidates_VK=first.candidates_VK,
        )
    assert isinstance(first, MlpPolicy)
    assert isinstance(last, MlpPolicy)
    weights = _mixed(first.weights, last.weights, share)
    return MlpPolicy(first.exits, first.schema, weights, first.threshold, first.candidates_VK)


def same_net(first: Weights, last: Weights, *, but_first_bias: bool = False) -> bool:
    """Whether all weights are equal, the first layer's bias left out if asked."""
    mine = [array for pair in first for array in pair]
    theirs = [array for pair in last for array in pair]
    if len(mine) != len(theirs):
        return False
    pairs = list(zip(mine, theirs, strict=True))
    if but_first_bias:
        del pairs[1]
    return all(np.array_equal(a, b) for a, b in pairs)


def _same_but_bias(first: MlpPolicy | MlpRouter, last: MlpPolicy | MlpRouter) -> bool:
    return (
        (first.exits, first.schema) == (last.exits, last.schema)
        and same_net(first.weights, last.weights, but_first_bias=True)
        and not np.array_equal(first.weights[0][1], last.weights[0][1])
    )


def _same_start(first: int | Weights, last: int | Weights) -> bool:
    if isinstance(first, int) or isinstance(last, int):
        return isinstance(first, int) and first == last
    return same_net(first, last, but_first_bias=True)


def _mixed(first: Weights, last: Weights, share: float) -> Weights:
    (weight_FH, bias_H), *rest = first
    mixed_H = (bias_H + share * (last[0][1] - bias_H)).astype(np.float32)
    return [(weight_FH, mixed_H), *rest]
