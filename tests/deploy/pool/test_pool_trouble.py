"""A real pool in trouble: too much work, bad clients, lost workers, and the order to stop.

One pool for all tests of this file, in this order: the last one stops it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from offramp.deploy.http.observability.worker_metrics import REPORTED, TRAFFIC
from offramp.deploy.serve.serve_app import FEW_ARENAS
from support.pools.served_pool import (
    CAPACITY,
    PATIENCE_S,
    SLACK,
    STREAMS,
    Outcome,
    ServedPool,
    body,
    follow,
    ready,
    run,
    streams,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPool]:
    with ServedPool(tmp_path_factory.mktemp("pool") / "home") as pool:
        yield pool


def test_the_official_client_works_unchanged(pool: ServedPool) -> None:
    with openai.OpenAI(base_url=f"{pool.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "reference", "max_tokens": 5, "temperature": 0}
        both = client.completions.create(prompt=["import os", "def "], **asked)
        assert [choice.index for choice in both.choices] == [0, 1]
        stream = client.completions.create(prompt="def ", stream=True, **asked)
        assert "".join(each.choices[0].text for each in stream) == both.choices[1].text
        with pytest.raises(openai.BadRequestError, match="chat template"):
            client.chat.completions.create(
                model="reference", messages=[{"role": "user", "content": "hello"}]
            )


def test_prometheus_sees_every_token_and_every_worker(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[str]:
        await ready(client)
        texts = [(await client.get("/metrics")).text]
        # Not ``streams``: one so short may end before another has begun.
        await asyncio.gather(*(follow(client, Outcome(), body(20)) for _ in range(2)))
        asked = body(20, stream=False, offramp={"stats": True})
        energy = (await client.post("/v1/completions", json=asked)).json()["offramp"]["energy"]
        assert energy["joules"] > 0
        assert energy["method"] in ("modelled", "attributed")  # by what the machine has
        return [*texts, (await client.get("/metrics")).text]

    before, after = (
        {family.name: family.samples for family in text_string_to_metric_families(text)}
        for text in run(pool, scenario)
    )
    made = "offramp_generation_tokens"
    assert after[made][0].value - before[made][0].value == 3 * 20
    for name in REPORTED | TRAFFIC:
        family = after["offramp_" + name.removesuffix("_total")]
        assert len({sample.labels["worker"] for sample in family}) == 2
    assert {sample.labels["guarantee"] for sample in after["offramp_policy_info"]} == {"full depth"}


def turn(number: int, turns: int) -> list[int]:
    """What a client sends as a conversation's next turn."""
    return [100 + number, *range(200, 200 + 40 * turns)]


async def known(client: httpx.AsyncClient, prompt: list[int]) -> int:
    """Tokens of a prompt that the worker knew that it came to."""
    reply = await client.post("/v1/completions", json=body(2, prompt=prompt, stream=False))
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def sent(client: httpx.AsyncClient) -> tuple[Counter[str], Counter[str]]:
    """Prompts of each worker: whose beginning it knew, and those that others were too busy for."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    samples = {each.name: each.samples for each in families}
    kept, moved = (samples[f"offramp_{name}_prompts"] for name in ("kept", "moved"))
    return (
        Counter({each.labels["worker"]: int(each.value) for each in kept}),
        Counter({each.labels["worker"]: int(each.value) for each in moved}),
    )


def test_conversations_stay_with_their_workers_which_have_equally_many(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> tuple[Counter[str], Counter[str]]:
        await ready(client)
        kept, moved = await sent(client)
        _, tasks = await streams(client, 400, [turn(number, 1) for number in range(STREAMS)])
        await asyncio.gather(*tasks)
        for turns, cached in ((2, 32), (4, 64), (5, 128)):
            for number in range(STREAMS):
                assert await known(client, turn(number, turns)) == cached
        now_kept, now_moved = await sent(client)
        return now_kept - kept, now_moved - moved

    kept, moved = run(pool, scenario)
    assert not moved
    assert sum(kept.values()) == 3 * STREAMS
    assert max(kept.values()) - min(kept.values()) <= 3 * SLACK
    assert len(kept) == 2


def test_a_beginning_that_all_prompts_share_makes_no_worker_hot(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> tuple[Counter[str], Counter[str]]:
        await ready(client)
        shared = turn(99, 4)
        assert [await known(client, shared) for _ in range(2)] == [0, 128]
        kept, moved = await sent(client)
        _, tasks = await streams(client, 400, [[*shared, number] for number in range(STREAMS)])
        await asyncio.gather(*tasks)
        now_kept, now_moved = await sent(client)
        return now_kept - kept, now_moved - moved

    kept, moved = run(pool, scenario)
    assert sum(moved.values()) == 1  # after it, both know the beginning
    got = kept + moved
    assert sum(got.values()) == STREAMS
    assert max(got.values()) - min(got.values()) <= SLACK


def test_nothing_listens_where_other_machines_reach_it(pool: ServedPool) -> None:
    open_at = {
        connection.laddr.ip.removeprefix("::ffff:")
        for _, connections in pool.of_each(lambda each: each.net_connections("inet"))
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    }
    assert open_at <= {"127.0.0.1", "::1"}


def test_no_thread_has_a_heap_of_its_own_that_only_grows(pool: ServedPool) -> None:
    name, arenas = FEW_ARENAS
    named = pool.of_each(lambda each: "".join(each.cmdline()))
    fronts = [each for each, words in named if "ray::Front" in words]
    assert len(fronts) == 1
    for each in (*fronts, *pool.workers()):
        assert each.environ().get(name) == os.environ.get(name, arenas)


def test_four_hundred_at_once_are_served_or_told_to_come_back(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        outcomes = [Outcome() for _ in range(400)]
        await asyncio.gather(*(follow(client, each, body(20)) for each in outcomes))
        await ready(client)
        return outcomes

    outcomes = run(pool, scenario)
    served = [each for each in outcomes if each.status == 200]
    assert {each.status for each in outcomes} == {200, 429}
    assert len(served) >= CAPACITY
    assert all(each.is_whole and each.tokens == 20 for each in served)


async def loop_tasks(client: httpx.AsyncClient) -> float:
    """Tasks of the event loops of front and workers."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    samples = {each.name: each.samples for each in families}["offramp_asyncio_tasks"]
    assert len(samples) == 3
    return sum(each.value for each in samples)


