"""A family of policies along one setting λ, from the safest to the most eager to leave.

Built from bundles that ``offramp train`` saved, without training again. Nothing here reads a
calibration document: a walk's settings and their order have to be fixed before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from offramp.agents.learning.phat import logit
from offramp.agents.placing.contenders import load_saved
from offramp.controller.errors import ConfigError
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.net import Weights
from offramp.controller.policies.protocols import (
    LearningPolicy,
    Policy,
    StatefulPolicy,
    ThresholdPolicy,
)
from offramp.controller.policies.router import MlpRouter
from offramp.controller.release.bundle import PolicyBundle

SAFEST = 0.999
"""Confidence at which a walk along a threshold begins."""

GENTLEST = 0.1
"""λ at which a walk along preferences begins, as a share of the least that was saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPoint:
    """One saved operating point.

    Attributes:
        family: What kind of rule or agent it is.
        setting: Its own threshold, preference or layer, as it is named in evaluations.
        offline: Agreement that replaying validation traces promised; None if it was not replayed.
        policy: The policy, ready to run.
        bundle: The bundle that it was read from.
    """

    family: str
    setting: float
    offline: float | None
    policy: Policy
    bundle: PolicyBundle


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingFamily:
    """Policies along λ.

    Attributes:
        name: Name of the family.
        parameter: What λ is.
        settings: The values of λ, safest first.
        build: Makes the policy of a λ.
        bundle: The bundle that they were built from.
    """

    name: str
    parameter: str
    settings: tuple[float, ...]
    build: Callable[[float], Policy]
    bundle: PolicyBundle


def load_points(folder: Path) -> list[SavedPoint]:
    """Every saved operating point of every family; full depth has none.

    Raises:
        ConfigError: the folder holds no readable index.
        PolicyRefusedError: a bundle is damaged.
    """
    return [
        SavedPoint(
            family=each.family,
            setting=each.setting,
            offline=each.offline_agreement,
            policy=each.policy,
            bundle=bundle,
        )
        for each, bundle in load_saved(folder)
        if each.setting is not None
    ]


def family_of(
    points: Sequence[SavedPoint], name: str, steps: int, last: float | None = None
) -> SettingFamily:
    """The family of a name, walked in some steps.

    Along a threshold, from SAFEST to the most eager saved point; along preferences, from GENTLEST
    times the least saved λ; any other kind, from one saved point to the next, in the order of
    their offline agreement.

    Args:
        points: Every saved operating point.
        name: Name of the family.
        steps: Settings of a walk along a threshold or preferences, at least 2.
        last: Setting of the saved point that the walk ends at; None: the most eager one.

    Raises:
        ConfigError: there is no such family, it was not replayed or learns while it serves, or no
            point of that setting was saved.
    """
    mine = _by_safety(points, name)
    if steps < 2:
        raise ConfigError("steps", f"{steps} is below 2")
    if last is not None:
        mine = mine[: _place(mine, last) + 1]
    first, end = mine[0].policy, mine[-1].policy
    if isinstance(end, ThresholdPolicy):
        return _along_column(end, mine[-1], steps)
    if can_blend(first, end):
        return _along_preference(mine[0], mine[-1], steps)
    if isinstance(end, MlpPolicy) and isinstance(first, MlpPolicy):
        # At 0 the threshold is no knob: an actor leaves where its action says so.
        shares_net = same_net(first.weights, end.weights) and first.exits == end.exits
        if shares_net and end.threshold != 0:
            return _along_logit(end, mine[-1], steps)
    policies = {point.setting: point.policy for point in mine}
    return _family(mine[-1], "saved setting", list(policies), policies.__getitem__)


def _by_safety(points: Sequence[SavedPoint], name: str) -> list[SavedPoint]:
    """The points of a family, the one that promised the highest agreement first."""
    mine = [point for point in points if point.family == name]
    if not mine:
        known = ", ".join(dict.fromkeys(point.family for point in points)) or "none"
        raise ConfigError("family", f"{name!r} was not trained", f"Trained: {known}")
    if any(isinstance(point.policy, LearningPolicy | StatefulPolicy) for point in mine):
        raise ConfigError(
            "family",
            f"{name!r} goes on learning while it serves: its loss is no fixed number",
            "Certify one that is fixed",
        )
    if any(point.offline is None for point in mine):
        raise ConfigError(
            "family",
            f"{name!r} was not replayed, so nothing says which of its points is the safest",
            "Certify one that was",
        )
    return sorted(mine, key=lambda point: -(point.offline or 0.0))


