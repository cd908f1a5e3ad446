"""One worker of a pool that classifies, in a Ray Serve replica."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from ray import serve

from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.policies.protocols import Policy
from offramp.controller.release.manifest import Manifest
from offramp.deploy.serve.channel_following import follow_channel
from offramp.deploy.serve.fronting.front_link import FrontLink
from offramp.deploy.serve.fronting.wire_messages import ClassesAsked, packed_text
from offramp.deploy.serve.fronting.worker_wire import Call
from offramp.deploy.serve.log_lines import send_lines
from offramp.deploy.serve.loopback import keep_to_loopback
from offramp.deploy.serve.placing.pool_growth import load_of
from offramp.deploy.serve.pool_config import PoolConfig, PoolModel
from offramp.deploy.serve.worker_report import describe_policy, energy_of
from offramp.worker.classifying.class_heads import AGAIN, ClassHeads
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.text_service import TextService
from offramp.worker.decoding.request import ExitReaders, PolicySnapshot
from offramp.worker.following.fetching import ReleaseFetcher
from offramp.worker.following.worker_state import StateClaim
from offramp.worker.model.loading import parse_dtype
from offramp.worker.spec import freeze_heap


class HeadFetcher(ReleaseFetcher):
    """Brings releases with their heads; a policy that may exit has to name some."""

    def adapters(self, manifest: Manifest) -> ExitReaders | None:
        """The heads that a release brought; None: it names this worker's own, or none.

        Raises:
            PolicyRefusedError: they are not there or do not fit, or it is for tokens.
        """
        if not manifest.adapters and manifest.kind != "never":
            detail = "it names no heads: it is for tokens, and this worker classifies"
            raise PolicyRefusedError(Refusal.UNSUPPORTED, detail)
        return super().adapters(manifest)


def require_classes(theirs: Sequence[str], own: Sequence[str]) -> None:
    """Refuse heads of other classes than those that the front tells its clients of.

    Raises:
        ConfigError: field ``heads``; a class is another, or missing.
    """
    for place, (name, wanted) in enumerate(zip_longest(theirs, own)):
        if name != wanted:
            problem = f"class {place} is {name!r}, and {wanted!r} as this pool tells its clients"
            raise ConfigError("heads", problem, "Redeploy the pool with these heads")


class ClassifyingWorker:
    """One replica of a pool that classifies.

    Args:
        config: Whom it follows.
        served: What it loads; with heads.
        front: Name of the actor that is told how it is.
    """

    def __init__(self, config: PoolConfig, served: PoolModel, front: str) -> None:
        keep_to_loopback()
        assert served.heads is not None  # else its workers decode
        self._loop = asyncio.get_running_loop()
        self._claim = StateClaim(config.state_dir / served.channel)
        self.worker_id = self._claim.name
        context = serve.get_replica_context()
        self._replica, self._app = context.replica_id.unique_id, context.app_name
        self._drain_s = config.limits.drain_s
        self._front = FrontLink(front, served.name, self._replica)
        send_lines(config.log_format, config.process_of(served, self.worker_id), self._front.log)
        spec = served.worker
        torch.set_num_threads(spec.threads)
        model = SequenceModel.load(spec.model, parse_dtype(spec.dtype), spec.device)
        self.classifier = model.classifier(served.heads)
        require_classes(self.classifier.heads.labels, served.labels)

        def prepare(policy: Policy, heads: ClassHeads | None) -> None:
            with_heads = Classifier(model.stack, heads) if heads else self.classifier
            with_heads.require_policy(policy)

        def take_in(folder: Path) -> ClassHeads:
            heads = model.heads(folder)
            require_classes(heads.labels, served.labels)
            if self.classifier.heads.has_bounds and not heads.has_bounds:
                problem = "they bound no scores, so the best of several texts could not be found"
                raise ConfigError("heads", problem, AGAIN)
            return heads

        self.refresher = follow_channel(
            config,
            served,
            self._claim,
            (model.fingerprint, model.tokenizer_fingerprint),
            prepare,
            lambda registry: HeadFetcher(
                registry,
                self._claim.folder,
                self.classifier.heads.digest,
                take_in,
                config.max_adapter_mb,
            ),
            layers=model.stack.layers,
        )
        self.service = TextService(
            self.classifier,
            lambda: self.refresher.current,
            rows=spec.slots,
            max_waiting=served.max_waiting,
            dtype=spec.dtype,
            audit_share=spec.engine.audit_share,
        )
        freeze_heap()
        self.refresher.start()
        self.service.start()
        self._front.answer(self._begin, lambda: self.service.is_healthy, self._drain_s)

    def _begin(self, call: Call) -> None:
        """Have texts classified; what becomes of them goes over the wire."""
        asked = call.asked
        assert isinstance(asked, ClassesAsked)  # the front knows what its workers do
        waiting = self.service.order(
            asked.sequences, quality=asked.quality, split_by=asked.request_id, best=asked.best
        )
        call.stop_by(lambda: [each.cancel() for each in waiting])
        for place, each in enumerate(waiting):
            each.add_done_callback(partial(_tell, call, place))

    def __del__(self) -> None:
        """Called by Ray Serve before it ends the process in order: this is no crash."""
        if front := getattr(self, "_front", None):
            front.drain(self._drain_s)
        if refresher := getattr(self, "refresher", None):
            refresher.stop()

    async def check_health(self) -> None:
        """Called by Ray Serve each second: reports; a stuck classifier gets replaced."""
        if not self.service.is_healthy:
            raise RuntimeError("the classifier makes no progress")
        await self._front.hear(self.report())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve where a pool may grow: what this worker has to do."""
        return load_of(*self.service.load, self._front.tokens)

    def report(self) -> dict[str, Any]:
        """What this worker runs, and how it is."""
        refresher = self.refresher
        running, waiting = self.service.load
        return describe_policy(
            self.worker_id, refresher.current, refresher.report, self._conditions
        ) | {
            "replica": self._replica,
            "app": self._app,
            "context": self.classifier.stack.context,
            "most_tokens": self.classifier.stack.context,
            "unreported": refresher.unreported,
            "running": running,
            "waiting": waiting,
            "tokens": self._front.tokens,
            "stale_s": refresher.stale_s,
            "trips": refresher.trips,
            "energy": energy_of(self.service.meter.totals),
            "tasks": len(asyncio.all_tasks(self._loop)),
        }

    def _conditions(self, snapshot: PolicySnapshot) -> tuple[str, str]:
        return self.classifier.under(snapshot).heads.digest, self.service.gap(snapshot)


def _tell(call: Call, place: int, done: Future[ClassifiedText]) -> None:
    if done.cancelled():
        return
    if (error := done.exception()) is not None:
        call.fail(error)
    else:
        call.answer(packed_text(call.number, place, done.result()), is_last=True)
    call.flush()
