"""Every rule of the literature at the operating points of an evaluation.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.agents.learning.export import Weights
from offramp.agents.learning.phat import PhatConfig, logit, train_phat
from offramp.agents.placing.placing import (
    GRID,
    SUBSET,
    Contender,
    cheapest_variant,
    measured,
    nearest,
    placed,
)
from offramp.agents.placing.pricing import leaving
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.features import (
    CANDIDATES_V1,
    SOFTMAX_V2,
    STATE_V1,
    FeatureSchema,
    IntArray,
)
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy
from offramp.controller.policies.rules.decay import DecayingThreshold
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.controller.policies.rules.position import PositionSchedule
from offramp.research.fitting.backward_induction import fit_stopping
from offramp.research.fitting.budget import fit_budget
from offramp.research.fitting.greencode import (
    GreenCodeConfig,
    greencode_policy,
    train_greencode,
)
from offramp.research.fitting.online import fit_bandit, fit_beta
from offramp.research.fitting.subset import HERE_COLUMNS, best_subset

PROBABILITIES = np.linspace(0.01, 0.999, GRID)
TRADE_OFFS = np.geomspace(0.02, 2.0, GRID)
COSINES = 1 - np.geomspace(1e-5, 1.0, GRID)
LOGITS = np.linspace(-4.0, 16.0, GRID)
FINE_LOGITS = np.linspace(-1.0, 7.0, 2 * GRID).tolist()
ZETAS = np.linspace(0.1, 0.9, 25)

Settings = NDArray[np.float64]
"""Values of a family's one knob."""

PREDICTOR_COLUMNS = ("top1", "margin", "top_logit", "top1_change")
"""SpecEE's features as CANDIDATES_V1 has them: scores and probabilities of the candidates, and how
the probability changed since the last probe."""


def rulebook(
    data: TrainingData,
    targets: Sequence[float],
    *,
    seed: int = 0,
    phat: Weights | None = None,
    greencode: GreenCodeConfig | None = None,
) -> list[Contender]:
    """Full depth, then every rule, each placed at the offline agreements asked for.

    What is fitted is fitted on the data's training split; operating points are placed on its
    validation split. The hindsight oracle is no policy: see ``research/fitting/oracle.py``.

    Args:
        data: Recorded with CANDIDATES_V1.
        targets: Agreements with full depth, each in (0, 1). A family that cannot meet a target
            gives its nearest setting, and no setting twice.
        seed: Of everything trained.
        phat: Weights of p̂ on all columns, if already trained.
        greencode: How to train GREEN-CODE's agent, for which the traces need hidden states; None
            leaves it out.

    Raises:
        TraceError: GREEN-CODE is wanted and the traces hold no hidden states.
    """
    contenders = [
        Contender(family="full depth", setting=None, offline_agreement=None, policy=NeverExit())
    ]
    contenders += _unfitted(data, targets)
    contenders += _online(data, targets)
    contenders += _fitted(data, targets, seed, phat)
    if greencode is not None:
        contenders += _greencode(data, targets, greencode)
    return contenders


