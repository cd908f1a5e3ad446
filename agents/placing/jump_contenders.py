"""Jumping agents beside what they must beat: p̂ with the best subset of exits, and its threshold.

Shape suffixes: M rows, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from offramp.agents.learning.export import Weights
from offramp.agents.learning.game import states_of
from offramp.agents.learning.jump_ppo import JumpAgent
from offramp.agents.learning.normaliser import Normaliser
from offramp.agents.learning.observe import StateObservations
from offramp.agents.learning.phat import PhatConfig, fit_classifier, logit
from offramp.agents.placing.chase import StateTable, SubsetGrid
from offramp.agents.placing.contenders import Contender
from offramp.agents.placing.placing import SUBSET
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.policies.mlp import MlpPolicy
from offramp.envs.traces.tokens import TokenTraces

JUMPING = "PPO jumps"

GRID = 41
"""Settings tried per family."""

PHAT_TOKENS = 12_000
"""Tokens that the classifier of all states is fitted on, each in every state."""


def fit_state_phat(traces: TokenTraces, config: PhatConfig) -> Weights:
    """p̂ of every state that jumps can reach, so that it is as good on any subset of exits.

    Args:
        traces: Training tokens.
        config: How.
    """
    exits = len(traces.header.exits)
    states = states_of(exits, exits + 1)
    observations = StateObservations(traces, states)
    rng = np.random.default_rng(config.seed)
    rows = rng.permutation(len(traces))[:PHAT_TOKENS]
    rows_MF = np.concatenate([observations.at(state, rows) for state in states[1:]])
    right_M = np.concatenate([traces.agree_NE[rows, state.here] for state in states[1:]])
    fitted = observations.normaliser((0.1, 1.0), config.seed)
    features = Normaliser(fitted.mean_F[:-1], fitted.std_F[:-1])  # without log λ
    # A token in its many states is not as many tokens: fewer passes do.
    return fit_classifier(
        rows_MF, right_M, features, replace(config, epochs=-(-config.epochs // 3))
    )


def jump_contenders(
    data: TrainingData, agent: JumpAgent, phat: Weights, targets: Sequence[float]
) -> list[Contender]:
    """The agent's routers, and p̂ on best exits, each at some offline agreements on validation.

    Args:
        data: Traces to place the operating points on (its validation split).
        agent: A trained agent.
        phat: Of ``fit_state_phat``.
        targets: Agreements with full depth to place points at, each in (0, 1).
    """
    table = StateTable(data.validation, data.costs)
    tried = [_routed(data, table, agent, each) for each in np.geomspace(*agent.lambda_range, GRID)]
    nearest = {}
    for target in targets:
        best = min(tried, key=lambda each: abs((each.offline_agreement or 0.0) - target))
        nearest[best.setting] = best
    thresholds = [logit(each) for each in np.linspace(0.3, 0.999, GRID)]
    grid = SubsetGrid.of(table, phat, thresholds)
    return [*nearest.values(), *_on_subsets(data, table, grid, phat, targets)]


def _routed(
    data: TrainingData, table: StateTable, agent: JumpAgent, preference: float
) -> Contender:
    router = agent.router(preference, data.candidates_VK)
    agreement = float(table.chase_router(router).agreement_N(data.validation).mean())
    return Contender(
        family=JUMPING, setting=float(preference), offline_agreement=agreement, policy=router
    )


def _on_subsets(
    data: TrainingData, table: StateTable, grid: SubsetGrid, phat: Weights, targets: Sequence[float]
) -> list[Contender]:
    exits, found = data.validation.header.exits, []
    logits = table.logits(phat)
    for target in targets:
        subset, threshold = grid.cheapest(target)
        chased = table.chase_subset(logits, subset, threshold)
        layers = tuple(exits[index] for index in subset)
        found.append(
            Contender(
                family=SUBSET,
                setting=float(1 / (1 + np.exp(-threshold))),
                offline_agreement=float(chased.agreement_N(data.validation).mean()),
                policy=MlpPolicy(layers, table.schema, phat, threshold, data.candidates_VK),
            )
        )
    return found
