"""Replies of requests that make tokens: whole, or as a stream of events."""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic_core import to_json

from offramp.controller.errors import OfframpError
from offramp.deploy.http.backend import Direct, Tokens
from offramp.deploy.http.error_replies import error_body
from offramp.deploy.http.shapes.replies import Choice, ReplyStyle
from offramp.worker.decoding.request import TokenEvent

_logger = logging.getLogger(__name__)

Events = AsyncIterator[Tokens]

Write = Callable[[Callable[[], bytes]], bool]
"""Sends what it has made as a part of a body, at once; or has nothing made, and returns False."""

WRITE = "offramp.write"
"""The extension of ASGI's scope that is a ``Write``; servers of others have none."""

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of an event stream, for proxies to pass each event on as it comes."""

BLANK = uuid.uuid4().hex
"""A text that nothing else in a chunk is equal to."""


class Reply:
    """Says what a request's tokens are, as they come or once all are there.

    Args:
        style: Shape of what is said.
        choices: How many choices there are.
        events: Their tokens; closed in any case.
    """

    def __init__(self, style: ReplyStyle, choices: int, events: Events) -> None:
        self.style = style
        self.events = events
        self.choices: list[Choice] = [[] for _ in range(choices)]
        # By choice, what comes before and after the text of each chunk: most differ in nothing
        # else, and to encode all of each took a sixth of what the front does for a token.
        self._around: dict[int, list[bytes]] = {}

    async def whole(self) -> Response:
        """The reply, once all tokens are there."""
        async with aclosing(self.events):  # type: ignore[type-var]  # async generators have aclose
            async for tokens in self.events:
                for index, event in tokens:
                    self.choices[index].append(event)
        return JSONResponse(self.style.reply(self.choices))

    async def stream(self, direct: Direct, write: Write | None) -> Response:
        """A stream of them, once the first is there.

        Args:
            direct: The way of later tokens past this reply's task.
            write: Sends them to the client; None: there is no such way.
        """
        # Waiting for the first token keeps the status code honest: what fails before it is still
        # an error response, not a broken stream.
        first = await anext(self.events)
        lines = self._lines(first, direct, write)
        return StreamingResponse(lines, media_type="text/event-stream", headers=UNBUFFERED)

    async def _lines(
        self, first: Tokens, direct: Direct, write: Write | None
    ) -> AsyncIterator[bytes]:
        async with aclosing(self.events):  # type: ignore[type-var]  # async generators have aclose
            try:
                yield self._chunks(first)
                if write is not None:
                    direct.write = lambda tokens: write(lambda: self._chunks(tokens))
                async for tokens in self.events:
                    yield self._chunks(tokens)
                if self.style.counts:
                    yield _line(self.style.usage_chunk(self.choices))
            except OfframpError as error:
                _logger.warning("a stream ended with an error: %s", error)
                yield _line(error_body(str(error), "server_error", None, "decode_failed"))
        yield b"data: [DONE]\n\n"

    def _chunks(self, tokens: Tokens) -> bytes:
        """An event per token; those that came together are sent together."""
        return b"".join(self._chunk(index, event) for index, event in tokens)

    def _chunk(self, index: int, event: TokenEvent) -> bytes:
        events = self.choices[index]
        events.append(event)
        if len(events) == 1 or event.finish_reason is not None or not self.style.has_plain_chunks:
            return _line(self.style.chunk(index, event, first=len(events) == 1))
        around = self._around.get(index)
        if around is None:
            blank = self.style.chunk(index, event._replace(text=BLANK), first=False)
            around = self._around[index] = _line(blank).split(to_json(BLANK))
        return to_json(event.text).join(around)


def _line(body: Any) -> bytes:
    # Of what the front does for a token, json's own encoder took a tenth.
    return b"data: %b\n\n" % to_json(body, inf_nan_mode="null")
