"""What a pool's processes have to say: made a line where it is said, shown where the command runs.

Workers send their lines to the front, and the command fetches all of them there: Ray would keep
them in files of its own, one per process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import select
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from offramp.deploy.http.observability.access_log import REQUEST_NAME

FORMATS = ("text", "json")

MOST_LINES = 10_000
"""Lines that wait for the command; if more come, the oldest are dropped."""

AT_ONCE = 500
"""Lines that it fetches together."""

UNREAD_S = 1.0
"""Longest wait until standard error takes a line."""

_PAUSE_S = 0.1


class LineFormatter(logging.Formatter):
    """Makes a record one line, in plain words or as a JSON object.

    Args:
        shape: "text" or "json".
        process: Names the process: "front", "command" or a worker.
    """

    def __init__(self, shape: str, process: str) -> None:
        super().__init__()
        self._is_json = shape == "json"
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if (request := REQUEST_NAME.get()) is not None:
            fields.setdefault("request_id", request)
        error = self.formatException(record.exc_info) if record.exc_info else None
        if self._is_json:
            about = {
                "at": record.created,
                "level": record.levelname.lower(),
                "process": self._process,
                "logger": record.name,
                "message": record.getMessage(),
            }
            return json.dumps(about | fields | ({"error": error} if error else {}))
        at = datetime.fromtimestamp(record.created, UTC).isoformat(" ", "milliseconds")
        told = " ".join(f"{name}={value}" for name, value in fields.items() if name != "at")
        line = (
            f"{at} {record.levelname} {self._process} {record.name}: {record.getMessage()} {told}"
        )
        return line.rstrip() + (f"\n{error}" if error else "")


class _Sending(logging.Handler):
    def __init__(self, send: Callable[[str], object]) -> None:
        super().__init__(logging.INFO)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        # What sends may have something to say about that itself.
        if not record.name.startswith("ray"):
            self._send(self.format(record))


def send_lines(shape: str | None, process: str, send: Callable[[str], object]) -> None:
    """Have everything that this process logs sent somewhere, line by line.

    Args:
        shape: "text" or "json"; None: nothing is sent.
        process: Names this process.
        send: Takes a line; called in any thread.
    """
    if shape is None:
        return
    handler = _Sending(send)
    handler.setFormatter(LineFormatter(shape, process))
    logging.getLogger().addHandler(handler)
    logging.getLogger("offramp").setLevel(logging.INFO)


def show_line(line: str, place: int = 2) -> None:
    """Write a line to standard error, past Python's buffer and its lock.

    If whoever holds its other end does not read, it is dropped: nobody may stop a pool that way.

    Args:
        line: The line, without its end.
        place: The file descriptor.
    """
    if select.select([], [place], [], UNREAD_S)[1]:
        os.write(place, f"{line}\n".encode())


class WaitingLines:
    """Lines that wait to be fetched."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=MOST_LINES)

    def add(self, line: str) -> None:
        """Take a line, from any thread."""
        self._lines.append(line)

    async def fetch(self) -> list[str]:
        """The next lines, as soon as there are any."""
        while not self._lines:
            await asyncio.sleep(_PAUSE_S)
        return [self._lines.popleft() for _ in range(min(AT_ONCE, len(self._lines)))]

    async def emptied(self, within_s: float) -> None:
        """Return once all are fetched, or after some time."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + within_s
        while self._lines and loop.time() < end_s:
            await asyncio.sleep(_PAUSE_S)
