"""A release brings adapters into a worker that decodes: real engine, real Redis, streams open."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.controller.adapters.adapter_index import AdapterSource
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import trusted_keys
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.redis_registry import RedisRegistry
from offramp.controller.release.registry import Ack, AckState
from offramp.controller.release.trust import ReleaseVerifier
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.engine.service import EngineService
from offramp.worker.following.fetching import ReleaseFetcher
from offramp.worker.following.refresh import PolicyRefresher
from support.models import make_model, save_adapters

TOKENIZER = "bb"
SAMPLING = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPTS = [[5, 17, 33, 2, 41], [9, 8, 7]]
EXIT = 3


def engine_of(folder: Path | None = None) -> AdaptiveEngine:
    config = EngineConfig(kv_mode="defer", audit_share=0.0, translators=folder)
    return AdaptiveEngine(make_model("llama"), slots=4, config=config)


class Channel:
    """A publisher, and a worker whose engine decodes in its own thread."""

    def __init__(self, registry: RedisRegistry, folder: Path) -> None:
        key = load_or_create_key(folder / "key.pem")
        self.engine = engine_of()
        self.publisher = Publisher(registry, FolderLedger(folder / "ledger"), key, "c")
        verifier = ReleaseVerifier(
            trusted_keys(key.public_bytes), "c", self.engine.model_fingerprint, TOKENIZER
        )
        fetcher = ReleaseFetcher(registry, folder / "w0", take_in=self.engine.take_in)
        self.follower = PolicyRefresher(
            registry, verifier, folder / "w0", "w0", 5.0, self.engine.prepare, fetcher=fetcher
        )
        self.engine.current_policy = lambda: self.follower.current
        self.service = EngineService(self.engine)

    def serve(self, folder: Path) -> int:
        release = self.publisher.release(
            pack_policy(FixedExit(EXIT), np.zeros((2, 3), np.float32)),
            model=self.engine.model_fingerprint,
            tokenizer=TOKENIZER,
            training={},
            metrics={},
            uncertified=True,
            adapters=AdapterSource.open(folder),
        )
        self.publisher.promote(release.generation)
        return release.generation

    async def swap(self, folder: Path) -> Ack:
        """Publish, and poll in another thread, as the refresher's own would."""
        await asyncio.to_thread(self.serve, folder)
        return await asyncio.to_thread(self.follower.poll_once)

    async def ask(self, prompt: list[int], begun: asyncio.Event) -> tuple[list[int], set[int]]:
        """The tokens of a stream, and the generations that it ran under."""
        _, events = await self.service.submit(prompt, SAMPLING)
        seen = []
        async for event in events:
            seen.append(event)
            begun.set()
        return [event.token for event in seen], {event.generation for event in seen}


@pytest.fixture
def channel(redis_registry: RedisRegistry, tmp_path: Path) -> Any:
    made = Channel(redis_registry, tmp_path)
    made.service.start()
    yield made
    made.service.stop()


def test_streams_under_way_keep_their_adapters_and_later_ones_get_the_new(
    channel: Channel, tmp_path: Path
) -> None:
    old, new = (save_adapters("llama", tmp_path / str(n), (EXIT,), seed=n) for n in (3, 4))

    async def run() -> list[tuple[list[int], set[int]]]:
        assert (await channel.swap(old)).state is AckState.ACK
        begun = asyncio.Event()
        early = asyncio.create_task(channel.ask(PROMPTS[0], begun))
        await begun.wait()
        assert (await channel.swap(new)).state is AckState.ACK
        late = asyncio.create_task(channel.ask(PROMPTS[1], begun))
        return list(await asyncio.gather(early, late))

    found = asyncio.run(run())
    expected = [
        engine_of(folder).generate(prompt, SAMPLING, FixedExit(EXIT))[0].token_ids
        for prompt, folder in zip(PROMPTS, (old, new), strict=True)
    ]
    assert [tokens for tokens, _ in found] == expected
    assert [generations for _, generations in found] == [{1}, {2}]
    # A start without Redis, on an engine that was never told of adapters.
    channel.publisher._head.registry.close()
    again = engine_of()
    fetcher = ReleaseFetcher(
        RedisRegistry("redis://127.0.0.1:1", "c"), tmp_path / "w0", take_in=again.take_in
    )
    follower = PolicyRefresher(
        RedisRegistry("redis://127.0.0.1:1", "c"),
        channel.follower._verifier,
        tmp_path / "w0",
        "w0",
        5.0,
        again.prepare,
        fetcher=fetcher,
    )
    [completion] = again.generate(PROMPTS[1], SAMPLING, follower.current)
    assert completion.token_ids == expected[1]
    assert follower.current.generation == 2
