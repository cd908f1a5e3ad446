"""One worker of the pool: an engine thread and a policy refresher, in a Ray Serve replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from ray import serve

from offramp.deploy.serve.channel_following import follow_channel
from offramp.deploy.serve.fronting.front_link import FrontLink
from offramp.deploy.serve.fronting.wire_messages import TokensAsked, packed
from offramp.deploy.serve.fronting.worker_wire import Call
from offramp.deploy.serve.log_lines import send_lines
from offramp.deploy.serve.loopback import keep_to_loopback
from offramp.deploy.serve.placing.pool_growth import load_of
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.worker_report import conditions_of, describe_policy, energy_of
from offramp.worker.decoding.request import Request, TokenEvent
from offramp.worker.energy.step_meter import serving_source
from offramp.worker.energy.track_meter import TrackMeter
from offramp.worker.engine.service import EngineService
from offramp.worker.following.fetching import ReleaseFetcher
from offramp.worker.following.shadows import ShadowRunner
from offramp.worker.following.worker_state import StateClaim
from offramp.worker.spec import freeze_heap, load_engine, warm_up


class _Completions:
    """Has the tokens of one request sent: what the engine's thread tells."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._places: dict[str, int] = {}

    def accept(self, requests: Sequence[Request]) -> None:
        """Note which choice each request is."""
        self._places = {request.id: place for place, request in enumerate(requests)}
        self._call.accept()

    def tell(self, event: TokenEvent | Exception) -> None:
        """Put a token with what is sent after the engine's step."""
        if isinstance(event, Exception):
            self._call.fail(event)
            return
        token = packed(self._call.number, self._places[event.request_id], event)
        self._call.answer(token, is_last=event.finish_reason is not None)


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
        self._drain_s = config.limits.drain_s
        self._front = FrontLink(front, model.name, self._replica)
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
        self._shadows = ShadowRunner(engine)
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
        self._front.answer(self._begin, lambda: self.service.is_healthy, self._drain_s)

    def _begin(self, call: Call) -> None:
        """Have a request decoded; its tokens go over the wire."""
        asked = call.asked
        assert isinstance(asked, TokensAsked)  # the front knows what its workers do
        accepted = self.service.order(
            asked.prompts,
            asked.sampling,
            _Completions(call),
            kv_mode=asked.kv_mode,
            prefill=asked.prefill,
            split_by=asked.request_id,
            cache_salt=asked.cache_salt,
        )
        call.stop_by(lambda: self.service.withdraw(accepted))
        accepted.add_done_callback(partial(_tell_refused, call))

    def _after_step(self) -> None:
        self._front.flush()  # first: whoever waits for a token does not wait for what comes next
        self._shadows.work()
        if self._traffic is not None:
            self._traffic.work()

    def __del__(self) -> None:
        """Called by Ray Serve before it ends the process in order: this is no crash."""
        if front := getattr(self, "_front", None):
            front.drain(self._drain_s)
        if refresher := getattr(self, "refresher", None):
            refresher.stop()

    async def check_health(self) -> None:
        """Called by Ray Serve each second: reports; a stuck engine gets its replica replaced."""
        if not self.service.is_healthy:
            raise RuntimeError("the engine makes no progress")
        await self._front.hear(self.report())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve where a pool may grow: what this worker has to do."""
        return load_of(*self.service.engine.load, self._front.tokens)

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
            "tokens": self._front.tokens,
            "stale_s": refresher.stale_s,
            "trips": refresher.trips,
            "energy": energy_of(self._meter.totals),
            "tasks": len(asyncio.all_tasks(self._loop)),
            "traffic": self._traffic and self._traffic.counts(),
        }


def _tell_refused(call: Call, accepted: Future[list[Request]]) -> None:
    if not accepted.cancelled() and (error := accepted.exception()) is not None:
        call.fail(error)
        call.flush()
