"""The policies that are compared, each family at several operating points.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from offramp.agents.export import Weights, ppo_weights
from offramp.agents.phat import logit
from offramp.agents.ppo import TrainedAgent
from offramp.agents.replay import replay
from offramp.agents.study import Study
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2
from offramp.controller.mlp import MlpPolicy
from offramp.controller.policy import ExitPolicy, FixedExit, NeverExit, Policy, ThresholdPolicy

Family = Literal["full depth", "fixed exit", "CALM", "CALM on candidates", "p̂", "PPO"]
LEARNED: tuple[Family, ...] = ("p̂", "PPO")
"""Families that may be published."""

GRID = 41
"""Settings tried per family when operating points are placed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One policy at one operating point.

    Attributes:
        family: What kind of rule or agent.
        setting: Its threshold, preference or layer; None for full depth.
        offline_agreement: On validation traces; None for full depth.
        policy: Ready to run.
    """

    family: Family
    setting: float | None
    offline_agreement: float | None
    policy: Policy

    @property
    def name(self) -> str:
        """Family and setting, such as ``p̂ τ=0.92``."""
        if self.setting is None:
            return self.family
        symbol = {"fixed exit": "layer ", "PPO": "λ="}.get(self.family, "τ=")
        return f"{self.family} {symbol}{self.setting:.3g}"


def assemble(
    study: Study,
    phat: Weights,
    agent: TrainedAgent,
    targets: Sequence[float],
    lambdas: Sequence[float],
) -> list[Contender]:
    """Every contender: each adjustable family placed at the same offline agreements.

    Args:
        study: Traces to place the operating points on (its validation split).
        phat: Weights of the classifier.
        agent: The trained agent.
        targets: Agreements with full depth to place points at, each in (0, 1).
        lambdas: Lowest and highest preference the agent was trained for.
    """
    exits = study.train.header.exits
    table = study.candidates_VK

    def calm(threshold: float) -> ExitPolicy:
        return ThresholdPolicy(exits, SOFTMAX_V2, "margin", threshold)

    def calm_on_candidates(threshold: float) -> ExitPolicy:
        return ThresholdPolicy(exits, CANDIDATES_V1, "margin", threshold, table)

    def classifier(threshold: float) -> ExitPolicy:
        return MlpPolicy(exits, CANDIDATES_V1, phat, logit(threshold), table)

    def actor(preference: float) -> ExitPolicy:
        weights = ppo_weights(agent.model, agent.normaliser, preference)
        return MlpPolicy(exits, CANDIDATES_V1, weights, 0.0, table)

    probabilities = np.linspace(0.01, 0.999, GRID)
    preferences = np.geomspace(lambdas[0], lambdas[-1], GRID)
    contenders = [
        Contender(family="full depth", setting=None, offline_agreement=None, policy=NeverExit())
    ]
    contenders += [_measured("fixed exit", layer, FixedExit(layer), study) for layer in exits]
    contenders += _placed("CALM", calm, probabilities, targets, study)
    contenders += _placed("CALM on candidates", calm_on_candidates, probabilities, targets, study)
    contenders += _placed("p̂", classifier, probabilities, targets, study)
    contenders += _placed("PPO", actor, preferences, targets, study)
    return contenders


def _measured(family: Family, setting: float, policy: ExitPolicy, study: Study) -> Contender:
    agreement = replay(policy, study.validation, study.costs).agreement
    return Contender(family=family, setting=setting, offline_agreement=agreement, policy=policy)


def _placed(
    family: Family,
    build: Callable[[float], ExitPolicy],
    settings: np.ndarray,
    targets: Sequence[float],
    study: Study,
) -> list[Contender]:
    tried = [_measured(family, float(s), build(float(s)), study) for s in settings]
    chosen = {}
    for target in targets:
        nearest = min(tried, key=lambda c: abs((c.offline_agreement or 0.0) - target))
        chosen[nearest.setting] = nearest
    return list(chosen.values())
