"""A family of policies along one setting λ, from the safest to the most eager to leave.

Built from bundles that ``offramp train`` saved, without training again. Nothing here reads a
calibration document: a walk's settings and their order have to be fixed before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from offramp.agents.calibration.blend import blend, can_blend, same_net
from offramp.agents.placing.contenders import INDEX
from offramp.controller.errors import ConfigError
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import LearningPolicy, NeverExit, Policy, ThresholdPolicy
from offramp.controller.release.bundle import PolicyBundle

SAFEST = 0.999
"""Confidence at which a walk along a threshold begins."""

GENTLEST = 0.1
"""λ at which a walk along preferences begins, as a share of the least that was saved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One saved operating point.

    Attributes:
        family: What kind of rule or agent.
        setting: Its own threshold, preference or layer, as it is named in evaluations.
        offline: Agreement that replaying validation traces promised.
        policy: The policy.
        bundle: Where it comes from.
    """

    family: str
    setting: float
    offline: float
    policy: Policy
    bundle: PolicyBundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Policies along λ.

    Attributes:
        name: Of the family.
        parameter: What λ is.
        settings: λ, safest first.
        build: The policy of a λ.
        bundle: What they were built from.
    """

    name: str
    parameter: str
    settings: tuple[float, ...]
    build: Callable[[float], Policy]
    bundle: PolicyBundle


def load_points(folder: Path) -> list[Point]:
    """Every saved operating point of every family; full depth has none.

    Raises:
        ConfigError: the folder holds no readable index.
        PolicyRefusedError: a bundle is damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        entries = [
            (str(e["family"]), e["setting"], e["offline_agreement"], e["folder"]) for e in index
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "policies", f"{folder} holds no readable {INDEX}", "Run `offramp train` first"
        ) from error
    points = []
    for family, setting, offline, name in entries:
        bundle = PolicyBundle.load(folder / name)
        policy = bundle.policy()
        if not isinstance(policy, NeverExit):
            point = Point(
                family=family, setting=setting, offline=offline, policy=policy, bundle=bundle
            )
            points.append(point)
    return points


def family_of(points: Sequence[Point], name: str, steps: int, last: float | None = None) -> Family:
    """The family of a name, walked in some steps.

    Along a threshold, from SAFEST to the most eager saved point; along preferences, from GENTLEST
    times the least saved λ; any other kind, from one saved point to the next, in the order of
    their offline agreement.

    Args:
        points: What was saved.
        name: The family.
        steps: Settings of a walk along a threshold or preferences, at least 2.
        last: Setting of the saved point that the walk ends at; None: the most eager one.

    Raises:
        ConfigError: there is no such family, it learns while it serves, or no point of that
            setting was saved.
    """
    mine = sorted((p for p in points if p.family == name), key=lambda p: -p.offline)
    if not mine:
        known = ", ".join(dict.fromkeys(p.family for p in points)) or "none"
        raise ConfigError("family", f"{name!r} was not trained", f"Trained: {known}")
    if any(isinstance(point.policy, LearningPolicy) for point in mine):
        raise ConfigError(
            "family",
            f"{name!r} goes on learning while it serves: its loss is no fixed number",
            "Certify one that is fixed",
        )
    if steps < 2:
        raise ConfigError("steps", f"{steps} is below 2")
    if last is not None:
        mine = mine[: _place(mine, last) + 1]
    first, end = mine[0].policy, mine[-1].policy
    if isinstance(end, ThresholdPolicy):
        return _by_column(name, end, mine[-1].bundle, steps)
    if can_blend(first, end):
        return _by_preference(name, mine[0], mine[-1], steps)
    if isinstance(end, MlpPolicy) and isinstance(first, MlpPolicy):
        shares_net = same_net(first.weights, end.weights) and first.exits == end.exits
        if shares_net and end.threshold != 0:
            return _by_logit(name, end, mine[-1].bundle, steps)
    return _point_by_point(name, mine)


def _place(mine: Sequence[Point], setting: float) -> int:
    places = [i for i, point in enumerate(mine) if math.isclose(point.setting, setting)]
    if not places:
        saved = ", ".join(f"{point.setting:.4g}" for point in mine)
        raise ConfigError("setting", f"{setting:.4g} was not saved", f"Saved: {saved}")
    return places[0]


def _by_column(name: str, policy: ThresholdPolicy, bundle: PolicyBundle, steps: int) -> Family:
    """A feature in [0, 1] is compared: thresholds evenly spaced in logits."""
    safest, eager = SAFEST, min(max(policy.threshold, 1e-6), SAFEST)
    logits = np.linspace(_logit(safest), _logit(eager), steps)
    return Family(
        name=name,
        parameter=f"threshold of {policy.column}",
        settings=_distinct(1 / (1 + np.exp(-logits))),
        build=lambda threshold: replace(policy, threshold=threshold),
        bundle=bundle,
    )


def _by_logit(name: str, policy: MlpPolicy, bundle: PolicyBundle, steps: int) -> Family:
    safest = max(_logit(SAFEST), policy.threshold)

    def build(threshold: float) -> MlpPolicy:
        return MlpPolicy(
            policy.exits, policy.schema, policy.weights, threshold, policy.candidates_VK
        )

    return Family(
        name=name,
        parameter="threshold, logits",
        settings=_distinct(np.linspace(safest, policy.threshold, steps)),
        build=build,
        bundle=bundle,
    )


def _by_preference(name: str, gentle: Point, eager: Point, steps: int) -> Family:
    first, last = gentle.policy, eager.policy
    span = math.log(eager.setting / gentle.setting)
    settings = np.geomspace(GENTLEST * gentle.setting, eager.setting, steps)
    return Family(
        name=name,
        parameter="preference λ",
        settings=_distinct(settings),
        build=lambda preference: blend(first, last, math.log(preference / gentle.setting) / span),
        bundle=eager.bundle,
    )


def _point_by_point(name: str, mine: Sequence[Point]) -> Family:
    """Any kind of policy: only what was saved."""
    policies = {point.setting: point.policy for point in mine}
    return Family(
        name=name,
        parameter="saved setting",
        settings=tuple(policies),
        build=policies.__getitem__,
        bundle=mine[-1].bundle,
    )


def _distinct(settings: np.ndarray) -> tuple[float, ...]:
    return tuple(dict.fromkeys(float(setting) for setting in settings))


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
