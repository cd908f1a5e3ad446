"""A release whose workers may move among three certified settings."""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import ThresholdPolicy
from offramp.controller.release.certificate import Walked
from offramp.controller.release.registry import Head
from offramp.worker.following.refresh import PolicyRefresher
from support.releases.certificates import certificate
from support.releases.channel import MODEL, TOKENIZER, Bench

SETTINGS = (0.95, 0.5, 0.2)
"""Safest first; the reference model's layer 3 and full depth seldom agree at the last if tokens
are drawn hot."""

POLICY = ThresholdPolicy((3,), SOFTMAX_V2, "margin", SETTINGS[-1])
ABOVE = 0.15


def released(bench: Bench, **changes: Any) -> Head:
    """A release of the policy, with a certificate of all settings, and bounds."""
    packed = pack_policy(POLICY, np.full((4, SOFTMAX_V2.width), 0.5, np.float32))
    walked = tuple(Walked(setting=each, risk=0.01, p_value=0.001, passed=True) for each in SETTINGS)
    proof = certificate(
        packed.digest,
        walked=walked,
        setting=SETTINGS[-1],
        risk=0.01,
        p_value=0.001,
        parameter="threshold of margin",
    )
    bounds = {"adapt_above": ABOVE, "max_disagreement": 0.9}
    options: dict[str, Any] = {"certificate": proof, "guardrails": bounds}
    return bench.publisher.release(
        packed, model=MODEL, tokenizer=TOKENIZER, training={}, metrics={}, **options | changes
    )


def moved_to(worker: PolicyRefresher, setting: float) -> None:
    """Have full depth disagree until a worker stands at a setting, and let it end in order."""
    watch = worker.current.watch
    assert watch is not None
    while (now := worker.current.setting) != setting:
        assert now is not None
        assert watch.tally.audited < 200, watch.tally
        watch.judge(False, now)
    worker.poll_once()
    worker.stop()
