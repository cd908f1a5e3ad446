"""A real pool that grows while there is much to do, and shrinks after, under streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.pools.served_pool import Outcome, ServedPool, body, follow, run

CROWD, FEW, TOKENS = 10, 2, 200
"""Streams that are too many for one worker, those that are not, and their tokens."""

TARGET = FEW * TOKENS + 50
"""Tokens per worker: few streams come to less, and a crowd to four times as many."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    options = {
        **{"--replicas": 1, "--max-replicas": 2, "--slots": CROWD},
        **{"--target-requests": 1000, "--target-tokens": TARGET},
        **{"--grow-after": 1, "--shrink-after": 2},
    }
    with ServedPool(tmp_path_factory.mktemp("pool") / "home", options) as pool:
        yield pool


async def workers(client: httpx.AsyncClient) -> dict[str, float]:
    """Tokens under way of each worker that is counted on."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    samples = {each.name: each.samples for each in families}["offramp_tokens_under_way"]
    return {each.labels["worker"]: each.value for each in samples}


@pytest.mark.e2e
@pytest.mark.timeout(1500)
def test_it_grows_by_tokens_and_shrinks_and_no_stream_is_the_worse(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        outcomes: list[Outcome] = []
        wanted = CROWD

        async def ask_on(number: int) -> None:
            while number < wanted:
                outcomes.append(Outcome())
                await follow(client, outcomes[-1], body(TOKENS))

        assert len(await workers(client)) == 1
        asking = [asyncio.create_task(ask_on(number)) for number in range(CROWD)]
        while sum(each > 0 for each in (await workers(client)).values()) < 2:
            await asyncio.sleep(0.1)
        wanted = FEW  # which go on while the pool shrinks
        while len(pool.workers()) > 1:
            await asyncio.sleep(0.1)
        wanted = 0
        await asyncio.gather(*asking)
        return outcomes

    outcomes = run(pool, scenario, within_s=900)
    assert len(outcomes) > CROWD
    assert all(each.is_whole and each.status == 200 for each in outcomes), outcomes
