"""The published rules, from CALM to GREEN-CODE, as families of the table of families.

Importing this module registers them. Each is fitted on the training split and placed on the
validation split of the data.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.agents.learning.phat import train_phat
from offramp.agents.placing.contenders import GRID, Contender, measured, nearest, placed
from offramp.agents.training.families import BEST_EXITS, JUMPS, PROBABILITIES, classifiers, register
from offramp.agents.training.train_config import GATE_FAMILIES
from offramp.agents.training.trained_parts import TrainedParts
from offramp.controller.features import SOFTMAX_V2, STATE_V1, FeatureSchema
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.rules.decay import DecayingThreshold
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.controller.policies.rules.position import PositionSchedule
from offramp.envs.charges.token_costs import TokenCosts
from offramp.research.fitting.backward_induction import fit_stopping
from offramp.research.fitting.budget import fit_budget
from offramp.research.fitting.greencode import GreenCodeConfig, greencode_policy, train_greencode
from offramp.research.fitting.online import fit_bandit, fit_beta

TRADE_OFFS = np.geomspace(0.02, 2.0, GRID)
COSINES = 1 - np.geomspace(1e-5, 1.0, GRID)
LOGITS = np.linspace(-4.0, 16.0, GRID)
ZETAS = np.linspace(0.1, 0.9, 25)

MEETS = 0.01
"""An agreement this far from its target still meets it, when variants are compared by cost."""

Settings = NDArray[np.float64]
"""Values of a family's one knob."""

PREDICTOR_COLUMNS = ("top1", "margin", "top_logit", "top1_change")
"""SpecEE's features as CANDIDATES_V1 has them: scores and probabilities of the candidates, and how
the probability changed since the last probe."""

RULES = (
    "CALM decaying",
    "softmax max decaying",
    "CALM saturation",
    "DeeBERT entropy",
    "SkipDecode",
    "PABEE patience",
    "FREE",
    "UCB bandit",
    "EERO budget",
    "SpecEE predictor",
    "backward induction",
)
"""Names of the rules registered here that any recording will do for."""

GREEN_CODE = "GREEN-CODE"
"""The rule that needs a recording with hidden states."""

PUBLISHED = (*GATE_FAMILIES, *RULES, BEST_EXITS, JUMPS)
"""Everything that a comparison of families takes in, but for GREEN-CODE."""


def _place(
    family: str,
    build: Callable[[float], Policy],
    settings: Settings,
    parts: TrainedParts,
    symbol: str = "τ=",
) -> list[Contender]:
    return placed(family, build, settings, parts.targets, parts.data, symbol)


def _decaying(
    parts: TrainedParts, schema: FeatureSchema, column: str, decay: float
) -> Callable[[float], Policy]:
    def build(threshold: float) -> Policy:
        return DecayingThreshold(
            exits=parts.exits, schema=schema, column=column, threshold=threshold, decay=decay
        )

    return build


def cheapest_variant(variants: Sequence[Sequence[Contender]], target: float) -> Contender:
    """Take of each variant the setting nearest the target, and of those the cheapest that meets it.

    Where none meets it, the nearest is taken.
    """
    candidates = [nearest(each, [target])[0] for each in variants]
    meeting = [each for each in candidates if abs((each.offline_agreement or 0) - target) <= MEETS]
    if not meeting:
        return nearest(candidates, [target])[0]
    return min(meeting, key=lambda each: each.offline_cost or 0.0)


@register("CALM decaying")
def _calm_decaying(parts: TrainedParts) -> list[Contender]:
    build = _decaying(parts, SOFTMAX_V2, "margin", 4.0)
    return _place("CALM decaying", build, PROBABILITIES, parts)


@register("softmax max decaying")
def _softmax_decaying(parts: TrainedParts) -> list[Contender]:
    build = _decaying(parts, SOFTMAX_V2, "top1", 4.0)
    return _place("softmax max decaying", build, PROBABILITIES, parts)


