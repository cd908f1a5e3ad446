"""Records live traffic: once a request that full depth was asked about has ended, its tokens.

A pass over its text at full depth computes what `offramp record` would have of it, so that both can
be compared and learned from together. It runs in the thread that decodes, between two steps: other
rows wait for it as for a prompt of that length.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from offramp.controller.features import CANDIDATES_V1, IntArray
from offramp.controller.policies.exits import is_on_copy
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.model.adapter_layers import ExitAdapters
from offramp.worker.recording.recorder import record_document
from offramp.worker.spec import TrafficConfig

LIVE = "live traffic"
"""Says in a trace's header whose text was decoded."""

MOST_TOKENS = 512
"""Tokens of a request, prompt included, that are run again; the rest is left out."""

MOST_WAITING = 32
"""Requests that wait to be recorded; one more, and the oldest is passed over."""

_logger = logging.getLogger(__name__)

Keep = Callable[[TraceHeader, IntArray, TraceChunk], None]
"""Takes what was recorded: header, candidate table and chunk. It must neither wait nor raise."""


class Lens(NamedTuple):
    """How exits are probed."""

    exits: tuple[int, ...]
    candidates_VK: IntArray
    adapters: ExitAdapters


class EndedRequest(NamedTuple):
    """What is recorded of a request: its tokens, from which one on, and how."""

    tokens: list[int]
    prompt_tokens: int
    lens: Lens


class TrafficRecorder:
    """Records audited requests, and as large a share of those that no policy decides.

    The latter matter after a trip: full depth goes on serving, and says how the traffic is that
    the policy failed on. They are probed as under the last policy that could be.

    Args:
        engine: The engine that serves.
        keep: Takes what was recorded.
        config: Bounds on its time, and whether text is kept.

    Attributes:
        recorded: Tokens recorded so far.
        passed_over: Requests that were not, for want of time, or because they were too long.
    """

    def __init__(self, engine: AdaptiveEngine, keep: Keep, config: TrafficConfig) -> None:
        self.recorded = self.passed_over = 0
        self._engine, self._keep, self._config = engine, keep, config
        self._waiting: deque[EndedRequest] = deque()
        self._lens: Lens | None = None
        self._owed = 0.0
        self._next_s = 0.0
        engine.tell_ends(self._note)

    def work(self) -> None:
        """Record one request, if its turn has come; called between two steps."""
        start = time.perf_counter()
        if not self._waiting or start < self._next_s:
            return
        try:
            self._record(self._waiting.popleft())
        except Exception:  # whatever it is, those who are served must not feel it
            self.passed_over += 1
            _logger.exception("a request of live traffic was not recorded")
        took_s = time.perf_counter() - start
        self._next_s = start + took_s / self._config.time_share

    def _note(self, row: Sequence) -> None:
        lens = None if row.request.is_shadow else self._lens_of(row)
        if lens is None:
            return
        prompt = row.request.prompt
        if len(prompt) > MOST_TOKENS - 2 or len(row.emitted) < 2:
            self.passed_over += len(row.emitted) > 1
            return
        tokens = [*prompt, *row.emitted][: MOST_TOKENS + 1]
        self._waiting.append(EndedRequest(tokens, len(prompt), lens))
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popleft()
            self.passed_over += 1

    def _lens_of(self, row: Sequence) -> Lens | None:
        """How a request that ended is to be probed; None if it is not recorded."""
        snapshot = row.request.snapshot
        if row.request.audited:
            policy = snapshot.policy
            table_VK = policy.candidates_VK
            can_be = policy.schema == CANDIDATES_V1 and not any(map(is_on_copy, policy.exits))
            if not can_be or table_VK is None:
                return None
            adapters = self._engine.decoder.reader.under(snapshot)
            self._lens = Lens(tuple(map(int, policy.exits)), table_VK, adapters)
            return self._lens
        if self._lens is None or not isinstance(snapshot.policy, NeverExit):
            return None
        self._owed += self._engine.config.audit_share
        is_due = self._owed >= 1.0
        self._owed -= is_due
        return self._lens if is_due else None

    def _record(self, ended: EndedRequest) -> None:
        stack, lens = self._engine.stack, ended.lens
        chunk = record_document(
            stack,
            secrets.token_hex(32),  # no hash of a text that could be guessed
            ended.tokens,
            lens.exits,
            lens.candidates_VK,
            translators=lens.adapters,
        )
        if not self._config.keep_text:
            # The first token comes from the prompt's pass: no exit is asked about it.
            chunk = chunk.after(ended.prompt_tokens).without_text()
        header = TraceHeader(
            model=self._engine.model_fingerprint,
            schema=CANDIDATES_V1.digest,
            exits=lens.exits,
            layers=stack.layers,
            translators=lens.adapters.digest,
            adapters=tuple(layer for layer in lens.exits if layer in lens.adapters.layers),
            text=LIVE,
        )
        self._keep(header, lens.candidates_VK, chunk)
        self.recorded += len(chunk)
