"""Log-probabilities of a prompt's own tokens: those of one whole forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import TokenEvent
from offramp.worker.engine.engine_config import EngineConfig
from support.models import VOCAB, make_model

PROMPT = [(7 * n * n + 3 * n + 5) % VOCAB for n in range(50)]


def events_of(model: Any, prefill_tokens: int, **asked: Any) -> list[TokenEvent]:
    config = EngineConfig(prefill_tokens=prefill_tokens)
    engine = AdaptiveEngine(model, slots=2, config=config)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, **asked)
    return list(engine.stream(PROMPT, sampling, FixedExit(2)))


@pytest.mark.parametrize("prefill_tokens", [256, 33, 1])
def test_they_are_those_of_one_forward_pass(prefill_tokens: int) -> None:
    model = make_model("llama")
    with torch.inference_mode():
        logits_TV = model(torch.tensor([PROMPT])).logits[0]
    logprobs_TV = logits_TV.float().log_softmax(-1)[:-1]
    first, *others = events_of(model, prefill_tokens, prompt_logprobs=3)
    assert all(event.prompt_draws == () for event in others)
    assert [draw.token for draw in first.prompt_draws] == PROMPT[1:]
    chosen_T = logprobs_TV.gather(-1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    found = torch.tensor([draw.logprob for draw in first.prompt_draws])
    torch.testing.assert_close(found, chosen_T, rtol=0, atol=1e-4)
    best = logprobs_TV.topk(3).values
    tops = torch.tensor([[value for _, value in draw.top] for draw in first.prompt_draws])
    torch.testing.assert_close(tops, best, rtol=0, atol=1e-4)


def test_the_tokens_stay_what_they_are() -> None:
    model = make_model("llama")
    asked = [event.token for event in events_of(model, 256, prompt_logprobs=0)]
    unasked = events_of(model, 256)
    assert [event.token for event in unasked] == asked
    assert unasked[0].prompt_draws == ()


def test_a_prompt_of_one_token_has_none() -> None:
    engine = AdaptiveEngine(make_model("llama"))
    [event] = engine.stream([5], SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert event.prompt_draws == ()
