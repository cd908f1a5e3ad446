"""The core of the engine: requests join and leave between launches, each under its pinned policy.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import partial
from typing import Any

from offramp.controller.errors import ConfigError, DecodeFailedError
from offramp.controller.release.certified_points import Target
from offramp.worker.decoding.asking.outlook import Load
from offramp.worker.decoding.decoder import Decoder
from offramp.worker.decoding.emit import Emitter
from offramp.worker.decoding.pricing import DraftingPrice
from offramp.worker.decoding.prompting.prompt_exits import Prefill, promise_of
from offramp.worker.decoding.request import FULL_DEPTH, KVWish, PolicySnapshot, Request, TokenEvent
from offramp.worker.decoding.sampler import Sampler
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.decoding.schedule import Launch, Schedule, Scheduler
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.admission import AuditPicker, require_mode, require_request, sampling_of
from offramp.worker.engine.encoding import Prompt, PromptEncoder
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.outbox import Outbox
from offramp.worker.engine.points import Asked, Loaded, PointPicker, pinned
from offramp.worker.engine.prompts import PromptReader
from offramp.worker.engine.roster import Roster, failure_of
from offramp.worker.model.adapter_layers import load_exits
from offramp.worker.model.families import stack_for
from offramp.worker.model.joining import AdapterSets
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.loading import model_fingerprint, require_supported, tokenizer_fingerprint
from offramp.worker.model.prepared import prepare
from offramp.worker.model.quantised import quantise


class EngineCore:
    """Early-exit decoding of a Hugging Face causal LM, launch by launch, driven by one thread.

    Args:
        model: A supported ``*ForCausalLM`` in evaluation mode.
        tokenizer: Its tokenizer; None if prompts and completions are token ids only.
        slots: Rows decoded together at most; the rest wait in line.
        current_policy: Asked at each admission for the policy to pin; full depth by default.
        config: How rows share the machine.

    Attributes:
        failed: What requests failed with, by id, until it is taken or they are cancelled.

    Raises:
        ModelError: the architecture is unsupported.
        ConfigError: fewer than one slot, or a setting or translators that do not fit the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        slots: int = 8,
        current_policy: Callable[[], PolicySnapshot] = lambda: FULL_DEPTH,
        config: EngineConfig | None = None,
    ) -> None:
        require_supported(model)
        if not isinstance(slots, int) or slots < 1:
            raise ConfigError("slots", f"{slots!r} is no integer from 1 on", "Ask for 1 or more")
        self.model = model
        self.config = config or EngineConfig()
        precision, drafts = self.config.precision, self.config.draft_precision
        ready = partial(prepare, cuda_graphs=self.config.cuda_graphs)
        self.model_fingerprint = precision.fingerprint(model_fingerprint(model))
        stack = quantise(stack_for(model), precision)
        exits = load_exits(self.config.translators, stack, self.model_fingerprint)
        self.config.require_model(self.model_fingerprint, stack.layers, exits.digest)
        self.stack = ready(stack)
        self.tokenizer = tokenizer
        self.encoder = PromptEncoder(tokenizer, self.stack.context)
        self.kv = SlotKV(self.stack, slots)
        self.row_tokens = self.config.row_tokens(self.stack.context, self.kv.bytes_per_token)
        self.decoder = Decoder(
            self.stack,
            self.kv,
            max_pending=self.config.max_pending,
            translators=exits,
            copy=None if drafts is None else ready(quantise(stack_for(model), drafts)),
        )
        sizes = (self.model_fingerprint, exits, self.config.row_tokens)
        self.adapters = AdapterSets(self.stack, self.kv, *sizes)
        self.current_policy = current_policy
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer) if tokenizer else ""
        self._loaded = Loaded(self.model_fingerprint, self.tokenizer_fingerprint, exits.digest)
        self._roster, self._outbox = Roster(self.kv, self.stack), Outbox(tokenizer, self.kv)
        self._scheduler = self._schedule(self.config.schedule)
        self._emitter = Emitter(self.stack, self.decoder.guard)
        self._prompts = PromptReader(self.decoder, self._emitter, self.config)
        self._audits = AuditPicker(self.config.audit_share)
        self._points = PointPicker(self.config.schedule.costs, self.config.kv_mode, stack.dtype)
        self.failed: dict[str, DecodeFailedError] = {}
        self._ids = itertools.count()
        # Events that nobody has taken yet, by request: only whoever follows requests has any.
        self._inboxes: dict[str, deque[TokenEvent]] = {}

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        policy: Asked = None,
        *,
        kv_mode: KVWish | None = None,
        prefill: Prefill | None = None,
        forced: Items[int] = (),
        sampler: Sampler | None = None,
        split_by: str | None = None,
        cache_salt: str = "",
    ) -> Request:
        """Queue a request and pin its policy.

        Args:
            prompt: A string or token ids.
            sampling: How to draw tokens; greedy, 64 tokens by default.
            policy: A policy, a bundle or a release; the engine's current one by default.
            kv_mode: See ``KVWish``; the engine's own mode by default.
            prefill: How the prompt is read; see ``EngineConfig.prefill`` for the default.
            forced: Teacher forcing: these tokens are fed in place of as many emitted ones.
            sampler: Draws this request's tokens, in place of one made from ``sampling``.
            split_by: Decides between current policy and canary; None: the request's own id does.
            cache_salt: Beginnings of prompts are shared among requests with the same one.

        Raises:
            RequestError: a prompt, sampling value, mode or policy that cannot be served.
        """
        tokens = self.encoder.encode(prompt)
        sampling = sampling_of(sampling, forced)
        require_request(tokens, forced, sampling, self.stack, self.tokenizer, self.row_tokens)
        request_id = f"r{next(self._ids)}"
        track = partial(self._track, split_by or request_id)
        snapshot = pinned(policy, track, self.stack, self._loaded)
        adapters = self.decoder.reader.under(snapshot)
        is_bound = isinstance(kv_mode, float | Target)
        if isinstance(kv_mode, Target):
            snapshot, kv_mode = self._points.pick(snapshot, kv_mode, adapters.digest), None
        mode = snapshot.mode(kv_mode, self.config.kv_mode, self.stack.dtype, adapters.digest)
        require_mode(mode, forced, snapshot.policy, adapters.layers)
        self.config.require_drafts(snapshot.policy, mode)
        promise = promise_of(mode, sampling, is_bound=is_bound)
        adapted = adapters.layers.keys() & {*snapshot.policy.exits}
        audited = self._audits.picks(snapshot, mode, forced)
        request = Request(
            id=request_id,
            prompt=tokens,
            sampling=sampling,
            snapshot=snapshot,
            kv_mode="defer" if audited else mode,
            forced=tuple(forced),
            sampler=sampler,
            audited=audited,
            cache_salt=cache_salt,
            prompts=self.config.prompts_of(prefill, promise=promise, adapted=adapted),
        )
        self._roster.waiting.append(request)
        return request

    def step(self, finished: dict[str, Sequence] | None = None) -> list[TokenEvent]:
        """Admit what fits, read some of its prompts, and launch the rows that are due.

        Between two launches at most ``config.prefill_tokens`` prompt tokens are read. A request
        that fails by itself ends without a further event; ``failed`` says with what.

        Args:
            finished: Takes the sequences that ended in this step, by request id.

        Raises:
            DecodeFailedError: with ``finished``, a request failed.
        """
        # Chosen before prompts are read: a row whose prompt ends in this step goes on in the next.
        launches = self._launches()
        self.failed |= self._roster.admit()
        self.decoder.observe(Load(*self.load, self.kv.slots))
        emitted = {row: len(row.emitted) for row in self._roster.rows}
        self._prompts.read(self._roster.rows)
        self._run(launches)
        events = self._outbox.collect(emitted)
        self._release({} if finished is None else finished)
        if finished is not None and self.failed:
            raise self.failed.popitem()[1]
        return events

    def cancel(self, request_id: str) -> None:
        """Forget a request, running or waiting; its slot is free at the next step."""
        self._roster.remove(request_id)
        self._outbox.forget(request_id)
        self.failed.pop(request_id, None)

    def set_schedule(self, schedule: Schedule) -> None:
        """Change how rows share launches.

        Raises:
            ConfigError: rows are running, a hold is not below the last layer, or costs are not
                this model's, of fewer rows than there are slots, or none of the copy.
        """
        if self._roster.rows:
            raise ConfigError("schedule", "cannot change while requests run", "Wait for their end")
        self._scheduler = self._schedule(schedule)

    def _track(self, request_id: str) -> PolicySnapshot:
        return self.current_policy().track(request_id)

    def _schedule(self, schedule: Schedule) -> Scheduler[Sequence]:
        costs, price = schedule.costs, None
        if costs is not None:
            costs.require_model(self.model_fingerprint)
            self.config.require_prices(costs, self.kv.slots)
            price = DraftingPrice(costs, self.config.max_pending)
        return Scheduler(schedule, self.stack.layers, price)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The rows in slots."""
        return tuple(self._roster.rows)

    @property
    def load(self) -> tuple[int, int]:
        """Rows running, requests waiting; shadows, for which nobody waits, are not counted."""
        return self._roster.served

    def is_under_way(self, request_id: str) -> bool:
        """Whether a request runs or waits."""
        return self._roster.holds(request_id)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self._roster.rows or self._roster.waiting)

    @property
    def is_prefilling(self) -> bool:
        """Whether some prompt is still to be read."""
        return bool(self._roster.waiting) or any(not r.is_prefilled for r in self._roster.rows)

    def _launches(self) -> list[Launch[Sequence]]:
        """What runs now: the stages that are due, and then the next tokens of all other rows.

        They share one LM head, which costs as much for few rows as for many.
        """
        standing = self._roster.standing()
        launches: list[Launch[Sequence]] = []
        while not launches or (launches[-1].first > 0 and 0 in standing):
            launch = self._scheduler.next(standing)
            if launch is None:
                break
            standing.pop(launch.first)
            launches.append(launch)
        return launches

    def _run(self, launches: list[Launch[Sequence]]) -> None:
        rows = [row for launch in launches for row in (*launch.members, *launch.later)]
        if not rows:
            return
        # Once, for all launches: growing copies the whole cache.
        self.kv.reserve(1 + max(row.position for row in rows))
        waves = []
        judged: set[Sequence] = set()
        for launch in launches:
            catch_up = [*launch.later, *self._roster.catch_up(launch)]
            # What full depth says of a catch-up row's drafts decides what its next token is.
            judged |= {row for row in catch_up if row.drafts}
            if judged:
                members = tuple(row for row in launch.members if row not in judged)
                launch = replace(launch, members=members)
            if launch.members or launch.later:
                waves.append((launch, catch_up))
        start = time.perf_counter()
        self._emitter.conclude(self.decoder.launch(waves))
        self._scheduler.took(time.perf_counter() - start)

    def _release(self, finished: dict[str, Sequence]) -> None:
        for row in [row for row in self._roster.rows if row.is_finished]:
            if row.error is None:
                finished[row.request.id] = row
            else:
                self.failed[row.request.id] = failure_of(row.error)
            self._roster.vacate(row)
            self._outbox.forget(row.request.id)
