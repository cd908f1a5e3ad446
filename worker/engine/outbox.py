"""Emitted tokens on their way out: as events, with the text that became readable."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offramp.controller.watching.guardrails import PolicyWatch
from offramp.worker.decoding.request import CompletionStats, Request, TokenEvent
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.detokenize import SpecialTokens, StopStrings, StreamDecoder
from offramp.worker.model.kv import SlotKV


@dataclass(slots=True)
class _Told:
    """What a watch was told of a request's later tokens."""

    watch: PolicyWatch
    first_s: float
    last_s: float
    calls: int
    tokens: int = 0
    layers: int = 0


class Outbox:
    """Makes the events of running requests.

    Args:
        tokenizer: None leaves every event's text empty.
        kv: Knows how exact a row's entries are.
    """

    def __init__(self, tokenizer: Any, kv: SlotKV) -> None:
        self._tokenizer = tokenizer
        self._kv = kv
        self._texts: dict[str, _Text] = {}
        self._told: dict[str, _Told] = {}  # by request under a watch

    def collect(self, told: Mapping[Sequence, int]) -> list[TokenEvent]:
        """The events of what rows have emitted since so many tokens; a row may fail alone.

        Then it has an ``error`` and no events.
        """
        events = []
        for row, before in told.items():
            try:
                events += self.events(row, before)
            except Exception as error:  # tokenizers are a caller's code, too
                row.error = error
        return events

    def events(self, row: Sequence, before: int) -> list[TokenEvent]:
        """The events of a row's tokens from index ``before`` on; to be asked once per token.

        A stop string that a token completes ends the row: its ``finish_reason`` is set here, and
        tokens after it are dropped.
        """
        if row.watch is not None and len(row.emitted) > before:
            self._note_gap(row, len(row.emitted) - before, row.watch)
        events = []
        for index in range(before, len(row.emitted)):
            offset, text = self._text(row, index)
            is_last = index == len(row.emitted) - 1
            events.append(
                TokenEvent(
                    request_id=row.request.id,
                    token=row.emitted[index],
                    text=text,
                    exit_layer=row.exit_layers[index],
                    generation=row.generations[index],
                    finish_reason=row.finish_reason if is_last else None,
                    logprob=row.logprobs[index],
                    top_logprobs=row.top_logprobs[index],
                    text_offset=offset,
                    stats=self._stats(row) if is_last and row.is_finished else None,
                    prompt_draws=tuple(row.prompt_draws) if index == 0 else (),
                )
            )
            if is_last:
                break
        return events

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that ended or was cancelled."""
        self._texts.pop(request_id, None)
        told = self._told.pop(request_id, None)
        if told is not None and told.tokens:
            told.watch.tally.note_request(told.last_s - told.first_s, told.tokens, told.layers)

    def _note_gap(self, row: Sequence, tokens: int, watch: PolicyWatch) -> None:
        now = time.perf_counter()
        told = self._told.get(row.request.id)
        if told is None:
            watch.note_first(now - row.request.arrived_s)
            self._told[row.request.id] = _Told(watch, now, now, row.layer_calls)
            return
        layers = row.layer_calls - told.calls
        watch.note_gap(now - told.last_s, tokens, layers)
        told.last_s, told.calls = now, row.layer_calls
        told.tokens += tokens
        told.layers += layers

    def _stats(self, row: Sequence) -> CompletionStats:
        return CompletionStats(
            prompt_tokens=len(row.request.prompt),
            generation=row.request.snapshot.generation,
            mean_exit_layer=sum(row.exit_layers) / len(row.exit_layers),
            layer_calls=row.layer_calls,
            copy_calls=row.copy_calls,
            prompt_calls=row.prompt_calls,
            exact_share=self._kv.exact_share(row.slot, row.position),
            drafts=row.drafts_made,
            drafts_accepted=row.drafts_accepted,
            queued_s=row.seated_s - row.request.arrived_s,
            cached_tokens=row.recalled,
            setting=row.request.snapshot.setting,
        )

    def _text(self, row: Sequence, index: int) -> tuple[int, str]:
        if self._tokenizer is None:
            return 0, ""
        if row.request.id not in self._texts:
            self._texts[row.request.id] = _Text(self._tokenizer, row.request)
        text = self._texts[row.request.id]
        return text.length, text.push(row, index)


class _Text:
    """One request's text: decoded, and cut at a stop string."""

    def __init__(self, tokenizer: Any, request: Request) -> None:
        self._decoder = StreamDecoder(tokenizer, request.prompt)
        self._special = SpecialTokens(tokenizer, request.sampling.stop)
        self._stops = StopStrings(self._special.stops)
        self.length = 0

    def push(self, row: Sequence, index: int) -> str:
        """Text to show with the row's token at an index; ends the row there at a stop string."""
        is_end = row.is_finished and index == len(row.emitted) - 1
        if is_end and row.finish_reason == "stop":  # at a token, which is no part of the text
            piece, mark = self._decoder.flush(), ""
        else:
            token = row.emitted[index]
            piece, mark = self._decoder.push(token, last=is_end), self._special.mark(token)
        self.length += len(piece)
        muted = index < row.request.sampling.min_tokens
        shown, stopped = self._stops.push(piece + mark, is_end, muted=muted)
        if stopped:
            row.finish_reason = "stop"
            row.cut(index + 1)
        return self._special.without_marks(shown)