def _unfitted(data: TrainingData, targets: Sequence[float]) -> list[Contender]:
    """Rules with nothing but a threshold."""
    exits, table = data.train.header.exits, data.candidates_VK

    def calm(
        schema: FeatureSchema, column: str, decay: float, candidates_VK: IntArray | None = None
    ) -> Callable[[float], Policy]:
        def build(threshold: float) -> Policy:
            return DecayingThreshold(
                exits=exits,
                schema=schema,
                column=column,
                threshold=threshold,
                decay=decay,
                candidates_VK=candidates_VK,
            )

        return build

    def entropy(threshold: float) -> Policy:
        return EntropyExit(exits=exits, threshold=threshold)

    def schedule(shallowest: float) -> Policy:
        return PositionSchedule(exits=exits, deepest=layers, shallowest=shallowest)

    def place(family: str, build: Callable[[float], Policy], settings: Settings) -> list[Contender]:
        return placed(family, build, settings, targets, data)

    layers = data.train.header.layers
    found = [measured("fixed exit", layer, FixedExit(layer), data) for layer in exits]
    found += place("CALM", calm(SOFTMAX_V2, "margin", 0.0), PROBABILITIES)
    found += place("CALM decaying", calm(SOFTMAX_V2, "margin", 4.0), PROBABILITIES)
    found += place("softmax max decaying", calm(SOFTMAX_V2, "top1", 4.0), PROBABILITIES)
    found += place("CALM on candidates", calm(CANDIDATES_V1, "margin", 0.0, table), PROBABILITIES)
    found += place("CALM saturation", calm(STATE_V1, "cosine", 0.0), COSINES)
    found += place("DeeBERT entropy", entropy, np.geomspace(1e-4, 1, GRID))
    found += place("SkipDecode", schedule, np.linspace(1, layers, GRID))
    found += [
        measured("PABEE patience", each, PatienceExit(exits=exits, patience=each), data)
        for each in range(1, len(exits))
    ]
    return found


def _online(data: TrainingData, targets: Sequence[float]) -> list[Contender]:
    """Rules that go on learning while they serve."""
    train, costs = data.train, data.costs
    arms = np.linspace(0.1, 0.99, 9).tolist()
    free = [
        [measured("FREE", float(zeta), fit_beta(train, layer, float(zeta)), data) for zeta in ZETAS]
        for layer in train.header.exits
    ]
    bandits = [
        measured("UCB bandit", float(each), fit_bandit(train, costs, float(each), arms), data)
        for each in TRADE_OFFS[::2]
    ]
    found = {id(each): each for each in (cheapest_variant(free, t) for t in targets)}
    return [*found.values(), *nearest(bandits, targets)]


def _fitted(
    data: TrainingData, targets: Sequence[float], seed: int, phat: Weights | None
) -> list[Contender]:
    """Rules fitted on the training split."""
    train, costs, table = data.train, data.costs, data.candidates_VK
    config = PhatConfig(seed=seed)
    whole = phat or train_phat(train, config)
    predictor = train_phat(train, config, PREDICTOR_COLUMNS)
    here = train_phat(train, config, HERE_COLUMNS)

    def classifier(weights: Weights, exits: tuple[int, ...]) -> Callable[[float], Policy]:
        def build(threshold: float) -> Policy:
            return MlpPolicy(exits, CANDIDATES_V1, weights, logit(threshold), table)

        return build

    def stopping(trade_off: float) -> Policy:
        return fit_stopping(train, costs, trade_off, candidates_VK=table)

    def budget(share: float) -> Policy:
        return fit_budget(train, costs, share)

    exits = train.header.exits
    cheapest = float(leaving(SOFTMAX_V2, exits, costs).min())
    budgets = np.linspace(cheapest * 1.001, max(1.0, cheapest * 1.1), GRID)
    found = placed("EERO budget", budget, budgets, targets, data)
    found += placed("SpecEE predictor", classifier(predictor, exits), PROBABILITIES, targets, data)
    found += placed("p̂", classifier(whole, exits), PROBABILITIES, targets, data)
    found += placed("backward induction", stopping, TRADE_OFFS, targets, data)
    best = (
        best_subset(whole, here, data.validation, costs, target, FINE_LOGITS) for target in targets
    )
    # Targets that nothing tells apart have one choice, and it takes part once.
    for each in {(each.exits, each.logit): each for each in best}.values():
        policy = MlpPolicy(each.exits, CANDIDATES_V1, each.weights, each.logit, table)
        found.append(measured(SUBSET, each.logit, policy, data))
    return found


def _greencode(
    data: TrainingData, targets: Sequence[float], config: GreenCodeConfig
) -> list[Contender]:
    weights = train_greencode(data.train, config)

    def agent(threshold: float) -> Policy:
        return greencode_policy(weights, data.train.header.exits, threshold)

    # Its probabilities saturate: the thresholds lie evenly in logits, not in probabilities.
    return placed("GREEN-CODE", agent, LOGITS, targets, data)
