"""A policy of every kind that is packed. Shape suffixes: V vocabulary, K candidates."""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.controller.features import (
    CANDIDATES_V1,
    OUTLOOK_V1,
    SOFTMAX_V2,
    STATE_V1,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.drafts import (
    ConfidentDraft,
    DelDraft,
    DraftRouter,
    StaticDraft,
    ThompsonDraft,
    TrustedDraft,
)
from offramp.controller.policies.drafts.draft_insight import (
    KIND_COLUMNS,
    SURE_COLUMNS,
    DraftInsight,
    kind_byte,
)
from offramp.controller.policies.drafts.draft_trust import DraftChances
from offramp.controller.policies.exits import Exit
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.controller.policies.router import MlpRouter
from offramp.controller.policies.rules.bandit import ThresholdBandit
from offramp.controller.policies.rules.beta import BetaThreshold
from offramp.controller.policies.rules.decay import DecayingThreshold
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.controller.policies.rules.kept_stages import KeptStages
from offramp.controller.policies.rules.optimal_stopping import StoppingPolicy
from offramp.controller.policies.rules.position import PositionSchedule
from offramp.controller.policies.rules.prompt_rules import RandomShare, WindowedExit
from offramp.controller.policies.rules.stages import StageThresholds

EXITS = (3, 6, 9)
SEEN = OUTLOOK_V1.width + 2


def make_stopping(rng: np.random.Generator) -> StoppingPolicy:
    width = STATE_V1.width
    return StoppingPolicy(
        exits=EXITS,
        schema=STATE_V1,
        mean_F=rng.normal(size=width).astype(np.float32),
        std_F=1 + rng.random(width, dtype=np.float32),
        weights_EP=rng.normal(size=(3, 55)).astype(np.float32),
    )


RULES: list[Policy] = [
    DecayingThreshold(exits=EXITS, schema=SOFTMAX_V2, column="margin", threshold=0.4),
    EntropyExit(exits=EXITS, threshold=0.5),
    PatienceExit(exits=EXITS, patience=2),
    PositionSchedule(exits=EXITS, deepest=12, shallowest=4.5),
    StageThresholds(exits=EXITS, schema=SOFTMAX_V2, column="top1", thresholds=(2.0, 0.5, 0.2)),
    KeptStages(
        exits=EXITS,
        schema=SOFTMAX_V2,
        column="top1",
        shares=(0.0, 0.3, 0.5),
        scores_EQ=np.linspace((0, 0.1, 0.2), 1, 9).T,
    ),
    BetaThreshold(
        exits=(6,),
        schema=SOFTMAX_V2,
        column="top1",
        zeta=0.4,
        moments_23=np.array([[40, 16.0, 8.0], [60, 45.0, 36.0]]),
    ),
    ThresholdBandit(
        exits=EXITS,
        schema=SOFTMAX_V2,
        column="top1",
        thresholds=(0.2, 0.5, 0.9),
        trade_off=0.5,
        costs=(0.3, 0.6, 0.8, 1.1),
        counts_A=np.array([3, 4, 5]),
        sums_A=np.array([1.0, 2.0, 2.5]),
    ),
    make_stopping(np.random.default_rng(8)),
    WindowedExit(exits=(6,), window=16),
    RandomShare(exits=EXITS, share=0.4, seed=3),
]


def net(inputs: int, outputs: int, seed: int) -> list[tuple[FloatArray, FloatArray]]:
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((a, b)).astype(np.float32), rng.standard_normal(b).astype(np.float32))
        for a, b in ((inputs, 8), (8, outputs))
    ]


TABLE_VK = np.arange(40, dtype=np.int32).reshape(10, 4) % 10


LAST = Exit(12, "int4")


def insight(exits: int) -> DraftInsight:
    rng = np.random.default_rng(2)
    inputs = SURE_COLUMNS + KIND_COLUMNS + 4
    projections = rng.standard_normal((exits, 6, 4)).astype(np.float32)
    kinds = np.array([kind_byte(text) for text in ("def", " a", "\n", "   ")], np.uint8)
    return DraftInsight(projections, [net(inputs, 1, here) for here in range(exits)], kinds)


CHANCES = DraftChances(((0.5, 8.0), (0.0, 1.0)), (LAST, 3), insight(2))


def drafter(
    candidates_VK: IntArray | None = None, exits: tuple[int, ...] = (3, 6), **options: Any
) -> DraftRouter:
    width = (SOFTMAX_V2 if candidates_VK is None else CANDIDATES_V1).width
    nets = net(SEEN, 3, 0), net(width + SEEN, 3, 1)
    return DraftRouter(exits, *nets, candidates_VK=candidates_VK, **options)


DRAFTS: tuple[Policy, ...] = (
    StaticDraft(layer=6, length=3),
    ConfidentDraft(layer=3, threshold=0.4, length=6),
    ThompsonDraft(6, alpha=3.0, length=5),
    DelDraft((3, 6), 12, (0.7, 0.9), (0.4, 0.5)),
    drafter(),
    ConfidentDraft(layer=3, threshold=0.4, candidates_VK=TABLE_VK),
    drafter(TABLE_VK),
    StaticDraft(layer=LAST, length=3),
    ConfidentDraft(layer=LAST, threshold=0.4, candidates_VK=TABLE_VK),
    ThompsonDraft(LAST, length=5),
    DelDraft((LAST, 3), 12, (0.7, 0.9), (0.4, 0.5), (4.8, 3)),
    drafter(TABLE_VK, (LAST, 3), chances=CHANCES),
    TrustedDraft(LAST, (0.5, 8.0), 0.8, length=6),
    TrustedDraft(3, (0.5, 8.0), 0.8, candidates_VK=TABLE_VK),
    TrustedDraft(3, (0.5, 8.0), 0.8, insight=insight(1)),
)

NETS: tuple[Policy, ...] = (
    MlpPolicy((2, 4), CANDIDATES_V1, net(CANDIDATES_V1.width, 1, 2), 0.25, TABLE_VK),
    MlpRouter(EXITS, SOFTMAX_V2, net(SOFTMAX_V2.width + OUTLOOK_V1.width, 3, 3)),
)
PLAIN: tuple[Policy, ...] = (
    NeverExit(),
    FixedExit(3),
    ThresholdPolicy((2, 4), CANDIDATES_V1, "top1", 0.1, TABLE_VK),
)
