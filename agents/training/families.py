"""The families of policies that exist: one table for training, evaluation, demo and benchmarks.

``research/`` registers the published rules here when it is imported.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from offramp.agents.learning.phat import logit
from offramp.agents.placing.contenders import GRID, Contender, full_depth, measured, nearest, placed
from offramp.agents.placing.state_replay import SubsetGrid
from offramp.agents.training.trained_parts import TrainedParts
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, FeatureSchema, IntArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, ThresholdPolicy

PROBABILITIES = np.linspace(0.01, 0.999, GRID)
"""Thresholds tried on a probability."""

SURE = np.linspace(0.3, 0.999, GRID)
"""Thresholds tried for p̂ on every subset of exits."""


Goal = Literal["exits", "drafting"]

DRAFT_FAMILIES = (
    "headless confidence stop",
    "headless trust stop",
    "Thompson sampling",
    "PPO drafting",
)
"""What ``offramp train --for drafting`` teaches."""


class Parts(Protocol):
    """What families are placed from."""

    placed: dict[str, list[Contender]]


P = TypeVar("P", bound=Parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of policies.

    Attributes:
        name: What evaluations call it.
        place: Makes its contenders from what was trained (``TrainedParts``, or ``DraftParts`` of
            a family that drafts).
        goal: What its members are for: leaving for good ("exits"), or proposing tokens that full
            depth verifies ("drafting").
        is_learned: Whether ``offramp train`` teaches it, so that it may be chosen and published.
        is_seeded: Whether its training draws random numbers, so that it needs several seeds.
        is_staged: Whether its agent is trained in stages, with checkpoints.
    """

    name: str
    place: Callable[[Any], list[Contender]]
    goal: Goal = "exits"
    is_learned: bool = False
    is_seeded: bool = False
    is_staged: bool = False


FAMILIES: dict[str, Family] = {}
"""All families by name."""


def register(
    name: str, **attributes: Any
) -> Callable[[Callable[[P], list[Contender]]], Callable[[P], list[Contender]]]:
    """Enter a function that places a family into the table.

    Args:
        name: The family's name.
        attributes: Its other attributes, as of ``Family``.
    """

    def enter(place: Callable[[P], list[Contender]]) -> Callable[[P], list[Contender]]:
        FAMILIES[name] = Family(name=name, place=place, **attributes)
        return place

    return enter


def families_of(names: Iterable[str], goal: Goal = "exits") -> list[Family]:
    """Look up families by name.

    Raises:
        ConfigError: a name is unknown, or its family is for another goal.
    """
    known = [family.name for family in FAMILIES.values() if family.goal == goal]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError("families", f"{unknown[0]!r} is unknown", f"Use {', '.join(known)}")
    return [FAMILIES[name] for name in names]


def is_learned(name: str) -> bool:
    """Whether a family is one that ``offramp train`` teaches and that may be published."""
    return name in FAMILIES and FAMILIES[name].is_learned


def is_seeded(name: str) -> bool:
    """Whether a family's training draws random numbers, so that it is run once per seed."""
    return name in FAMILIES and FAMILIES[name].is_seeded


def place_all(names: Sequence[str], parts: Parts) -> list[Contender]:
    """Make the contenders of some families, full depth first.

    Raises:
        ConfigError: a family asks for what was not recorded.
    """
    for family in (FAMILIES[name] for name in names):
        parts.placed[family.name] = family.place(parts)
    return [full_depth(), *(each for name in names for each in parts.placed[name])]


@register("fixed exit")
def _fixed_exit(parts: TrainedParts) -> list[Contender]:
    return [
        measured("fixed exit", layer, FixedExit(layer), parts.data, "layer ")
        for layer in parts.exits
    ]


@register("CALM")
def _calm(parts: TrainedParts) -> list[Contender]:
    return _thresholds("CALM", parts, SOFTMAX_V2)


@register("CALM on candidates")
def _calm_on_candidates(parts: TrainedParts) -> list[Contender]:
    return _thresholds("CALM on candidates", parts, CANDIDATES_V1, parts.data.candidates_VK)


