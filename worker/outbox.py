"""Emitted tokens on their way out: as events, with the text that became readable."""

from __future__ import annotations

from typing import Any

from offramp.worker.detokenize import StreamDecoder
from offramp.worker.sequence import Sequence, TokenEvent


class Outbox:
    """Makes the events of running requests.

    Args:
        tokenizer: None leaves every event's text empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoders: dict[str, StreamDecoder] = {}

    def event(self, row: Sequence) -> TokenEvent:
        """The event of a row's latest token; to be asked once per token, in order."""
        return TokenEvent(
            request_id=row.request.id,
            token=row.emitted[-1],
            text=self._text(row),
            exit_layer=row.exit_layers[-1],
            generation=row.generations[-1],
            finish_reason=row.finish_reason,
        )

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended or was cancelled."""
        self._decoders.pop(request_id, None)

    def _text(self, row: Sequence) -> str:
        if self._tokenizer is None:
            return ""
        decoder = self._decoders.setdefault(row.request.id, StreamDecoder(self._tokenizer))
        return decoder.push(row.emitted[-1], last=row.is_finished)
