"""Verified sampling draws from full depth's own distribution (a chi-square test), by its seed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offramp.controller.features import MAX_PENDING, OUTLOOK_V1, SOFTMAX_V2, FloatArray
from offramp.controller.policies.drafts import TrustedDraft
from offramp.controller.policies.protocols import IndexArray, NeverExit, Policy
from offramp.worker import AdaptiveEngine, KVMode, SamplingParams
from offramp.worker.decoding.sampler import Sampler
from offramp.worker.decoding.schedule import LOCKSTEP, Schedule
from offramp.worker.engine.engine_config import EngineConfig
from support.models import DEVICE, SHAPE, make_model
from support.rows import RandomExit, drain

VOCAB, LAYERS = 4, 2
PROMPT = [1, 3, 0]
WARM: dict[str, Any] = {"temperature": 3.0, "top_p": 0.9, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    shape = {"vocab_size": VOCAB, "num_hidden_layers": LAYERS, "initializer_range": 0.3}
    config = LlamaConfig(**{**SHAPE, **shape, "eos_token_id": None})
    return LlamaForCausalLM(config).eval().requires_grad_(False).to(DEVICE)


def nucleus(logits_V: np.ndarray) -> np.ndarray:
    chances_V = np.exp((logits_V - logits_V.max()) / WARM["temperature"])
    chances_V /= chances_V.sum()
    order = np.argsort(-chances_V)
    before = np.cumsum(chances_V[order]) - chances_V[order]
    chances_V[order[before >= WARM["top_p"]]] = 0
    return np.asarray(chances_V / chances_V.sum())


@torch.inference_mode()
def exact_chances(model: Any) -> dict[tuple[int, ...], float]:
    """Of every sequence of three tokens, from Hugging Face's logits."""
    chances = {}
    for tokens in itertools.product(range(VOCAB), repeat=3):
        ids = torch.tensor([[*PROMPT, *tokens]], device=DEVICE)
        logits_TV = model(ids).logits[0, len(PROMPT) - 1 :].cpu().numpy()
        steps = [nucleus(logits_TV[t].astype(np.float64))[tokens[t]] for t in range(3)]
        chances[tokens] = float(np.prod(steps))
    return chances


def sampled(
    model: Any, schedule: Schedule, samples: int, kv_mode: KVMode = "verify"
) -> Counter[tuple[int, ...]]:
    """The first three of four tokens; the last one is full depth's in any case."""
    config = EngineConfig(kv_mode=kv_mode, schedule=schedule)
    engine = AdaptiveEngine.from_pretrained(model, slots=32, config=config)
    policy = RandomExit(0.7, exits=(1,))
    requests = [
        engine.submit(PROMPT, SamplingParams(max_tokens=4, seed=seed, **WARM), policy)
        for seed in range(samples)
    ]
    return Counter(tuple(row.emitted[:3]) for row in drain(engine, requests))


def chi_square(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Standard deviations above the expectation; sequences expected fewer than 5 times as one."""
    samples = sum(counts.values())
    pairs = [(samples * chance, counts[tokens]) for tokens, chance in chances.items()]
    rare = [pair for pair in pairs if pair[0] < 5]
    cells = [pair for pair in pairs if pair[0] >= 5]
    if sum(expected for expected, _ in rare) >= 5:
        cells.append((sum(e for e, _ in rare), sum(c for _, c in rare)))
    square = sum((count - expected) ** 2 / expected for expected, count in cells)
    freedom = len(cells) - 1
    assert freedom >= 10
    return float((square - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize(
    ("schedule", "samples"),
    [
        (LOCKSTEP, 3000),
        (Schedule(holds=(1,), rows=8, patience=2), 1000),
        (Schedule(together=True, rows=8, patience=3), 1000),
    ],
)
def test_verified_samples_follow_full_depths_distribution(
    model: Any, schedule: Schedule, samples: int
) -> None:
    counts, chances = sampled(model, schedule, samples), exact_chances(model)
    assert all(chances[tokens] > 0 for tokens in counts)
    assert chi_square(counts, chances) < 4


def test_unverified_samples_follow_another_distribution(model: Any) -> None:
    """Negative control."""
    counts = sampled(model, LOCKSTEP, 800, kv_mode="project")
    assert chi_square(counts, exact_chances(model)) > 15


@pytest.mark.parametrize("options", [{"temperature": 0.7}, WARM | {"frequency_penalty": 0.5}])
def test_the_same_seed_draws_full_depths_own_tokens(options: dict[str, Any]) -> None:
    engine = AdaptiveEngine(make_model("llama"), slots=3)

    def tokens_of(policy: Policy) -> list[list[int]]:
        prompts = [[seed, 5, 9] for seed in range(6)]
        requests = [
            engine.submit(
                prompt,
                SamplingParams(max_tokens=20, seed=seed, **options | {"ignore_eos": True}),
                policy,
                kv_mode="verify",
            )
            for seed, prompt in enumerate(prompts)
        ]
        return [row.emitted for row in drain(engine, requests)]

    assert tokens_of(RandomExit(0.7, exits=(1, 2))) == tokens_of(NeverExit())
    assert tokens_of(TrustedDraft(2, (0.0, 1.0), 0.5)) == tokens_of(NeverExit())


class TwiceSeen:
    """Drafts twice at an exit, reads whole logits there, and keeps what it saw."""

    exits = (2,)
    schema = SOFTMAX_V2
    candidates_VK = None

    def __init__(self) -> None:
        self.top1: list[float] = []

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        pending_N = outlook_NC[:, OUTLOOK_V1.index("pending")]
        return (pending_N * MAX_PENDING > 1.5).astype(np.int64)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        self.top1 += features_NF[:, 0].tolist()
        return np.full(len(features_NF), here)


def test_drafters_see_how_sure_the_draw_is_and_draft_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise, what tells a right draft is the lead of the draw, not that of the likeliest."""
    engine = AdaptiveEngine(make_model("llama"), slots=1)
    scored: list[tuple[float, int]] = []
    scores = Sampler.draw_scores

    def kept(self: Sampler, logits_V: torch.Tensor, emitted: Sequence[int]) -> torch.Tensor:
        scores_V = scores(self, logits_V, emitted)
        scored.append((float(scores_V.softmax(-1).max()), int(scores_V.argmax())))
        return scores_V

    monkeypatch.setattr(Sampler, "draw_scores", kept)
    monkeypatch.setattr(Sampler, "draft", None)  # what the probe has drawn is not drawn again
    policy = TwiceSeen()
    asked = SamplingParams(max_tokens=16, temperature=2.0, seed=3, ignore_eos=True)
    [row] = drain(engine, [engine.submit([5, 9], asked, policy, kv_mode="verify")])
    assert row.drafts_made > 4
    assert policy.top1 == pytest.approx([top1 for top1, _ in scored], abs=1e-5)
