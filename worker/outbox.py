"""Emitted tokens on their way out: as events, with the text that became readable."""

from __future__ import annotations

from typing import Any

from offramp.worker.detokenize import StreamDecoder
from offramp.worker.sequence import Sequence, TokenEvent
from offramp.worker.stopping import StopStrings


class Outbox:
    """Makes the events of running requests.

    Args:
        tokenizer: None leaves every event's text empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[str, _Text] = {}

    def event(self, row: Sequence) -> TokenEvent:
        """The event of a row's latest token; to be asked once per token, in order.

        A stop string that the token completes ends the row: its ``finish_reason`` is set here.
        """
        offset, text = self._text(row)
        return TokenEvent(
            request_id=row.request.id,
            token=row.emitted[-1],
            text=text,
            exit_layer=row.exit_layers[-1],
            generation=row.generations[-1],
            finish_reason=row.finish_reason,
            logprob=row.logprobs[-1],
            top_logprobs=row.top_logprobs[-1],
            text_offset=offset,
        )

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended or was cancelled."""
        self._texts.pop(request_id, None)

    def _text(self, row: Sequence) -> tuple[int, str]:
        if self._tokenizer is None:
            return 0, ""
        if row.request.id not in self._texts:
            self._texts[row.request.id] = _Text(self._tokenizer, row.request.sampling.stop)
        text = self._texts[row.request.id]
        return text.length, text.push(row)


class _Text:
    """One request's text: decoded, and cut at a stop string."""

    def __init__(self, tokenizer: Any, stops: tuple[str, ...]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self.length = 0

    def push(self, row: Sequence) -> str:
        """Text to show with the row's latest token; ends the row at a stop string."""
        if row.finish_reason == "stop":  # at a token, which is no part of the text
            piece = self._decoder.flush()
        else:
            piece = self._decoder.push(row.emitted[-1], last=row.is_finished)
        self.length += len(piece)
        muted = len(row.emitted) <= row.request.sampling.min_tokens
        shown, stopped = self._stops.push(piece, row.is_finished, muted=muted)
        if stopped:
            row.finish_reason = "stop"
        return shown
