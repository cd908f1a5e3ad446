"""On-policy evaluation: the exits really taken, the cache really affected, time really spent.

Shape suffix: D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.agents.contenders import Contender
from offramp.worker.engine import AdaptiveEngine
from offramp.worker.follow import Followed, follow

RESAMPLES = 2000
"""Bootstrap resamples of the documents."""

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRow:
    """One contender, measured on-policy. Intervals are 95 % by paired document bootstrap.

    Attributes:
        policy: Name with its operating point.
        family: Kind of policy.
        setting: Threshold, preference or layer; None for full depth.
        agreement: Share of tokens equal to those of full depth, same history.
        agreement_low, agreement_high: Its interval.
        accuracy: Share of tokens equal to the document's.
        mean_layers: Mean layers executed per token.
        wall_ratio: Wall time per token over that of KV-cached full depth, measured interleaved;
            None where only quality was measured.
        wall_ratio_low, wall_ratio_high: Its interval.
        us_per_token: Microseconds per token at batch 1.
        offline_agreement: What replaying the traces had promised.
        tokens: Tokens that quality was measured on.
        exits: Layers at which the policy is asked.
        depths: How many tokens left after each layer, by layer.
    """

    policy: str
    family: str
    setting: float | None
    agreement: float
    agreement_low: float
    agreement_high: float
    accuracy: float
    mean_layers: float
    wall_ratio: float | None
    wall_ratio_low: float | None
    wall_ratio_high: float | None
    us_per_token: float | None
    offline_agreement: float | None
    tokens: int
    exits: tuple[int, ...]
    depths: dict[int, int]


def evaluate(
    engine: AdaptiveEngine,
    contenders: Sequence[Contender],
    documents: Sequence[Tokens],
    *,
    prompt_tokens: int,
    timed_documents: int,
    timed_tokens: int,
    seed: int = 0,
    on_run: Callable[[int, int], None] = lambda *_: None,
) -> list[EvaluationRow]:
    """Decode documents under every contender, teacher-forced; the first must be full depth.

    Quality is measured on all documents, as many at a time as the engine has slots. Time is
    measured at batch 1 on the first ``timed_documents``, document by document, the contenders in
    a rotating order, so that each ratio compares neighbours in time. Many short runs, because a
    disturbance of the machine should hit few of them.

    Args:
        engine: Idle.
        contenders: Full depth first.
        documents: Token ids, longer than ``prompt_tokens`` + 1.
        prompt_tokens: Tokens of each document read at full depth first.
        timed_documents: Documents timed; 0 skips timing.
        timed_tokens: Tokens timed after each one's prompt, at most.
        seed: Of the bootstrap.
        on_run: Told (runs done, runs in all).
    """
    assert contenders[0].setting is None  # full depth, the reference of every row
    total = len(contenders) * (1 + timed_documents)
    done = 0
    followed: list[list[Followed]] = []
    for contender in contenders:
        followed.append(follow(engine, documents, prompt_tokens, contender.policy)[0])
        done += 1
        on_run(done, total)
    seconds_CD = np.zeros((len(contenders), timed_documents))
    for index in range(timed_documents):
        for turn in range(len(contenders)):
            c = (turn + index) % len(contenders)
            policy = contenders[c].policy
            document = documents[index][: prompt_tokens + 1 + timed_tokens]
            _, seconds_CD[c, index] = follow(engine, [document], prompt_tokens, policy)
            done += 1
            on_run(done, total)
    rng = np.random.default_rng(seed)
    return [
        _row(contender, followed[c], followed[0], seconds_CD[c], seconds_CD[0], timed_tokens, rng)
        for c, contender in enumerate(contenders)
    ]


def _row(
    contender: Contender,
    mine: list[Followed],
    full: list[Followed],
    seconds_D: NDArray[np.float64],
    full_seconds_D: NDArray[np.float64],
    timed_tokens: int,
    rng: np.random.Generator,
) -> EvaluationRow:
    tokens_D = np.asarray([len(run.emitted) for run in mine], np.float64)
    agree_D = np.asarray([_matches(a.emitted, b.emitted) for a, b in zip(mine, full, strict=True)])
    right = sum(_matches(run.emitted, run.expected) for run in mine)
    layers = [layer for run in mine for layer in run.exit_layers]
    agreement, low, high = bootstrap_ratio(agree_D, tokens_D, rng)
    wall: tuple[float | None, ...] = (None, None, None)
    if len(seconds_D):
        wall = bootstrap_ratio(seconds_D, full_seconds_D, rng)
    timed = np.minimum(tokens_D[: len(seconds_D)], timed_tokens).sum()
    return EvaluationRow(
        policy=contender.name,
        family=contender.family,
        setting=contender.setting,
        agreement=agreement,
        agreement_low=low,
        agreement_high=high,
        accuracy=right / tokens_D.sum(),
        mean_layers=sum(layers) / len(layers),
        wall_ratio=wall[0],
        wall_ratio_low=wall[1],
        wall_ratio_high=wall[2],
        us_per_token=1e6 * float(seconds_D.sum() / timed) if len(seconds_D) else None,
        offline_agreement=contender.offline_agreement,
        tokens=int(tokens_D.sum()),
        exits=tuple(contender.policy.exits),
        depths={layer: layers.count(layer) for layer in sorted(set(layers))},
    )


def bootstrap_ratio(
    above_D: NDArray[np.float64], below_D: NDArray[np.float64], rng: np.random.Generator
) -> tuple[float, float, float]:
    """Σ above / Σ below over documents, with its 95 % percentile interval (Efron 1979).

    Documents are drawn whole and paired: numerator and denominator of one stay together.
    """
    draws = rng.integers(len(above_D), size=(RESAMPLES, len(above_D)))
    ratios = above_D[draws].sum(-1) / below_D[draws].sum(-1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(above_D.sum() / below_D.sum()), float(low), float(high)


def _matches(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))
