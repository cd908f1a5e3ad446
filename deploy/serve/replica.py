"""One worker of the pool: an engine thread and a policy refresher, in a Ray Serve replica."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve

from offramp.controller.errors import DecodeFailedError
from offramp.deploy.http.observability.access_log import REQUEST_NAME
from offramp.deploy.serve.channel_following import follow_channel
from offramp.deploy.serve.fronting.front_link import FrontLink
from offramp.deploy.serve.fronting.token_wire import TokenWire, WireAddress
from offramp.deploy.serve.log_lines import send_lines
from offramp.deploy.serve.loopback import keep_to_loopback
from offramp.deploy.serve.placing.pool_growth import load_of
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.worker_report import conditions_of, describe_policy, energy_of
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish, Request, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.energy.step_meter import serving_source
from offramp.worker.energy.track_meter import TrackMeter
from offramp.worker.engine.service import EngineService
from offramp.worker.following.fetching import ReleaseFetcher
from offramp.worker.following.shadows import ShadowRunner
from offramp.worker.following.worker_state import StateClaim
from offramp.worker.spec import freeze_heap, load_engine, warm_up

BEAT_S = 1.0
"""A request without tokens is told so often that its worker lives and makes progress."""

_logger = logging.getLogger(__name__)


class _Sender:
    """Has the tokens of one request sent, and says when the last was."""

    def __init__(self, wire: TokenWire, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self.wire = wire
        self._number = number
        self._loop = loop
        self._places: dict[str, int] = {}
        self._unfinished = 0
        self.ended: asyncio.Future[None] = loop.create_future()

    def accept(self, requests: Sequence[Request]) -> None:
        """Note which choice each request is."""
        self._places = {request.id: place for place, request in enumerate(requests)}
        self._unfinished = len(requests)

    def tell(self, event: TokenEvent | Exception) -> None:
        """Put a token with what is sent after the engine's step."""
        if isinstance(event, Exception):
            self._end(event)
            return
        self.wire.add(self._number, self._places[event.request_id], event)
        self._unfinished -= event.finish_reason is not None
        if not self._unfinished:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        # Nobody waits any more if the loop is closed.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


