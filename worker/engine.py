"""The engine: requests join and leave between steps; each runs under its pinned policy.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import torch

from offramp.controller.errors import ConfigError
from offramp.controller.policy import ExitPolicy
from offramp.worker.admission import (
    Prompt,
    as_prompts,
    encode_prompt,
    require_context,
    require_fit,
    require_memory,
    require_mode,
    require_tokens,
)
from offramp.worker.completion import Completion, completion_of
from offramp.worker.config import EngineConfig
from offramp.worker.decode import Decoder
from offramp.worker.emit import Emitter
from offramp.worker.fast import prepare
from offramp.worker.kv import SlotKV
from offramp.worker.loading import (
    load_model,
    load_tokenizer,
    model_fingerprint,
    parse_dtype,
    require_supported,
    tokenizer_fingerprint,
)
from offramp.worker.outbox import Outbox
from offramp.worker.roster import Roster
from offramp.worker.sampling import SamplingParams
from offramp.worker.schedule import Launch, Scheduler
from offramp.worker.sequence import KVMode, Request, Sequence, TokenEvent
from offramp.worker.snapshot import FULL_DEPTH, PolicySnapshot
from offramp.worker.stack import HFDecoderStack


class AdaptiveEngine:
    """Early-exit decoding of a Hugging Face causal LM.

    One thread drives it: scripts by ``generate`` and ``stream``, a server by ``submit``,
    ``step`` and ``cancel``.

    Args:
        model: A supported ``*ForCausalLM`` in evaluation mode.
        tokenizer: Its tokenizer; None if prompts and completions are token ids only.
        slots: Rows decoded together at most; the rest wait in line.
        current_policy: Asked at each admission for the policy to pin; full depth by default.
        config: How rows share the machine.

    Raises:
        ModelError: the architecture is unsupported.
        ConfigError: fewer than one slot, or a setting that does not fit the model.
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
        if slots < 1:
            raise ConfigError("slots", f"{slots} is below 1", "Ask for 1 or more")
        self.config = config or EngineConfig()
        self.stack = prepare(HFDecoderStack(model))
        self.tokenizer = tokenizer
        self.kv = SlotKV(self.stack, slots)
        self.row_tokens = self.config.row_tokens(self.stack.context, self.kv.bytes_per_token)
        self.decoder = Decoder(self.stack, self.kv, max_pending=self.config.max_pending)
        self.current_policy = current_policy
        self.model_fingerprint = model_fingerprint(model)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer) if tokenizer else ""
        self._roster = Roster(self.kv)
        self._scheduler: Scheduler[Sequence] = Scheduler(self.config.schedule, self.stack.layers)
        self._emitter = Emitter(self.stack)
        self._outbox = Outbox(tokenizer)
        self._inboxes: dict[str, deque[TokenEvent]] = {}
        self._ids = itertools.count()

    @classmethod
    def from_pretrained(
        cls,
        path_or_model: str | Path | Any,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = torch.float32,
        device: str = "cpu",
        slots: int = 8,
        current_policy: Callable[[], PolicySnapshot] = lambda: FULL_DEPTH,
        config: EngineConfig | None = None,
    ) -> AdaptiveEngine:
        """Load a model folder (or wrap a loaded model) with its tokenizer.

        Args:
            path_or_model: A folder in Hugging Face format, a hub id, or a model object.
            tokenizer: Overrides the folder's; optional for a model object.
            dtype: "float32" or "bfloat16"; ignored, like device, for a model object.
            device: "cpu" or "cuda".
            slots, current_policy, config: As for the class.

        Raises:
            ModelError: missing folder, not a causal LM, unsupported architecture.
            ConfigError: an unknown dtype.
        """
        model = path_or_model
        if isinstance(path_or_model, str | Path):
            model = load_model(path_or_model, parse_dtype(dtype), device)
            tokenizer = tokenizer or load_tokenizer(path_or_model)
        return cls(model, tokenizer, slots=slots, current_policy=current_policy, config=config)

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling: SamplingParams | None = None,
        policy: ExitPolicy | PolicySnapshot | None = None,
        *,
        kv_mode: KVMode | None = None,
    ) -> list[Completion]:
        """Complete some prompts together: one completion per prompt, in order.

        Args:
            prompts: Strings or lists of token ids; one prompt alone is allowed.
            sampling: For all of them; greedy, 64 tokens by default.
            policy: For all of them; the engine's current one by default.
            kv_mode: For all of them; the engine's own by default.

        Raises:
            RequestError: a prompt, sampling value or policy that cannot be served.
        """
        requests = self._submit_all(as_prompts(prompts), sampling, policy, kv_mode)
        try:
            return [completion_of(request, list(self._await(request))) for request in requests]
        finally:
            for request in requests:
                self.cancel(request.id)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        policy: ExitPolicy | PolicySnapshot | None = None,
        *,
        kv_mode: KVMode | None = None,
    ) -> Generator[TokenEvent, None, None]:
        """Complete one prompt, yielding each token as it is emitted.

        Closing the iterator early frees its slot. Raises as ``generate`` does.
        """
        [request] = self._submit_all([prompt], sampling, policy, kv_mode)
        try:
            yield from self._await(request)
        finally:
            self.cancel(request.id)

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        policy: ExitPolicy | PolicySnapshot | None = None,
        *,
        kv_mode: KVMode | None = None,
        forced: Items[int] = (),
    ) -> Request:
        """Queue a request and pin its policy.

        Args:
            prompt: A string or token ids.
            sampling, policy, kv_mode: As for ``generate``.
            forced: Teacher forcing: feed these tokens in place of the emitted ones; as many
                tokens are emitted as are given.

        Raises:
            RequestError: a prompt, sampling value or policy that cannot be served.
        """
        tokens = encode_prompt(prompt, self.tokenizer)
        sampling = sampling or SamplingParams()
        if forced:
            sampling = SamplingParams(max_tokens=len(forced), ignore_eos=True)
        require_tokens("prompt", tokens, self.stack.vocab)
        require_tokens("forced", forced, self.stack.vocab)
        require_context(len(tokens), sampling.max_tokens, self.stack.context)
        require_memory(len(tokens), sampling.max_tokens, self.row_tokens)
        kv_mode = kv_mode or self.config.kv_mode
        require_mode(kv_mode, forced)
        snapshot = self._snapshot(policy)
        request = Request(
            id=f"r{next(self._ids)}",
            prompt=tokens,
            sampling=sampling,
            snapshot=snapshot,
            kv_mode=kv_mode,
            forced=tuple(forced),
        )
        self._roster.waiting.append(request)
        return request

    def step(self, finished: dict[str, Sequence] | None = None) -> list[TokenEvent]:
        """Admit what fits, read some of its prompts, and launch the rows that are due.

        Between two launches at most ``config.prefill_tokens`` prompt tokens are read, whatever
        the length of the prompts that wait.

        Args:
            finished: Takes the sequences that ended in this step, by request id.
        """
        launch = self._scheduler.next(self._roster.standing())
        self._roster.admit()
        emitted = {row: len(row.emitted) for row in self._roster.rows}
        self._prefill()
        if launch is not None:
            self._launch(launch)
        events = [
            self._outbox.event(row, index)
            for row, before in emitted.items()
            for index in range(before, len(row.emitted))
        ]
        self._release(finished if finished is not None else {})
        return events

    def cancel(self, request_id: str) -> None:
        """Forget a request, running or waiting; its slot is free at the next step."""
        self._roster.remove(request_id)
        self._outbox.forget(request_id)
        self._inboxes.pop(request_id, None)

    @property
    def load(self) -> tuple[int, int]:
        """Rows running, requests waiting."""
        return len(self._roster.rows), len(self._roster.waiting)

    @property
    def is_prefilling(self) -> bool:
        """Whether some prompt is still to be read."""
        return bool(self._roster.waiting) or any(not r.is_prefilled for r in self._roster.rows)

    def _submit_all(
        self,
        prompts: list[Prompt],
        sampling: SamplingParams | None,
        policy: ExitPolicy | PolicySnapshot | None,
        kv_mode: KVMode | None,
    ) -> list[Request]:
        """All of the prompts, or, if one is refused, none."""
        requests: list[Request] = []
        try:
            for prompt in prompts:
                request = self.submit(prompt, sampling, policy, kv_mode=kv_mode)
                requests.append(request)
                self._inboxes[request.id] = deque()
        except BaseException:
            for request in requests:
                self.cancel(request.id)
            raise
        return requests

    def _await(self, request: Request) -> Iterator[TokenEvent]:
        """One request's events; those of other requests wait in their own inboxes."""
        inbox = self._inboxes[request.id]
        while True:
            while inbox:
                event = inbox.popleft()
                yield event
                if event.finish_reason is not None:
                    return
            for event in self.step():
                if event.request_id in self._inboxes:
                    self._inboxes[event.request_id].append(event)

    def _snapshot(self, policy: ExitPolicy | PolicySnapshot | None) -> PolicySnapshot:
        if policy is None:
            return self.current_policy()
        if isinstance(policy, PolicySnapshot):
            return policy
        require_fit(policy, self.stack.layers, self.stack.vocab)
        return PolicySnapshot(0, "", policy)

    def _prefill(self) -> None:
        budget = self.config.prefill_tokens
        for row in [row for row in self._roster.rows if not row.is_prefilled]:
            tokens = min(budget, len(row.request.prompt) - row.prefilled)
            if tokens == 0:
                return
            budget -= tokens
            self.kv.reserve(row.prefilled + tokens)
            logits_V = self.decoder.prefill(row, tokens)
            if logits_V is not None:
                token = self._emitter.choose(row, logits_V, int(logits_V.argmax()))
                self._emitter.emit(row, token, self.stack.layers)

    def _launch(self, launch: Launch[Sequence]) -> None:
        self.kv.reserve(1 + max(row.position for row in launch.members))
        riders = self._riders(launch)
        self._emitter.conclude(
            self.decoder.launch(launch.members, launch.first, launch.last, riders)
        )

    def _riders(self, launch: Launch[Sequence]) -> list[Sequence]:
        """Rows whose put-off tokens all stand within a stage that runs to the end."""
        if launch.first == 0 or launch.last < self.stack.layers:
            return []
        return [
            row
            for row in self._roster.rows
            if row.open and not row.undecided and row.open[-1].depth >= launch.first
        ]

    def _release(self, finished: dict[str, Sequence]) -> None:
        for row in [row for row in self._roster.rows if row.is_finished]:
            finished[row.request.id] = row
            self._roster.vacate(row)
            self._outbox.forget(row.request.id)
