"""Requests by the official openai client, and what came back token by token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

STATS = {"offramp": {"stats": True}}
"""Opts in to exit depth and policy generation per token."""

WARM_TOKENS = 4
"""Tokens each stream has received before the policy is swapped under it."""


@dataclass(slots=True)
class StreamRecord:
    """One streamed completion as its client saw it.

    Attributes:
        prompt: What was sent.
        texts, exit_layers, generations: One entry per token.
        arrivals_s: When each token arrived, on the monotonic clock.
        finish_reason: Reason that the server gave; None if the stream ended without one.
        reported_tokens: Completion tokens of the usage chunk; None if it never came.
        error: What went wrong; "" if nothing.
    """

    prompt: str
    texts: list[str] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    reported_tokens: int | None = None
    error: str = ""

    @property
    def failed(self) -> bool:
        """Whether an error reached the client."""
        return bool(self.error)

    @property
    def torn(self) -> bool:
        """Whether the stream changed its policy midway, or came back incomplete."""
        whole = self.finish_reason is not None and self.reported_tokens == len(self.texts)
        return not self.failed and (len(set(self.generations)) != 1 or not whole)

    def tokens_around(self, moment_s: float) -> tuple[int, int]:
        """How many tokens arrived before a moment of the monotonic clock, and how many after."""
        before = sum(arrival < moment_s for arrival in self.arrivals_s)
        return before, len(self.arrivals_s) - before

    @property
    def decode_s(self) -> float:
        """Seconds from the first token to the last."""
        return self.arrivals_s[-1] - self.arrivals_s[0] if len(self.arrivals_s) > 1 else 0.0


class Traffic:
    """A client of one pool.

    Args:
        url: The pool's base URL.
        model: Name of the model.
        new_tokens: Tokens asked for per request.
        api_key: Presented to the pool; None sends a placeholder.
    """

    def __init__(self, url: str, model: str, new_tokens: int, api_key: str | None) -> None:
        self.url = url
        self.model = model
        self.new_tokens = new_tokens
        self.api_key = api_key or "none"

    def one_by_one(self, prompts: Sequence[str]) -> list[StreamRecord]:
        """Stream prompts one after the other."""

        async def run() -> list[StreamRecord]:
            async with self._client() as client:
                return [await self._stream(client, StreamRecord(prompt)) for prompt in prompts]

        return asyncio.run(run())

    def across_a_swap(
        self, prompts: Sequence[str], swap: Callable[[], Any], tokens: int
    ) -> tuple[list[StreamRecord], list[StreamRecord]]:
        """Start streams, swap the policy under them, start as many again before the first end.

        Args:
            prompts: One stream each, before and after the swap.
            swap: Publishes and returns once every worker has acknowledged.
            tokens: Tokens per stream.

        Returns:
            Streams that were in flight during the swap; streams begun after it.
        """

        async def run() -> tuple[list[StreamRecord], list[StreamRecord]]:
            async with self._client() as client:
                early = [StreamRecord(prompt) for prompt in prompts]
                warm = [asyncio.Event() for _ in prompts]
                running = [
                    asyncio.create_task(self._stream(client, record, tokens, event))
                    for record, event in zip(early, warm, strict=True)
                ]
                await asyncio.gather(*(event.wait() for event in warm))
                await asyncio.to_thread(swap)
                late = [StreamRecord(prompt) for prompt in prompts]
                await asyncio.gather(*(self._stream(client, record, tokens) for record in late))
                await asyncio.gather(*running)
                return early, late

        return asyncio.run(run())

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=120
        )

    async def _stream(
        self,
        client: openai.AsyncOpenAI,
        record: StreamRecord,
        tokens: int | None = None,
        warm: asyncio.Event | None = None,
    ) -> StreamRecord:
        try:
            stream = await client.completions.create(
                model=self.model,
                prompt=record.prompt,
                max_tokens=tokens or self.new_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=STATS,
            )
            async for chunk in stream:
                _note(record, chunk)
                if warm is not None and len(record.texts) >= WARM_TOKENS:
                    warm.set()
        except openai.OpenAIError as error:
            record.error = f"{type(error).__name__}: {error}"
        finally:
            # A stream that ended early must not leave the swap waiting for it.
            if warm is not None:
                warm.set()
        return record


def _note(record: StreamRecord, chunk: Any) -> None:
    if chunk.usage is not None:
        record.reported_tokens = chunk.usage.completion_tokens
    for choice in chunk.choices:
        record.texts.append(choice.text)
        record.arrivals_s.append(time.monotonic())
        record.exit_layers.append(chunk.offramp["exit_layer"])
        record.generations.append(chunk.offramp["generation"])
        record.finish_reason = choice.finish_reason or record.finish_reason


def tokens_per_s(records: Sequence[StreamRecord]) -> float:
    """Decoded tokens per second that the clients saw, first tokens left out."""
    tokens = sum(len(record.texts) - 1 for record in records)
    seconds = sum(record.decode_s for record in records)
    return tokens / seconds if seconds > 0 else 0.0
