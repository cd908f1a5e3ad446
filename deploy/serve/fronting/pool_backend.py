"""The workers of one model as what decodes behind the routes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from offramp.controller.errors import DecodeFailedError, OfframpError, OverloadedError
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.deploy.http.backend import Tokens, WorkerLostError
from offramp.deploy.serve.fronting.token_inbox import Arriving, TokenInbox
from offramp.deploy.serve.placing.prompt_places import PromptPlaces
from offramp.deploy.serve.placing.workers_heard import HEARD
from offramp.deploy.serve.pool_config import PoolModel
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import PromptEncoder
from offramp.worker.engine.service import RETRY_AFTER_S
from offramp.worker.model.loading import layers_and_vocab, load_tokenizer

SILENCE_S = 4.0
"""A worker that says nothing for so long, not even that it lives, is given up."""

SLICES = 8
"""The wait is cut into so many: a front that had no time to listen for long counts it as one."""

SILENT_TRIES = 6
"""A request without a token is sent to so many workers that say nothing, in all: Ray may send it to
the same frozen one again, until it has found out, in ``FROZEN_S`` and two questions more."""

FORGET_S = 10.0
"""A worker without a report for so long is not counted on."""

_PAUSE_S = 0.02


class _SilentError(WorkerLostError):
    """A worker says nothing any more; a request did not kill it."""


class PoolBackend:
    """Sends requests to workers, and those without a token elsewhere if their worker is lost.

    Once if it died, lest one request bring down all; ``SILENT_TRIES`` times if it is silent.

    Args:
        model: What its workers serve.
        clients: Tells clients by their keys.
        inbox: Takes what workers send.
    """

    def __init__(self, model: PoolModel, clients: ClientKeys, inbox: TokenInbox) -> None:
        self.model_id = model.name
        self.clients = clients
        self.started_at = int(time.time())
        self.layers = layers_and_vocab(model.worker.model)[0]
        self.tokenizer = load_tokenizer(model.worker.model)
        self.labels = model.labels
        self.most_tokens = 0
        self.is_draining = False
        self._inbox = inbox
        self._encoder: PromptEncoder | None = None
        self._workers: Any = None
        self._app = ""
        self._room = 0
        engine = model.worker.engine
        self._places = PromptPlaces(
            engine.prefill_tokens if engine.prefix_cache_mib else 0, max(1, model.worker.slots // 4)
        )
        self._outstanding = 0
        self._streams: set[Any] = set()
        self._heard: dict[str, tuple[float, dict[str, Any]]] = {}

    async def connect(self, workers: Any, app: str, model: PoolModel) -> None:
        """Send requests from now on to a deployment's workers; returns once one has reported.

        Args:
            workers, app: Handle of the deployment, and its application's name.
            model: What they serve; after a redeploy its classes may be others.
        """
        while not self._serving(app):
            await asyncio.sleep(_PAUSE_S)
        report = next(each for each in self.reports() if each["app"] == app)
        if self._encoder is None:
            self._encoder = PromptEncoder(self.tokenizer, report["context"])
        self.most_tokens, self._room = report["most_tokens"], model.room
        self._workers, self._app, self.labels = workers, app, model.labels

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes prompts."""
        assert self._encoder is not None  # no request is taken before the pool is connected
        return self._encoder

    def trouble(self) -> str | None:
        """Why it can make no tokens now."""
        if self.is_draining:
            return "draining"
        if self._workers is None:
            return "starting"
        return None if self._serving(self._app) else "without workers"

    def load(self) -> tuple[int, int]:
        """Requests under way, and how many may be."""
        return self._outstanding, self._room * len(self._serving(self._app))

    def _serving(self, app: str) -> set[str]:
        """Replicas of an application that have reported; those of another end what they have."""
        return {report["replica"] for report in self.reports() if report["app"] == app}

    async def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        kv_mode: KVWish | None,
        prefill: Prefill | None,
        request_id: str,
        cache_salt: str,
    ) -> AsyncIterator[Tokens]:
        """Queue requests; see ``Backend``."""
        count = len(prompts) * sampling.n
        if self._outstanding + count > self.load()[1]:
            raise OverloadedError(RETRY_AFTER_S)
        self._outstanding += count
        events = self._events(
            (prompts, sampling, kv_mode, prefill, request_id, cache_salt), request_id, count
        )
        try:  # what is refused is refused here: the first that a worker says is that it accepts
            await anext(events)
        except BaseException:
            await events.aclose()
            raise
        return events

    async def _events(
        self, request: tuple[Any, ...], name: str, count: int
    ) -> AsyncGenerator[Tokens, None]:
        """No tokens once the request is accepted, then its own; retried while there are none."""
        has_sent = is_accepted = has_killed = False
        silent = 0
        prompts, *_, cache_salt = request
        names = self._places.names(prompts[0], cache_salt)
        try:
            while True:
                try:
                    async with aclosing(self._said(request, name, count, names)) as said:
                        async for tokens in said:
                            # The wire is quicker than Ray: tokens come before the first word, too.
                            if not is_accepted:
                                is_accepted = True
                                yield []
                            if tokens:
                                has_sent = True
                                yield tokens
                    return
                except WorkerLostError as lost:
                    silent += isinstance(lost, _SilentError)
                    is_last = has_killed or silent == SILENT_TRIES
                    has_killed |= not isinstance(lost, _SilentError)
                    if has_sent or is_last or self.is_draining:
                        raise
        finally:
            self._outstanding -= count

    async def _said(
        self, request: tuple[Any, ...], name: str, count: int, beginnings: Sequence[bytes]
    ) -> AsyncGenerator[Tokens, None]:
        """What one worker says of a request.

        Raises:
            WorkerLostError: it died, or says nothing any more.
        """
        arriving = self._inbox.expect(name)
        with self._places.chosen(beginnings, self._serving(self._app), count) as chosen:
            # See ``WorkerRouter`` for why the worker is named so.
            workers = self._workers.options(stream=True, multiplexed_model_id=chosen or "")
            stream = workers.generate.remote(arriving.number, *request)
            self._streams.add(stream)
            following = asyncio.create_task(_follow(stream, arriving))
            try:
                while count:
                    tokens = await arriving.take()
                    count -= sum(event.finish_reason is not None for _, event in tokens)
                    yield tokens
            finally:
                if arriving.worker is not None:  # another, if the chosen one could not take it
                    self._places.note(beginnings, arriving.worker)
                self._inbox.forget(arriving)
                self._streams.discard(stream)
                following.cancel()
                stream.cancel()

    async def classify(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        quality: float | None,
        request_id: str,
        best: int | None = None,
    ) -> list[ClassifiedText]:
        """Classify texts on one worker, or on another if that is lost; see ``ClassBackend``."""
        if self._outstanding + len(sequences) > self.load()[1]:
            raise OverloadedError(RETRY_AFTER_S)
        self._outstanding += len(sequences)
        try:
            try:
                return await self._classified(sequences, quality, request_id, best)
            except WorkerLostError:
                if self.is_draining:
                    raise
            return await self._classified(sequences, quality, request_id, best)
        finally:
            self._outstanding -= len(sequences)

    async def _classified(self, texts: Sequence[Any], *asked: Any) -> list[ClassifiedText]:
        awake = HEARD.awake(self._serving(self._app))
        with self._places.chosen((), awake, len(texts)) as chosen:
            workers = self._workers.options(multiplexed_model_id=chosen or "")
            answer = workers.classify.remote(texts, *asked)
            with _told_as_ours():
                found = await HEARD.answered(chosen, answer, SILENCE_S)
            return cast("list[ClassifiedText]", found)

    def abandon(self) -> None:
        """End every stream that is still open with an error."""
        for stream in list(self._streams):
            stream.cancel()

    def hear(self, report: dict[str, Any]) -> None:
        """Take what a worker says of itself."""
        self._heard.pop(report["worker"], None)
        self._heard[report["worker"]] = time.monotonic(), report
        HEARD.note(report["replica"])

    def reports(self) -> list[dict[str, Any]]:
        """What each worker said last, if it has said anything for some time."""
        kept, moved = self._places.kept, self._places.moved
        oldest_s = time.monotonic() - FORGET_S
        return [
            report | {"kept": kept[report["replica"]], "moved": moved[report["replica"]]}
            for heard_s, report in self._heard.values()
            if heard_s >= oldest_s
        ]


