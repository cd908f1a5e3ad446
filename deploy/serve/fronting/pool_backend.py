"""The workers of one model as what decodes behind the routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from offramp.controller.errors import DecodeFailedError, OverloadedError, RequestError
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.deploy.http.backend import Direct, Tokens, WorkerLostError
from offramp.deploy.serve.fronting.wire_messages import (
    Asked,
    ClassesAsked,
    TokensAsked,
    unpacked,
    unpacked_text,
)
from offramp.deploy.serve.fronting.worker_links import (
    Arriving,
    Part,
    SilentWorkerError,
    WorkerLinks,
)
from offramp.deploy.serve.placing.prompt_places import PromptPlaces
from offramp.deploy.serve.pool_config import PoolModel
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import PromptEncoder
from offramp.worker.engine.service import RETRY_AFTER_S
from offramp.worker.model.loading import layers_and_vocab, load_tokenizer

AWAKE_S = 1.5
"""Workers report each second; one that has not for so long, as when it was told to end, or froze,
gets nothing if there are others."""

TRIES = 3
"""A request without a token is sent to so many workers that fall silent, in all."""

BACK_OFF_S = 0.1
"""Pause before a worker that found itself full is asked again."""

FORGET_S = 10.0
"""A worker without a report for so long is not counted on."""

ENDED = "the server stops"
"""What a request is told that the end of the pool cuts off."""

_PAUSE_S = 0.02


class PoolBackend:
    """Sends requests to workers, and those without a token elsewhere if their worker is lost.

    Once if it died, and to ``TRIES`` in all if they are silent: one request must not end all.

    Args:
        model: What its workers serve.
        clients: Tells clients by their keys.
        links: Reach the workers.
    """

    def __init__(self, model: PoolModel, clients: ClientKeys, links: WorkerLinks) -> None:
        self.model_id = model.name
        self.clients = clients
        self.started_at = int(time.time())
        self.layers = layers_and_vocab(model.worker.model)[0]
        self.tokenizer = load_tokenizer(model.worker.model)
        self.labels = model.labels
        self.most_tokens = 0
        self.is_draining = False
        self._links = links
        self._encoder: PromptEncoder | None = None
        self._app = ""
        self._room = 0
        engine = model.worker.engine
        self._places = PromptPlaces(
            engine.prefill_tokens if engine.prefix_cache_mib else 0, model.slack
        )
        self._outstanding = 0
        self._streams: set[Arriving[Any]] = set()
        self._turn = asyncio.Lock()
        self._has_ended = False
        self._heard: dict[str, tuple[float, dict[str, Any]]] = {}

    async def connect(self, app: str, model: PoolModel) -> None:
        """Send requests from now on to an application's workers; returns once one has reported.

        Args:
            app: Its name in Ray Serve.
            model: What they serve; after a redeploy its classes may be others.
        """
        while not self._serving(app):
            await asyncio.sleep(_PAUSE_S)
        report = next(each for each in self._lately() if each["app"] == app)
        if self._encoder is None:
            self._encoder = PromptEncoder(self.tokenizer, report["context"])
        self.most_tokens, self._room = report["most_tokens"], model.room
        self._places.slack = model.slack
        self._app, self.labels = app, model.labels

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes prompts."""
        assert self._encoder is not None  # no request is taken before the pool is connected
        return self._encoder

    def trouble(self) -> str | None:
        """Why it can make no tokens now."""
        if self.is_draining:
            return "draining"
        if not self._app:
            return "starting"
        return None if self._takers() else "without workers"

    def load(self) -> tuple[int, int]:
        """Requests under way, and how many may be."""
        takers = self._takers()
        # Of a worker that takes no more, what it still has is no burden to those that do.
        elsewhere = sum(load for name, load in self._places.load.items() if name not in takers)
        return self._outstanding, self._room * len(takers) + elsewhere

    def _serving(self, app: str) -> set[str]:
        """Workers of an application that have reported; those of another end what they have."""
        return {report["replica"] for report in self._lately() if report["app"] == app}

    def _takers(self) -> set[str]:
        """Workers that take requests, if they have room."""
        return self._serving(self._app) & self._links.reached()

    def _with_room(self, count: int) -> set[str]:
        """Workers that can take so many: those that reported just now, if there are any."""
        can = {
            worker for worker in self._takers() if self._places.load[worker] + count <= self._room
        }
        awake = {report["replica"] for report in self._lately(AWAKE_S)}
        return can & awake or can

    async def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        kv_mode: KVWish | None,
        prefill: Prefill | None,
        request_id: str,
        cache_salt: str,
        direct: Direct,
    ) -> AsyncIterator[Tokens]:
        """Queue requests; see ``Backend``."""
        asked = TokensAsked(prompts, sampling, kv_mode, prefill, request_id, cache_salt)
        self._let_in("n", asked)
        names = self._places.names(prompts[0], cache_salt)
        unpack = partial(unpacked, request_id)
        arriving = partial(Arriving, asked.completions, unpack, _is_last, direct.take)
        events = self._parts(asked, names, arriving)
        try:  # what is refused is refused here: the first that a worker says is that it accepts
            await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return events

    async def classify(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        quality: float | None,
        request_id: str,
        best: int | None = None,
    ) -> list[ClassifiedText]:
        """Classify texts on one worker, or on another if that is lost; see ``ClassBackend``."""
        asked = ClassesAsked(sequences, quality, request_id, best)
        self._let_in("input", asked)
        found: dict[int, ClassifiedText] = {}
        arriving = partial(Arriving, asked.completions, unpacked_text, lambda _: True)
        async with aclosing(self._parts(asked, (), arriving)) as parts:
            async for some in parts:
                found |= some
        return [found[place] for place in range(len(sequences))]

    def _let_in(self, field: str, asked: Asked) -> None:
        count = asked.completions
        if count > self._room:
            problem = f"{count} at once exceed the {self._room} that a worker has room for"
            raise RequestError(field, problem, "Ask for fewer at once")
        if self._outstanding + count > self.load()[1]:
            raise OverloadedError(RETRY_AFTER_S)
        self._outstanding += count

    async def _parts(
        self, asked: Asked, beginnings: Sequence[bytes], fresh: Callable[[], Arriving[Part]]
    ) -> AsyncGenerator[list[tuple[int, Part]], None]:
        """Nothing once the request is accepted, then its answer; retried while there is none."""
        has_sent = is_accepted = has_killed = False
        silent = 0
        try:
            while True:
                try:
                    async with self._asked(asked, beginnings, fresh()) as arriving:
                        while not arriving.is_over:
                            parts = await arriving.take()
                            # What is said of some texts has not been sent, and is said again.
                            has_sent |= bool(parts) and isinstance(asked, TokensAsked)
                            if parts or not is_accepted:
                                yield parts
                            is_accepted = True
                    return
                except WorkerLostError as lost:
                    silent += isinstance(lost, SilentWorkerError)
                    if has_sent or has_killed or silent == TRIES or self.is_draining:
                        raise
                    has_killed = not isinstance(lost, SilentWorkerError)
                except OverloadedError:  # what has ended by our count still ends there
                    await asyncio.sleep(BACK_OFF_S)
        finally:
            self._outstanding -= asked.completions

    @asynccontextmanager
    async def _asked(
        self, asked: Asked, beginnings: Sequence[bytes], arriving: Arriving[Part]
    ) -> AsyncIterator[Arriving[Part]]:
        """Ask one worker, once one has room; what it says is heard until the block ends.

        Raises:
            WorkerLostError: none is left that could be asked.
            DecodeFailedError: the pool has ended.
        """
        count = asked.completions
        async with self._turn:  # in order: small requests would else always come before large ones
            while not (workers := self._with_room(count)):  # one was lost, and is being replaced
                if self.is_draining and not self._takers():
                    raise WorkerLostError("no worker is left")
                await asyncio.sleep(_PAUSE_S)
        if self._has_ended:
            raise DecodeFailedError(ENDED)
        with self._places.chosen(beginnings, workers, count) as chosen:
            self._streams.add(arriving)
            try:
                self._links.ask(chosen, asked, arriving)
                yield arriving
            finally:
                self._links.hang_up(chosen, arriving)
                self._streams.discard(arriving)

    def abandon(self) -> None:
        """End every stream that is still open with an error."""
        self._has_ended = True
        for arriving in list(self._streams):
            arriving.fail(DecodeFailedError(ENDED))

    def hear(self, report: dict[str, Any]) -> None:
        """Take what a worker says of itself."""
        self._heard.pop(report["worker"], None)
        self._heard[report["worker"]] = time.monotonic(), report

    def reports(self) -> list[dict[str, Any]]:
        """What each worker said last, if it has said anything for some time."""
        kept, moved = self._places.kept, self._places.moved
        return [
            report | {"kept": kept[report["replica"]], "moved": moved[report["replica"]]}
            for report in self._lately()
        ]

    def _lately(self, within_s: float = FORGET_S) -> list[dict[str, Any]]:
        """What workers said in the last seconds, each what it said last."""
        oldest_s = time.monotonic() - within_s
        return [report for heard_s, report in self._heard.values() if heard_s >= oldest_s]


def _is_last(event: TokenEvent) -> bool:
    return event.finish_reason is not None