@register("CALM saturation")
def _saturation(parts: TrainedParts) -> list[Contender]:
    return _place("CALM saturation", _decaying(parts, STATE_V1, "cosine", 0.0), COSINES, parts)


@register("DeeBERT entropy")
def _entropy(parts: TrainedParts) -> list[Contender]:
    def build(threshold: float) -> Policy:
        return EntropyExit(exits=parts.exits, threshold=threshold)

    return _place("DeeBERT entropy", build, np.geomspace(1e-4, 1, GRID), parts)


@register("SkipDecode")
def _skip_decode(parts: TrainedParts) -> list[Contender]:
    layers = parts.data.train.header.layers

    def build(shallowest: float) -> Policy:
        return PositionSchedule(exits=parts.exits, deepest=layers, shallowest=shallowest)

    return _place("SkipDecode", build, np.linspace(1, layers, GRID), parts, "to layer ")


@register("PABEE patience")
def _patience(parts: TrainedParts) -> list[Contender]:
    return [
        measured(
            "PABEE patience", each, PatienceExit(exits=parts.exits, patience=each), parts.data, "t="
        )
        for each in range(1, len(parts.exits))
    ]


@register("FREE")
def _free(parts: TrainedParts) -> list[Contender]:
    """Go on learning a threshold while serving; at each target at the exit that costs least."""
    data = parts.data
    variants = [
        [
            measured("FREE", float(zeta), fit_beta(data.train, layer, float(zeta)), data, "ζ=")
            for zeta in ZETAS
        ]
        for layer in parts.exits
    ]
    found = {id(each): each for each in (cheapest_variant(variants, t) for t in parts.targets)}
    return list(found.values())


@register("UCB bandit")
def _bandit(parts: TrainedParts) -> list[Contender]:
    data, arms = parts.data, np.linspace(0.1, 0.99, 9).tolist()
    tried = [
        measured(
            "UCB bandit",
            float(each),
            fit_bandit(data.train, data.costs, float(each), arms),
            data,
            "λ=",
        )
        for each in TRADE_OFFS[::2]
    ]
    return nearest(tried, parts.targets)


@register("EERO budget")
def _budget(parts: TrainedParts) -> list[Contender]:
    data = parts.data

    def build(share: float) -> Policy:
        return fit_budget(data.train, data.costs, share)

    cheapest = float(
        TokenCosts.under(
            SOFTMAX_V2, data.costs, parts.exits, data.train.header.adapters
        ).asked_everywhere_E1.min()
    )
    budgets = np.linspace(cheapest * 1.001, max(1.0, cheapest * 1.1), GRID)
    return _place("EERO budget", build, budgets, parts, "B=")


@register("SpecEE predictor", is_seeded=True)
def _predictor(parts: TrainedParts) -> list[Contender]:
    weights = train_phat(parts.data.train, parts.config.phat, PREDICTOR_COLUMNS)
    return classifiers("SpecEE predictor", parts, weights)


@register("backward induction")
def _backward_induction(parts: TrainedParts) -> list[Contender]:
    data = parts.data

    def build(trade_off: float) -> Policy:
        return fit_stopping(data.train, data.costs, trade_off, candidates_VK=data.candidates_VK)

    return _place("backward induction", build, TRADE_OFFS, parts, "λ=")


@register(GREEN_CODE, is_seeded=True)
def _green_code(parts: TrainedParts) -> list[Contender]:
    return green_code(parts, GreenCodeConfig(seed=parts.config.seed))


def green_code(parts: TrainedParts, config: GreenCodeConfig) -> list[Contender]:
    """Train GREEN-CODE's agent and place it.

    Raises:
        TraceError: the traces hold no hidden states.
    """
    weights = train_greencode(parts.data.train, config)

    def build(threshold: float) -> Policy:
        return greencode_policy(weights, parts.exits, threshold)

    # Its probabilities saturate: the thresholds lie evenly in logits, not in probabilities.
    return _place(GREEN_CODE, build, LOGITS, parts, "logit T=")
