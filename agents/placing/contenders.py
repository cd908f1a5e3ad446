"""The policies that are compared, each family at several operating points.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.agents.learning.export import Weights, ppo_weights
from offramp.agents.learning.phat import logit
from offramp.agents.learning.ppo import TrainedAgent
from offramp.agents.placing.placing import GRID, Contender, measured, placed
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, NeverExit, ThresholdPolicy

__all__ = ["LEARNED", "Contender", "assemble"]

LEARNED = ("p̂", "PPO", "p̂ on best exits", "PPO jumps", "PPO on-policy")
"""Families that both forms of ``offramp train`` teach, and that may be published."""


def assemble(
    data: TrainingData,
    phat: Weights,
    agent: TrainedAgent,
    targets: Sequence[float],
    lambdas: Sequence[float],
) -> list[Contender]:
    """Every contender: each adjustable family placed at the same offline agreements.

    Args:
        data: Traces to place the operating points on (its validation split).
        phat: Weights of the classifier.
        agent: The trained agent.
        targets: Agreements with full depth to place points at, each in (0, 1).
        lambdas: Lowest and highest preference the agent was trained for.
    """
    exits = data.train.header.exits
    table = data.candidates_VK

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
    contenders += [measured("fixed exit", layer, FixedExit(layer), data) for layer in exits]
    contenders += placed("CALM", calm, probabilities, targets, data)
    contenders += placed("CALM on candidates", calm_on_candidates, probabilities, targets, data)
    contenders += placed("p̂", classifier, probabilities, targets, data)
    contenders += placed("PPO", actor, preferences, targets, data)
    return contenders
