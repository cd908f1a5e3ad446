"""Lines of a pool's processes: what they look like, and how they get to where they are shown."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest

from offramp.deploy.http.observability.access_log import AccessLog
from offramp.deploy.serve.log_lines import LineFormatter, WaitingLines, send_lines, show_line


@pytest.fixture
def loggers() -> Iterator[None]:
    root = logging.getLogger()
    before = list(root.handlers), logging.getLogger("offramp").level
    yield
    root.handlers[:] = before[0]
    logging.getLogger("offramp").setLevel(before[1])


def answer(name: str, path: str = "/v1/completions", status: int = 500) -> None:
    """One request through the access log, and an error that is logged meanwhile if it fails."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if status == 500:
            try:
                raise ValueError("of the engine")
            except ValueError:
                logging.getLogger("offramp.worker").exception("it failed")
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def send(message: Any) -> None:
        await asyncio.sleep(0)

    headers = [(b"x-request-id", name.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(AccessLog(app, file=None)(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]


def test_every_line_is_an_object_that_names_its_request(loggers: None) -> None:
    lines = WaitingLines()
    send_lines("json", "front", lines.add)
    answer("mine")
    answer("probe's", "/health", 200)
    logging.getLogger("offramp.other").info("nobody's\nrequest")
    logging.getLogger("ray").error("its own business")
    failed, answered, other = map(json.loads, asyncio.run(lines.fetch()))
    assert failed["level"] == "error"
    assert failed["request_id"] == answered["request_id"] == "mine"
    assert "ValueError: of the engine" in failed["error"]
    assert {answered[name] for name in ("method", "status", "process")} == {"POST", 500, "front"}
    assert "request_id" not in other
    assert other["message"] == "nobody's\nrequest"


def test_in_plain_words_a_request_is_named_too(loggers: None) -> None:
    lines = WaitingLines()
    send_lines("text", "worker-0", lines.add)
    answer("mine")
    failed, answered = asyncio.run(lines.fetch())
    assert "ERROR worker-0 offramp.worker: it failed request_id=mine" in failed
    assert "status=500" in answered
    assert "\n" not in answered


def test_nobody_is_sent_lines_unless_a_format_is_told(loggers: None) -> None:
    lines = WaitingLines()
    send_lines(None, "front", lines.add)
    answer("mine")
    asyncio.run(lines.emptied(0.0))
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(lines.fetch(), 0.05))


def test_a_record_without_more_is_a_line(loggers: None) -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s left", ("x",), None)
    assert LineFormatter("text", "command").format(record).endswith("INFO command a: x left")


def test_whoever_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.deploy.serve.log_lines.UNREAD_S", 0.0)
    there, here = os.pipe()
    try:
        for _ in range(40):
            show_line("x" * 4000, here)
        kept = os.read(there, 2**20)
        assert 0 < len(kept) < 40 * 4001
        show_line("heard again", here)
        assert os.read(there, 99) == b"heard again\n"
    finally:
        os.close(there)
        os.close(here)
