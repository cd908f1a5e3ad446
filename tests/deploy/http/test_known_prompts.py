"""What clients are told of prompts whose beginning was known, and with whom they share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from offramp.deploy.clients.client_keys import ClientKeys, add_client
from offramp.deploy.http.http_app import create_app
from offramp.worker import AdaptiveEngine, EngineConfig
from offramp.worker.engine.service import EngineService
from support.models import REFERENCE

PROMPT = list(range(100, 140))
KNOWN = 32
"""Of its 40 tokens, in chunks of 16."""


def test_each_client_and_each_salt_has_its_own(stand_in: Any, ask: Any, tmp_path: Path) -> None:
    config = EngineConfig(prefill_tokens=16, prefix_cache_mib=8)
    service = EngineService(AdaptiveEngine.from_pretrained(REFERENCE, slots=2, config=config))
    backend = stand_in(service)
    keys = [add_client(tmp_path / "clients.json", name) for name in ("one", "two")]
    backend.clients = ClientKeys(tmp_path / "clients.json")
    service.start()

    async def call(client: httpx.AsyncClient) -> tuple[list[int], str]:
        async def send(key: str, **more: Any) -> httpx.Response:
            asked = {"model": "reference", "prompt": PROMPT, "max_tokens": 2, **more}
            headers = {"Authorization": f"Bearer {key}"}
            return await client.post("/v1/completions", json=asked, headers=headers)

        refused = await send(keys[0], cache_salt="")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "cache_salt")
        found = []
        for key, more in (
            (keys[0], {}),
            (keys[0], {"temperature": 0}),
            (keys[1], {}),
            (keys[0], {"cache_salt": "s"}),
            (keys[0], {"cache_salt": "s", "n": 2}),
            (keys[0], {"prompt": [PROMPT, PROMPT], "n": 2}),
            (keys[0], {"echo": True, "logprobs": 0}),
        ):
            usage = (await send(key, **more)).json()["usage"]
            found.append(usage["prompt_tokens_details"]["cached_tokens"])
        headers = {"Authorization": f"Bearer {keys[0]}"}
        return found, (await client.get("/metrics", headers=headers)).text

    try:
        found, text = ask(create_app(backend), call)
    finally:
        service.stop()
    assert found == [0, KNOWN, 0, 0, KNOWN, 2 * KNOWN, 0]
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    completions = 10  # those of all but the last, which looked nothing up
    assert values["offramp_prefix_cache_queries_total"] == completions * len(PROMPT)
    assert values["offramp_prefix_cache_hits_total"] == 7 * KNOWN


@pytest.mark.parametrize("given", [None, "any text"])
def test_a_salt_is_taken_where_nothing_is_kept(app: Any, ask: Any, given: str | None) -> None:
    async def call(client: httpx.AsyncClient) -> httpx.Response:
        asked = {"model": "reference", "prompt": PROMPT, "max_tokens": 2, "cache_salt": given}
        return await client.post("/v1/completions", json=asked)

    assert ask(app, call).json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