def _thresholds(
    family: str, parts: TrainedParts, schema: FeatureSchema, table_VK: IntArray | None = None
) -> list[Contender]:
    def build(threshold: float) -> ExitPolicy:
        return ThresholdPolicy(parts.exits, schema, "margin", threshold, table_VK)

    return placed(family, build, PROBABILITIES, parts.targets, parts.data)


@register("p̂", is_learned=True, is_seeded=True)
def _phat(parts: TrainedParts) -> list[Contender]:
    return classifiers("p̂", parts, parts.phat)


def classifiers(family: str, parts: TrainedParts, weights: Any) -> list[Contender]:
    """Place a classifier of right exits by the threshold on its probability."""

    def build(threshold: float) -> ExitPolicy:
        table_VK = parts.data.candidates_VK
        return MlpPolicy(parts.exits, CANDIDATES_V1, weights, logit(threshold), table_VK)

    return placed(family, build, PROBABILITIES, parts.targets, parts.data)


@register("PPO", is_learned=True, is_seeded=True)
def _gate(parts: TrainedParts) -> list[Contender]:
    """PPO that leaves or goes on to the next exit."""
    table_VK, (low, high) = parts.data.candidates_VK, parts.config.gate.lambda_range

    def build(preference: float) -> ExitPolicy:
        return MlpPolicy(parts.exits, CANDIDATES_V1, parts.gate.weights(preference), 0.0, table_VK)

    return placed("PPO", build, np.geomspace(low, high, GRID), parts.targets, parts.data, "λ=")


JUMPS = "PPO jumps"
BEST_EXITS = "p̂ on best exits"
ON_POLICY = "PPO on-policy"


@register(JUMPS, is_learned=True, is_seeded=True, is_staged=True)
def _jumps(parts: TrainedParts) -> list[Contender]:
    """PPO that also says at which exit it is asked next; features after jumps are recomputed."""
    tried = []
    for preference in np.geomspace(*parts.jumps.lambda_range, GRID).tolist():
        router = parts.jumps.router(preference, parts.data.candidates_VK)
        paths = parts.states.replay_router(router)
        tried.append(
            Contender(
                family=JUMPS,
                setting=preference,
                offline_agreement=float(paths.quality_N(parts.data.validation).mean()),
                policy=router,
                offline_cost=float(paths.cost_N(parts.states.problem.costs).mean()),
                symbol="λ=",
            )
        )
    return nearest(tried, parts.targets)


@register(BEST_EXITS, is_learned=True, is_seeded=True)
def _best_exits(parts: TrainedParts) -> list[Contender]:
    """p̂ on the subset of exits, and at the threshold, that meets a target at the least cost."""
    table, phat, found = parts.states, parts.state_phat, {}
    grid = SubsetGrid.of(table, phat, [logit(each) for each in SURE])
    logits = table.logits(phat)
    # Targets that nothing tells apart have one choice, and it takes part once.
    for subset, threshold in dict.fromkeys(grid.cheapest(target) for target in parts.targets):
        paths = table.replay_subset(logits, subset, threshold)
        layers = tuple(parts.exits[index] for index in subset)
        found[subset, threshold] = Contender(
            family=BEST_EXITS,
            setting=float(1 / (1 + np.exp(-threshold))),
            offline_agreement=float(paths.quality_N(parts.data.validation).mean()),
            policy=MlpPolicy(layers, table.schema, phat, threshold, parts.data.candidates_VK),
            offline_cost=float(paths.cost_N(table.problem.costs).mean()),
            note=f" at {','.join(map(str, layers))}",
        )
    return list(found.values())


@register(ON_POLICY, is_learned=True, is_seeded=True, is_staged=True)
def _on_policy(parts: TrainedParts) -> list[Contender]:
    """PPO jumps after rounds in the engine, at the preferences that were placed before them."""
    if not parts.config.onpolicy.rounds:
        return []
    before = parts.placed.get(JUMPS) or _jumps(parts)
    settings = [each.setting for each in before if each.setting is not None]
    return [
        Contender(
            family=ON_POLICY,
            setting=setting,
            offline_agreement=None,  # its cache is not the one that was recorded
            policy=parts.learner.router(setting, parts.data.candidates_VK),
            symbol="λ=",
        )
        for setting in settings
    ]
