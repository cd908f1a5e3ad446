"""Clients that take their time over a real socket are cut off, and the others are not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from offramp.deploy.http.http_app import create_app
from offramp.deploy.http.limits import HttpLimits
from offramp.deploy.http.patience import LimitedConfig, PatientProtocol
from offramp.deploy.http.reply import WRITE
from offramp.worker.engine.service import EngineService

LIMITS = HttpLimits(
    body_bytes=100_000, header_s=0.5, body_s=0.5, idle_s=1, write_s=0.5, deadline_s=20
)
PATIENCE_S = 30.0
BODY = json.dumps({"model": "reference", "prompt": [11, 12], "max_tokens": 3})


@pytest.fixture(scope="module")
def port(service: EngineService, stand_in: type) -> Iterator[int]:
    with served(create_app(stand_in(service), LIMITS), LIMITS) as port:
        yield port


@contextmanager
def served(app: ASGIApp, limits: HttpLimits) -> Iterator[int]:
    config = LimitedConfig(
        app, port=0, http=PatientProtocol, ws="none", lifespan="off", log_config=None
    )
    config.limits = limits
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    listening = server.servers[0].sockets[0]
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()


def heard(port: int, said: bytes) -> bytes:
    """All that the server says to a client that says something and then nothing."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(said)
        parts = []
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def request(body: str, *, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n"
    return f"{head}content-type: application/json\r\n\r\n{body}".encode()


@pytest.mark.parametrize("said", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_slow_headers(port: int, said: bytes) -> None:
    status, _, rest = heard(port, said).partition(b"\r\n")
    assert status == b"HTTP/1.1 408 Request Timeout"
    error = json.loads(rest.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_slow_body(port: int) -> None:
    assert heard(port, request(BODY[:-4], length=len(BODY))).startswith(b"HTTP/1.1 408 ")


def test_what_is_no_http_is_told_in_json(port: int) -> None:
    status, _, rest = heard(port, b"\x16\x03\x01 hello\r\n\r\n").partition(b"\r\n")
    assert status == b"HTTP/1.1 400 Bad Request"
    assert "error" in json.loads(rest.partition(b"\r\n\r\n")[2])


def test_a_request_in_time_is_answered_and_its_connection_closed_when_idle(port: int) -> None:
    said = heard(port, request(BODY))
    assert said.startswith(b"HTTP/1.1 200 ")
    assert said.count(b"HTTP/1.1 ") == 1, "an idle connection is closed, not told that it was late"


def test_a_body_that_is_too_large_is_refused_whether_its_length_is_told_or_not(port: int) -> None:
    large = b"[" * 4_000_000
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        for content in (large, iter([large[:1_000_000]] * 4)):
            told = client.post("/v1/completions", content=content)
            assert told.status_code == 413
            assert told.json()["error"]["code"] == "request_entity_too_large"


def test_a_client_that_does_not_read_loses_its_slot(port: int, service: EngineService) -> None:
    asked = {"model": "reference", "prompt": [11, 12], "max_tokens": 1000, "ignore_eos": True}
    body = json.dumps({**asked, "stream": True, "logprobs": 5, "echo": True, "n": 2})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        before = service.tokens_emitted
        client.sendall(request(body))
        end = time.monotonic() + PATIENCE_S
        while service.tokens_emitted == before or service.engine.load != (0, 0):
            assert time.monotonic() < end
            time.sleep(0.01)
        assert service.tokens_emitted - before < 2000


def test_a_deadline_ends_a_stream_with_an_error(service: EngineService, stand_in: type) -> None:
    app = create_app(stand_in(service), HttpLimits(deadline_s=0.3))
    asked = {"model": "reference", "prompt": [11, 12], "max_tokens": 1000, "ignore_eos": True}

    async def scenario() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            whole = await client.post("/v1/completions", json=asked)
            assert whole.status_code == 504
            assert whole.json()["error"]["code"] == "deadline"
            stream = await client.post("/v1/completions", json={**asked, "stream": True})
            *_, error, done, _ = stream.text.split("\n\n")
            assert "deadline" in json.loads(error.removeprefix("data: "))["error"]["message"]
            assert done == "data: [DONE]"

    asyncio.run(scenario())


def test_what_is_written_at_once_is_so_only_within_a_reply_and_to_a_client_that_reads() -> None:
    made: list[bytes] = []
    refused: list[int] = []

    def part() -> bytes:
        made.append(f"{len(made):06}".encode() * 5000)
        return made[-1]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        write: Callable[[Callable[[], bytes]], bool] = scope["extensions"][WRITE]
        refused.extend([len(made)] * (not write(part)))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while write(part):
            pass
        refused.append(len(made))
        await send({"type": "http.response.body", "body": part(), "more_body": True})
        write(part)
        await send({"type": "http.response.body", "body": b"end"})
        refused.extend([len(made)] * (not write(part)))

    with served(app, HttpLimits()) as port:
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(timeout=PATIENCE_S) as client, client.stream("GET", address) as reply:
            time.sleep(0.3)  # in which all that lies between is filled
            found = reply.read()
    before, paused, after = refused
    assert before == 0 < paused < after == len(made)
    assert found == b"".join(made) + b"end"
