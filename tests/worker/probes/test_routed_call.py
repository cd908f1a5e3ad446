"""A row that is probed and routed in one compiled call goes where it goes in two.

Shape suffixes: V vocabulary, K candidates, E exits; 2 the intercept and the slope of a line.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1
from offramp.controller.policies.drafts import DraftRouter
from offramp.controller.policies.drafts.draft_trust import DraftChances
from offramp.controller.policies.net import Weights
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.probes import FusedProbe
from offramp.worker.probes.candidates.successors import successor_table
from support.models import VOCAB, make_model

EXITS = (1, 2, 4)
LINES = [(0.2, 1.5), (0.0, 3.0), (-1.0, 8.0)]
PROMPTS = [[5, 17, 33, 2, 41], [9, 9, 3], [60, 1, 2, 3, 4, 5, 6]]


def net(inputs: int, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    sizes = ((inputs, 16), (16, len(EXITS) + 1))
    return [
        (rng.standard_normal((a, b)).astype(np.float32), rng.standard_normal(b).astype(np.float32))
        for a, b in sizes
    ]


def router(seed: int) -> DraftRouter:
    tokens = np.random.default_rng(1).integers(1, 90, size=2000).tolist()
    seen = OUTLOOK_V1.width + 2
    return DraftRouter(
        EXITS,
        net(seen, seed),
        net(CANDIDATES_V1.width + seen, seed + 100),
        candidates_VK=successor_table([tokens], VOCAB, 64),
        chances=DraftChances(LINES, EXITS),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_routes_as_two_do(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AdaptiveEngine(make_model("llama", dtype), slots=1)
    sampling = SamplingParams(max_tokens=24, ignore_eos=True)
    routed: list[int] = []
    route = FusedProbe.route

    def counted(self: FusedProbe, *asked: object) -> int:
        routed.append(1)
        return route(self, *asked)  # type: ignore[arg-type]

    def run() -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        for seed in range(6):
            for prompt in PROMPTS:
                [done] = engine.generate([prompt], sampling, router(seed), kv_mode="verify")
                stats = done.stats
                found.append(
                    (done.token_ids, stats.layer_calls, stats.drafts, stats.drafts_accepted)
                )
        return found

    monkeypatch.setattr(FusedProbe, "route", counted)
    in_one = run()
    assert len(routed) > 100
    assert len({each[1] for each in in_one}) > 4  # they do not all go the same way
    routed.clear()
    monkeypatch.setattr(DraftRouter, "is_compiled", False)
    assert run() == in_one
    assert not routed


def test_what_is_not_finite_fails_for_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AdaptiveEngine(make_model("llama"), slots=1)
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    [full] = engine.generate([PROMPTS[0]], sampling)
    broken = router(0)
    weight, bias = broken.router.weights[-1]
    wrong = [*broken.router.weights[:-1], (np.full_like(weight, np.inf), bias)]
    policy = DraftRouter(
        EXITS,
        [
            *net(OUTLOOK_V1.width + 2, 0)[:-1],
            (np.zeros((16, 4), np.float32), np.eye(4, dtype=np.float32)[0]),
        ],
        wrong,
        candidates_VK=broken.candidates_VK,
        chances=broken.chances,
    )
    [done] = engine.generate([PROMPTS[0]], sampling, policy, kv_mode="verify")
    assert done.token_ids == full.token_ids
    assert done.stats.drafts == 0
    assert engine.decoder.failures > 0