def test_a_client_that_hangs_up_frees_its_place(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        await ready(client)
        before = await loop_tasks(client)
        _, tasks = await streams(client, 1000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await ready(client)
        while await loop_tasks(client) > before:  # workers report each second
            await asyncio.sleep(0.1)

    run(pool, scenario)


def test_a_body_that_is_too_large_is_not_read(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        headers = {"content-type": "application/json"}
        told = await client.post("/v1/completions", content=b"[" * 50_000_000, headers=headers)
        assert told.status_code == 413

        async def untold() -> Any:
            for _ in range(10):
                yield b"[" * 2**20

        chunked = await client.post("/v1/completions", content=untold(), headers=headers)
        assert chunked.status_code == 413
        assert set(chunked.json()["error"]) == {"message", "type", "param", "code"}

    run(pool, scenario)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_workers_streams_are_told_and_the_others_go_on(
    pool: ServedPool, number: signal.Signals
) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        await ready(client)
        asked = [turn(20 * number + each, 1) for each in range(STREAMS)]
        assert sum([await known(client, prompt) for prompt in asked]) == 0
        outcomes, tasks = await streams(client, 400)
        lost = pool.workers()[0]  # of so many streams each has some
        lost.send_signal(number)
        # It has died, or is taken for dead, before long; what comes meanwhile goes elsewhere.
        late = Outcome()
        await follow(client, late, body(5))
        assert late.is_whole
        # Conversations of the lost worker begin anew with the other, and stay there.
        found = [await known(client, prompt) for prompt in asked]
        assert set(found) == {0, 32}
        assert {await known(client, prompt) for prompt in asked} == {32}
        await asyncio.gather(*tasks)
        while lost.is_running() and lost.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.1)  # until it is replaced
        await ready(client)
        return outcomes

    outcomes = run(pool, scenario)
    assert all(each.is_whole or each.is_told for each in outcomes), outcomes
    assert any(each.is_told for each in outcomes)
    assert any(each.is_whole for each in outcomes)


def test_a_worker_that_is_told_to_end_ends_its_streams_first(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        await ready(client)
        outcomes, tasks = await streams(client, 400)
        told = pool.workers()[0]
        told.terminate()
        late = Outcome()
        await follow(client, late, body(5))
        assert late.is_whole
        await asyncio.gather(*tasks)
        await asyncio.to_thread(told.wait, PATIENCE_S)
        await ready(client)
        return outcomes

    outcomes = run(pool, scenario)
    assert all(each.is_whole and each.tokens == 400 for each in outcomes), outcomes


def test_the_order_to_stop_lets_streams_end_and_refuses_new_ones(pool: ServedPool) -> None:
    async def scenario(client: httpx.AsyncClient) -> list[Outcome]:
        await ready(client)
        outcomes, tasks = await streams(client, 200)
        pool.process.send_signal(signal.SIGTERM)
        while (await client.get("/ready")).json()["status"] != "draining":
            await asyncio.sleep(0.01)
        pool.process.send_signal(signal.SIGTERM)  # a second one does not interrupt the end
        refused = await client.post("/v1/completions", json=body(5))
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        await asyncio.gather(*tasks)
        return outcomes

    outcomes = run(pool, scenario)
    assert all(each.is_whole and each.tokens == 200 for each in outcomes), outcomes
    assert pool.process.wait(PATIENCE_S) == 0
    assert pool.process.stdout is not None
    assert "Traceback" not in pool.process.stdout.read()
    redis = f"127.0.0.1:{pool.redis_port}"
    assert [p for p in psutil.process_iter(["cmdline"]) if redis in str(p.info["cmdline"])] == []
