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

    def event(self, row: Sequence, index: int) -> TokenEvent:
        """The event of a row's token at an index; to be asked once per token, in order."""
        is_last = index == len(row.emitted) - 1
        return TokenEvent(
            request_id=row.request.id,
            token=row.emitted[index],
            text=self._text(row, index, is_last and row.is_finished),
            exit_layer=row.exit_layers[index],
            generation=row.generations[index],
            finish_reason=row.finish_reason if is_last else None,
        )

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended or was cancelled."""
        self._decoders.pop(request_id, None)

    def _text(self, row: Sequence, index: int, last: bool) -> str:
        if self._tokenizer is None:
            return ""
        decoder = self._decoders.setdefault(row.request.id, StreamDecoder(self._tokenizer))
        return decoder.push(row.emitted[index], last=last)