def _place(mine: Sequence[SavedPoint], setting: float) -> int:
    places = [i for i, point in enumerate(mine) if math.isclose(point.setting, setting)]
    if not places:
        saved = ", ".join(f"{point.setting:.4g}" for point in mine)
        raise ConfigError("setting", f"{setting:.4g} was not saved", f"Saved: {saved}")
    return places[0]


def _family(
    point: SavedPoint,
    parameter: str,
    settings: Sequence[float] | np.ndarray,
    build: Callable[[float], Policy],
) -> SettingFamily:
    distinct = tuple(dict.fromkeys(float(setting) for setting in settings))
    return SettingFamily(
        name=point.family, parameter=parameter, settings=distinct, build=build, bundle=point.bundle
    )


def _along_column(policy: ThresholdPolicy, point: SavedPoint, steps: int) -> SettingFamily:
    """A feature in [0, 1] is compared: thresholds evenly spaced in logits."""
    # A threshold of 0 leaves always, and has no logit.
    eager = min(max(policy.threshold, 1e-6), SAFEST)
    settings = 1 / (1 + np.exp(-np.linspace(logit(SAFEST), logit(eager), steps)))
    parameter = f"threshold of {policy.column}"
    return _family(point, parameter, settings, lambda each: replace(policy, threshold=each))


def _along_logit(policy: MlpPolicy, point: SavedPoint, steps: int) -> SettingFamily:
    settings = np.linspace(max(logit(SAFEST), policy.threshold), policy.threshold, steps)
    return _family(point, "threshold, logits", settings, policy.at)


def _along_preference(gentle: SavedPoint, eager: SavedPoint, steps: int) -> SettingFamily:
    span = math.log(eager.setting / gentle.setting)

    def build(preference: float) -> Policy:
        share = math.log(preference / gentle.setting) / span
        return blend(gentle.policy, eager.policy, share)

    settings = np.geomspace(GENTLEST * gentle.setting, eager.setting, steps)
    return _family(eager, "preference λ", settings, build)


def can_blend(first: Policy, last: Policy) -> bool:
    """Whether two policies are one net at two preferences: equal but for first layers' biases.

    A preference-conditioned net reads log λ as one more observation, and export folds it into the
    first layer's bias (``agents/learning/export.py``, ``agents/learning/actor.py``). That bias is
    linear in log λ, so two exports of a net give every other one, up to float32.
    """
    nets, others = _nets(first), _nets(last)
    return (
        _all_but_nets(first) == _all_but_nets(last)
        and bool(nets)
        and all(same_net(*pair, but_first_bias=True) for pair in zip(nets, others, strict=True))
        and not same_net(nets[0], others[0])
    )


def blend(first: Policy, last: Policy, share: float) -> Policy:
    """The net at log λ = (1 − share)·log λ_first + share·log λ_last; share may lie beyond [0, 1].

    Both must be policies for which ``can_blend`` holds.
    """
    weights, *start = [_mixed(*pair, share) for pair in zip(_nets(first), _nets(last), strict=True)]
    if isinstance(first, MlpRouter):
        return MlpRouter(
            first.exits,
            first.schema,
            weights,
            first=start[0] if start else first.first,
            ends=first.ends,
            candidates_VK=first.candidates_VK,
        )
    assert isinstance(first, MlpPolicy)
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


def _nets(policy: Policy) -> list[Weights]:
    """The nets of a policy that read the preference: where to go on, and where to start."""
    if isinstance(policy, MlpPolicy):
        return [policy.weights]
    if isinstance(policy, MlpRouter):
        return [policy.weights, *([] if isinstance(policy.first, int) else [policy.first])]
    return []


def _all_but_nets(policy: Policy) -> tuple[object, ...]:
    """Whatever else decides how a policy of nets behaves."""
    if isinstance(policy, MlpRouter):
        start = policy.first if isinstance(policy.first, int) else None
        return MlpRouter, policy.exits, policy.schema, policy.ends, start
    return type(policy), policy.exits, policy.schema, getattr(policy, "threshold", None)


def _mixed(first: Weights, last: Weights, share: float) -> Weights:
    (weight_FH, bias_H), *rest = first
    mixed_H = (bias_H + share * (last[0][1] - bias_H)).astype(np.float32)
    return [(weight_FH, mixed_H), *rest]