class ServedWorker:
    """One replica.

    Args:
        config: Whom it follows.
        model: What it loads.
        front: Name of the actor that is told how it is.
    """

    def __init__(self, config: PoolConfig, model: PoolModel, front: str) -> None:
        keep_to_loopback()
        self._loop = asyncio.get_running_loop()
        # Held for as long as this process lives: no other worker writes there.
        self._claim = StateClaim(config.state_dir / model.channel)
        self.worker_id = self._claim.name
        # Unlike that name, another worker never has it again.
        context = serve.get_replica_context()
        self._replica, self._app = context.replica_id.unique_id, context.app_name
        self._front = FrontLink(front, model.name)
        send_lines(config.log_format, config.process_of(model, self.worker_id), self._front.log)
        engine = load_engine(model.worker)
        warm_up(engine)
        self.refresher = follow_channel(
            config,
            model,
            self._claim,
            (engine.model_fingerprint, engine.tokenizer_fingerprint),
            engine.prepare,
            lambda registry: ReleaseFetcher(
                registry,
                self._claim.folder,
                engine.decoder.translators.digest,
                engine.take_in,
                config.max_adapter_mb,
            ),
            layers=engine.stack.layers,
            vocab=engine.stack.vocab,
        )
        engine.current_policy = lambda: self.refresher.current
        self._wire = TokenWire(self._front.wire(), self._replica)
        self._linking = asyncio.Lock()
        self._shadows = ShadowRunner(engine)
        self._tokens = 0  # of requests under way: of their prompts, and what they may make
        self._traffic: Any = None
        if model.traffic is not None:
            # Others need nothing of what records and stores: it is not even loaded.
            from offramp.deploy.serve.traffic_keeping import KeptTraffic

            self._traffic = KeptTraffic(engine, model.traffic, self.worker_id)
        self._meter = TrackMeter(
            engine, serving_source(engine.stack.device), self.refresher.watches
        )
        self.service = EngineService(
            engine, max_waiting=model.max_waiting, after_step=self._after_step, around=self._meter
        )
        freeze_heap()
        self.refresher.start()
        self.service.start()

    async def generate(
        self,
        number: int,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        kv_mode: KVWish | None,
        prefill: Prefill | None,
        request_id: str,
        cache_salt: str,
    ) -> AsyncIterator[str]:
        """Decode prompts; tokens go over the wire.

        Yields this replica's name: once the prompts are accepted, and then as signs of life, until
        the last token was sent. Raises as ``EngineService.submit`` does.

        Args:
            number: Names the request on the wire.
            prompts, sampling, kv_mode, prefill, request_id, cache_salt: See ``Backend.submit_all``.
        """
        REQUEST_NAME.set(request_id)
        sender = _Sender(self._wire, number, asyncio.get_running_loop())
        requests = await self.service.queue_all(
            prompts,
            sampling,
            sender,
            kv_mode=kv_mode,
            prefill=prefill,
            split_by=request_id,
            cache_salt=cache_salt,
        )
        tokens = sampling.n * sum(len(each) + sampling.max_tokens for each in prompts)
        self._tokens += tokens
        try:
            yield self._replica
            while not (await asyncio.wait({sender.ended}, timeout=BEAT_S))[0]:
                if sender.wire.is_broken:
                    raise DecodeFailedError("the front that asked is gone")
                if self.service.is_healthy:
                    yield self._replica
            sender.ended.result()
        except DecodeFailedError as error:
            _logger.error("%s: %r", error, error.__cause__)
            raise
        finally:
            self._tokens -= tokens
            self.service.give_up(requests)

    def _after_step(self) -> None:
        self._wire.flush()  # first: whoever waits for a token does not wait for what comes next
        self._shadows.work()
        if self._traffic is not None:
            self._traffic.work()

    def __del__(self) -> None:
        """Called by Ray Serve before it ends the process in order: this is no crash."""
        if refresher := getattr(self, "refresher", None):
            refresher.stop()

    async def check_health(self) -> None:
        """Called by Ray Serve each second: reports; a stuck engine gets its replica replaced."""
        if not self.service.is_healthy:
            raise RuntimeError("the engine makes no progress")
        if (self._front.is_lost or self._wire.is_broken) and not self._linking.locked():
            async with self._linking:
                await asyncio.to_thread(self._front.renew, self._connect)
        self._front.hear(self.report())

    def _connect(self, address: WireAddress) -> None:
        """Send tokens there from now on; a front that was only out of reach is still connected."""
        if address == self._wire.address and not self._wire.is_broken:
            return
        wire = TokenWire(address, self._replica)
        self._wire.close()
        self._wire = wire

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve where a pool may grow: what this worker has to do."""
        return load_of(*self.service.engine.load, self._tokens)

    def report(self) -> dict[str, Any]:
        """What this worker runs, and how it is.

        ``unreported`` says why the registry could not be told of it; "" if it was. ``traffic``
        counts what was recorded of live traffic, None if nothing is to be. ``energy`` lists
        method, source, joules and tokens of the steps whose energy was read. ``most_tokens`` is
        what a request may have, of those of the ``context``.
        """
        engine, refresher = self.service.engine, self.refresher
        policy = describe_policy(
            self.worker_id, refresher.current, refresher.report, conditions_of(engine)
        )
        running, waiting = engine.load
        return policy | {
            "replica": self._replica,
            "app": self._app,
            "context": engine.stack.context,
            "most_tokens": min(engine.stack.context, engine.row_tokens),
            "unreported": refresher.unreported,
            "running": running,
            "waiting": waiting,
            "tokens": self._tokens,
            "stale_s": refresher.stale_s,
            "trips": refresher.trips,
            "energy": energy_of(self._meter.totals),
            "tasks": len(asyncio.all_tasks(self._loop)),
            "traffic": self._traffic and self._traffic.counts(),
        }
