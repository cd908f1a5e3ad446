"""Repeats a bounded share of requests under a canary in shadow, which serves nobody.

A request that has ended is run once more in the same engine, its tokens go nowhere, and full depth
is asked about each that leaves early: so the canary is counted and judged as it decides on this
worker's own traffic, before anybody's output depends on it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from offramp.controller.errors import RequestError
from offramp.controller.watching.steps import SHADOW_PROMPT, SHADOW_SHARE
from offramp.worker.decoding.request import PolicySnapshot, Request
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine import AdaptiveEngine

MOST_TOKENS = 64
"""New tokens of a shadow, at most."""

_logger = logging.getLogger(__name__)


class ShadowRunner:
    """Runs one shadow at a time, in a slot that nobody waits for.

    Used by the thread that decodes. No prompt is held but the last one's.

    Args:
        engine: The engine that serves.
        share: Share of the time in which one row of the engine may be a shadow, in (0, 1).
    """

    def __init__(self, engine: AdaptiveEngine, share: float = SHADOW_SHARE) -> None:
        self._engine = engine
        self._share = share
        self._ended: Request | None = None
        self._running = ""
        self._began_s = self._next_s = 0.0
        engine.tell_ends(self._note)

    def work(self) -> None:
        """Begin a shadow that is due, or give up one that keeps others waiting; between steps."""
        ended, self._ended = self._ended, None
        now_s = time.perf_counter()
        if self._running:
            self._look_after(now_s)
        elif ended is not None and now_s >= self._next_s and (canary := self._canary()):
            self._begin(ended, canary, now_s)

    def _note(self, row: Sequence) -> None:
        request = row.request
        is_own = request.sampler is not None or request.forced  # not to be had a second time
        is_short = len(request.prompt) <= SHADOW_PROMPT and len(row.emitted) > 1
        if is_short and not (is_own or request.is_shadow or self._running):
            self._ended = request

    def _canary(self) -> PolicySnapshot | None:
        """The canary in shadow, if there is one and a slot is free."""
        canary = self._engine.current_policy().canary
        has_room = sum(self._engine.load) < self._engine.kv.slots
        return canary if canary is not None and canary.rollout.is_shadow and has_room else None

    def _begin(self, ended: Request, canary: PolicySnapshot, now_s: float) -> None:
        asked = ended.sampling
        most = min(asked.max_tokens, MOST_TOKENS)
        sampling = replace(asked, max_tokens=most, min_tokens=min(asked.min_tokens, most))
        try:
            shadow = self._engine.submit(
                ended.prompt, sampling, canary, cache_salt=ended.cache_salt
            )
        except RequestError:  # it says nothing to those who are served
            _logger.exception("generation %s took no shadow of a request", canary.generation)
            return
        self._running, self._began_s = shadow.id, now_s

    def _look_after(self, now_s: float) -> None:
        if self._engine.load[1]:
            self._engine.cancel(self._running)
        if not self._engine.is_under_way(self._running):
            self._running = ""
            self._next_s = self._began_s + (now_s - self._began_s) / self._share
