"""Prompts on their way to token ids: what is refused before that, and who does not wait for it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from offramp.controller.errors import OverloadedError, RequestError
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.encoding import PromptEncoder
from offramp.worker.engine.service import EngineService
from support.models import make_model
from support.tokenizers import byte_level_tokenizer

CONTEXT = 256
PATIENCE_S = 60.0


class SlowTokenizer:
    """Takes as long for a string as it is told, on whichever thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()
        self.encoded: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str) -> list[int]:
        self.encoded.append(len(text))
        self.begun.set()
        assert self.may_end.wait(PATIENCE_S)
        return list(self._tokenizer.encode(text))


@pytest.fixture
def tokenizer() -> SlowTokenizer:
    return SlowTokenizer(byte_level_tokenizer())


@pytest.fixture
def engine(tokenizer: SlowTokenizer) -> AdaptiveEngine:
    model = make_model("llama", vocab_size=257, max_position_embeddings=CONTEXT)
    return AdaptiveEngine(model, tokenizer, slots=2)


@pytest.mark.parametrize("letter", ["a", "é", "🦩"])
def test_a_string_beyond_all_tokens_of_the_context_is_not_encoded(
    engine: AdaptiveEngine, tokenizer: SlowTokenizer, letter: str
) -> None:
    most = engine.encoder.most_bytes
    assert most >= CONTEXT
    text = letter * (most // len(letter.encode()) + 1)
    with pytest.raises(RequestError, match=r"^prompt: has \d+ bytes or more.* Shorten it\.$"):
        engine.generate([text])
    assert tokenizer.encoded == []
    with pytest.raises(RequestError, match=rf"^prompt: has .* tokens, .*{CONTEXT}"):
        engine.generate(["a" * CONTEXT])
    assert tokenizer.encoded == [CONTEXT]
    assert engine.load == (0, 0)


def test_a_list_beyond_the_context_is_not_looked_at() -> None:
    class Untouched(list[int]):
        def __iter__(self) -> Any:
            raise AssertionError("was looked at")

    with pytest.raises(RequestError, match="has 1000000 tokens"):
        PromptEncoder(None, CONTEXT).encode(Untouched([1]) * 1_000_000)


def test_what_is_no_prompt_is_not_repeated_at_length() -> None:
    for wrong in ([1.5] * 200, ["a" * 1000], object()):
        with pytest.raises(RequestError, match="neither text nor") as refused:
            PromptEncoder(None, CONTEXT).encode(wrong)  # type: ignore[arg-type]
        assert len(str(refused.value)) < 200


def test_a_prompt_is_encoded_once_for_all_its_completions(
    engine: AdaptiveEngine, tokenizer: SlowTokenizer
) -> None:
    assert len(engine.generate(["abc"], SamplingParams(max_tokens=2, n=4))) == 4
    assert tokenizer.encoded == [3]


def test_nobody_waits_for_a_prompt_that_is_being_encoded(
    engine: AdaptiveEngine, tokenizer: SlowTokenizer
) -> None:
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    expected = engine.generate([[97]], sampling)[0].token_ids
    service = EngineService(engine, max_waiting=0)
    service.start()

    async def scenario() -> list[int]:
        tokenizer.may_end.clear()
        slow = asyncio.create_task(service.submit("abc", SamplingParams(max_tokens=3, n=1)))
        while not tokenizer.begun.is_set():
            await asyncio.sleep(0.001)
        _, events = await service.submit([97], sampling)
        seen = [event.token async for event in events]  # to its end, with the other not begun
        assert not slow.done()
        tokenizer.may_end.set()
        _, events = await slow
        assert len([event async for event in events]) == 3
        return seen

    try:
        assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S)) == expected
    finally:
        service.stop()


def test_a_full_line_encodes_nothing(engine: AdaptiveEngine, tokenizer: SlowTokenizer) -> None:
    for _ in range(2):
        engine.submit([97], SamplingParams(max_tokens=100))
    service = EngineService(engine, max_waiting=0)  # not started: the line stays as it is
    with pytest.raises(OverloadedError):
        asyncio.run(service.submit("abc", SamplingParams()))
    assert tokenizer.encoded == []


def test_a_caller_cancelled_while_its_prompt_is_encoded_queues_nothing(
    engine: AdaptiveEngine, tokenizer: SlowTokenizer
) -> None:
    service = EngineService(engine)
    service.start()

    async def scenario() -> None:
        tokenizer.may_end.clear()
        caller = asyncio.create_task(service.submit("abc", SamplingParams(max_tokens=100)))
        while not tokenizer.begun.is_set():
            await asyncio.sleep(0.001)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        tokenizer.may_end.set()
        with pytest.raises(RequestError):  # commands are taken in order
            await service.submit([], SamplingParams())
        assert engine.load == (0, 0)

    try:
        asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S))
    finally:
        service.stop()