async def _follow(stream: Any, arriving: Arriving) -> None:
    """Tell a request that it was accepted, and why it ends if not with its last token."""
    try:
        while (worker := await _next(stream, arriving)) is not None:
            arriving.accept(worker)
        # Its last tokens come at about this time, another way; who has them waits no longer.
        await asyncio.sleep(SILENCE_S)
        raise WorkerLostError("the request's tokens were lost")
    except Exception as error:  # whatever it is, a client waits
        arriving.fail(error)


async def _next(stream: Any, arriving: Arriving) -> str | None:
    """The next that a worker says: its name; None at the end."""
    saying = asyncio.ensure_future(anext(stream, None))
    silent = 0
    try:
        while not saying.done():
            heard = arriving.tokens
            await asyncio.wait({saying}, timeout=SILENCE_S / SLICES)
            # Tokens are signs of life, too, and come another way.
            silent = silent + 1 if arriving.tokens == heard else 0
            if silent == SLICES and not saying.done():
                raise _SilentError("the request's worker no longer answers")
        with _told_as_ours():
            return cast("str | None", saying.result())
    finally:
        # Given up, it still ends some day, with an error that nobody is to be told.
        saying.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        saying.cancel()


@contextlib.contextmanager
def _told_as_ours() -> Iterator[None]:
    """Raise what Ray says of a worker as an error of ours."""
    try:
        yield
    except RequestCancelledError as error:
        raise DecodeFailedError("the server stops") from error
    except RayTaskError as error:
        if isinstance(error.cause, OfframpError):
            raise error.cause from None
        raise DecodeFailedError("the request failed in its worker") from error
    except (RayError, RayServeException) as error:
        raise WorkerLostError("the request's worker was lost") from error
