"""Spans of requests, as a collector receives them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from offramp.controller.errors import ConfigError
from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.observability import tracing
from offramp.deploy.http.observability.tracing import SPAN, Spans
from offramp.worker.engine.service import EngineService

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-request-id": "mine"}
BODY = {"model": "reference", "prompt": [11, 12], "max_tokens": 9, "n": 2, "ignore_eos": True}


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its URL, and the spans that it was sent."""
    spans: list[Any] = []

    class TraceReceiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), TraceReceiver) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()


def test_a_request_is_a_span_that_tells_what_its_exits_did(
    stand_in: Any, service: EngineService, ask: Callable[..., Any], collector: tuple[str, list[Any]]
) -> None:
    url, received = collector
    spans = Spans.to(url)
    app = create_app(stand_in(service), spans=spans)

    async def call(client: httpx.AsyncClient) -> None:
        lossless = BODY | {"offramp": {"quality": "lossless"}}
        whole = await client.post("/v1/completions", json=lossless, headers=HEADERS)
        assert whole.status_code == 200, whole.text
        streamed = await client.post("/v1/completions", json=BODY | {"n": 1, "stream": True})
        assert streamed.status_code == 200

    ask(app, call)
    spans.close()
    whole, streamed = sorted(received, key=lambda span: span.start_time_unix_nano)
    assert whole.name == streamed.name == SPAN
    assert whole.trace_id.hex() == TRACE
    assert streamed.trace_id.hex() != TRACE
    told = {each.key: each.value for each in whole.attributes}
    assert told["gen_ai.request.id"].string_value == "mine"
    assert told["gen_ai.usage.input_tokens"].int_value == 4
    assert told["gen_ai.usage.output_tokens"].int_value == 18
    assert [each.string_value for each in told["gen_ai.response.finish_reasons"].array_value.values]
    assert told["offramp.drafts"].int_value > 0
    assert 6 <= told["offramp.mean_exit_layer"].double_value < 12
    first_s = told["gen_ai.latency.time_to_first_token"].double_value
    assert 0 < first_s < (whole.end_time_unix_nano - whole.start_time_unix_nano) / 1e9


def test_without_the_exporter_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_EXPORTER", "no_such_package.exporter")
    with pytest.raises(ConfigError, match="OFFRAMP_OTLP_ENDPOINT: needs "):
        Spans.to("http://127.0.0.1:4318/v1/traces")
