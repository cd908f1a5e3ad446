"""What /metrics says after requests whose tokens are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from offramp.deploy.http.observability.metrics import Metrics
from offramp.deploy.http.observability.worker_metrics import REPORTED
from offramp.deploy.http.served_models import ServedModels

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    given = {"model_name": "reference", **labels}
    return samples["offramp_" + name, frozenset(given.items())]


def after(app: FastAPI, ask: Any, *bodies: dict[str, Any]) -> Samples:
    """The metrics after completions."""

    async def call(client: httpx.AsyncClient) -> str:
        for body in bodies:
            asked = {"model": "reference", "prompt": [11, 12, 13], "ignore_eos": True, **body}
            reply = await client.post("/v1/completions", json={"temperature": 0, **asked})
            assert reply.status_code == 200
        reply = await client.get("/metrics")
        assert reply.headers["content-type"].startswith("text/plain; version=")
        return reply.text

    return parse(ask(app, call))


def test_each_token_and_each_end_is_counted(app: FastAPI, ask: Any) -> None:
    asked = {"max_tokens": 5, "n": 2}
    samples = after(app, ask, asked, {"max_tokens": 4, "stream": True})
    assert value(samples, "generation_tokens_total") == 2 * 5 + 4
    assert value(samples, "prompt_tokens_total") == 3 * 3
    assert value(samples, "request_success_total", finished_reason="length") == 3
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert value(samples, f"{name}_seconds_count") == 3
    assert value(samples, "inter_token_latency_seconds_count") == 2 * 4 + 3


def test_exits_are_a_histogram_and_the_layers_they_save_are_told(app: FastAPI, ask: Any) -> None:
    # The policy leaves after layer 6 of 12; a prompt's last token runs them all.
    samples = after(app, ask, {"max_tokens": 9, "offramp": {"kv_mode": "project"}})
    assert value(samples, "exit_layer_bucket", le="5.0") == 0
    assert value(samples, "exit_layer_bucket", le="6.0") == 8
    assert value(samples, "exit_layer_bucket", le="12.0") == 9
    assert value(samples, "layers_executed_total") == 8 * 6
    assert value(samples, "layers_full_depth_total") == 8 * 12


def test_drafts_and_those_confirmed_are_counted(app: FastAPI, ask: Any) -> None:
    samples = after(app, ask, {"max_tokens": 20, "offramp": {"kv_mode": "verify"}})
    drafted = value(samples, "spec_decode_num_draft_tokens_total")
    assert drafted >= value(samples, "spec_decode_num_accepted_tokens_total") > 0


def test_what_workers_report_is_told_by_worker(app: FastAPI, ask: Any) -> None:
    samples = after(app, ask)
    assert value(samples, "policy_generation", worker="worker-0") == 7
    assert value(samples, "num_requests_running", worker="worker-0") == 0
    assert value(samples, "guardrail_trips_total", worker="worker-0") == 0
    says = {"worker": "worker-0", "digest": "d" * 64, "guarantee": "uncertified", "state": "ACK"}
    assert value(samples, "policy_info", **says) == 1


def test_energy_is_told_by_method_and_is_absent_where_it_is_unknown(app: FastAPI, ask: Any) -> None:
    assert not [name for name, _ in after(app, ask) if name.startswith("offramp_energy")]
    read = [("modelled", "3 W per busy core", 2.5, 10), ("measured_device", "NVML", 30.0, 40)]
    report = {"worker": "w", **dict.fromkeys([*(field for field, _ in REPORTED.values())], 0)}
    says = {"tasks": 0, "digest": "", "guarantee": "", "state": "", "energy": read}
    pool: Any = SimpleNamespace(
        model_id="reference", layers=12, clients=None, reports=lambda: [report | says]
    )
    samples = parse(Metrics(ServedModels([pool])).text().decode())
    for method, source, joules, tokens in read:
        labels = {"worker": "w", "method": method, "source": source}
        assert value(samples, "energy_joules_total", **labels) == joules
        assert value(samples, "energy_tokens_total", **labels) == tokens


def test_tasks_of_the_event_loop_are_told_and_do_not_pile_up(app: FastAPI, ask: Any) -> None:
    async def call(client: httpx.AsyncClient) -> list[float]:
        found = []
        for _ in range(2):
            told = parse((await client.get("/metrics")).text)
            found.append(value(told, "asyncio_tasks", process="front"))
            asked = {"model": "reference", "prompt": [11, 12], "max_tokens": 3, "stream": True}
            await client.post("/v1/completions", json=asked)
        return found

    before, after_one = ask(app, call)
    assert 0 < after_one <= before


def test_every_reply_is_counted_refusals_included(app: FastAPI, ask: Any) -> None:
    async def call(client: httpx.AsyncClient) -> str:
        await client.get("/v1/nothing")
        await client.post("/v1/completions", json={"model": "another", "prompt": "x"})
        await client.get("/version")
        return (await client.get("/metrics")).text

    samples = parse(ask(app, call))
    assert value(samples, "http_requests_total", status="404") == 2
    assert value(samples, "http_requests_total", status="200") == 1
