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
    pinned,
    prompt_text,
    require_request,
)
from offramp.worker.completion import Completion, completion_of
from offramp.worker.decode import Decoder
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
from offramp.worker.sampler import Sampler
from offramp.worker.sampling import SamplingParams
from offramp.worker.sequence import Request, Sequence, TokenEvent
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

    Raises:
        ModelError: the architecture is unsupported.
        ConfigError: fewer than one slot.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        slots: int = 8,
        current_policy: Callable[[], PolicySnapshot] = lambda: FULL_DEPTH,
    ) -> None:
        require_supported(model)
        if slots < 1:
            raise ConfigError("slots", f"{slots} is below 1", "Ask for 1 or more")
        self.stack = HFDecoderStack(model)
        self.tokenizer = tokenizer
        self.kv = SlotKV(self.stack, slots)
        self.decoder = Decoder(self.stack, self.kv)
        self.current_policy = current_policy
        self.model_fingerprint = model_fingerprint(model)
        self.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer) if tokenizer else ""
        self._waiting: deque[Request] = deque()
        self._running: list[Sequence] = []
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
    ) -> AdaptiveEngine:
        """Load a model folder (or wrap a loaded model) with its tokenizer.

        Args:
            path_or_model: A folder in Hugging Face format, a hub id, or a model object.
            tokenizer: Overrides the folder's; optional for a model object.
            dtype: "float32" or "bfloat16"; ignored, like device, for a model object.
            device: "cpu" or "cuda".
            slots, current_policy: As for the class.

        Raises:
            ModelError: missing folder, not a causal LM, unsupported architecture.
            ConfigError: an unknown dtype.
        """
        if not isinstance(path_or_model, str | Path):
            return cls(path_or_model, tokenizer, slots=slots, current_policy=current_policy)
        model = load_model(path_or_model, parse_dtype(dtype), device)
        tokenizer = tokenizer or load_tokenizer(path_or_model)
        return cls(model, tokenizer, slots=slots, current_policy=current_policy)

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling: SamplingParams | None = None,
        policy: ExitPolicy | PolicySnapshot | None = None,
        *,
        echo: bool = False,
    ) -> list[Completion]:
        """Complete some prompts together: ``sampling.n`` completions per prompt, in order.

        Args:
            prompts: Strings or lists of token ids; one prompt alone is allowed.
            sampling: For all of them; greedy, 64 tokens by default.
            policy: For all of them; the engine's current one by default.
            echo: Put the prompt's text before the completion's.

        Raises:
            RequestError: a prompt, sampling value or policy that cannot be served.
        """
        samples = (sampling or SamplingParams()).each()
        prompts = as_prompts(prompts)
        requests = self._submit_all(prompts, samples, policy)
        try:
            prefixes = [prompt_text(prompt, self.tokenizer) if echo else "" for prompt in prompts]
            places = itertools.product(prefixes, range(len(samples)))
            return [
                completion_of(request, list(self._await(request)), index=index, prefix=prefix)
                for request, (prefix, index) in zip(requests, places, strict=True)
            ]
        finally:
            for request in requests:
                self.cancel(request.id)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        policy: ExitPolicy | PolicySnapshot | None = None,
    ) -> Generator[TokenEvent, None, None]:
        """Complete one prompt, yielding each token as it is emitted.

        Closing the iterator early frees its slot. Raises as ``generate`` does.
        """
        [request] = self._submit_all([prompt], [sampling or SamplingParams()], policy)
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
        forced: Items[int] = (),
    ) -> Request:
        """Queue a request and pin its policy.

        Args:
            prompt: A string or token ids.
            sampling, policy: As for ``generate``.
            forced: Teacher forcing: feed these tokens in place of the emitted ones; as many
                tokens are emitted as are given.

        Raises:
            RequestError: a prompt, sampling value or policy that cannot be served.
        """
        tokens = encode_prompt(prompt, self.tokenizer)
        sampling = sampling or SamplingParams()
        if forced:
            sampling = SamplingParams(max_tokens=len(forced), ignore_eos=True)
        require_request(tokens, forced, sampling, self.stack, self.tokenizer)
        snapshot = pinned(policy, self.current_policy, self.stack)
        request = Request(
            id=f"r{next(self._ids)}",
            prompt=tokens,
            sampling=sampling,
            snapshot=snapshot,
            forced=tuple(forced),
        )
        self._waiting.append(request)
        return request

    def step(self, finished: dict[str, Sequence] | None = None) -> list[TokenEvent]:
        """Admit what fits, then advance every running row by one token.

        Args:
            finished: Takes the sequences that ended in this step, by request id.
        """
        rows = list(self._running)
        admitted = self._admit()
        if rows:
            self._advance(rows)
        events = [self._outbox.event(row) for row in (*rows, *admitted)]
        self._release(finished if finished is not None else {})
        return events

    def cancel(self, request_id: str) -> None:
        """Forget a request, running or waiting; its slot is free at the next step."""
        self._waiting = deque(r for r in self._waiting if r.id != request_id)
        for row in [row for row in self._running if row.request.id == request_id]:
            self._vacate(row)
        self._outbox.forget(request_id)
        self._inboxes.pop(request_id, None)

    def is_busy(self, request_id: str) -> bool:
        """Whether a request is running or waiting."""
        running = any(row.request.id == request_id for row in self._running)
        return running or any(request.id == request_id for request in self._waiting)

    @property
    def load(self) -> tuple[int, int]:
        """Rows running, requests waiting."""
        return len(self._running), len(self._waiting)

    def _submit_all(
        self,
        prompts: list[Prompt],
        samples: Items[SamplingParams],
        policy: ExitPolicy | PolicySnapshot | None,
    ) -> list[Request]:
        """All of the prompts, each with all of the samples, or, if one is refused, none."""
        requests: list[Request] = []
        policy = pinned(policy, self.current_policy, self.stack)
        try:
            for prompt, sampling in itertools.product(prompts, samples):
                request = self.submit(prompt, sampling, policy)
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

    def _admit(self) -> list[Sequence]:
        admitted = []
        while self._waiting and len(self._running) < self.kv.slots:
            request = self._waiting.popleft()
            stack = self.stack
            sampler = Sampler(request.sampling, request.prompt, stack.eos_tokens, stack.vocab)
            row = Sequence(request, len(self._running), sampler)
            self.kv.reserve(len(request.prompt))
            logits_V = self.decoder.prefill(request.prompt, row.slot)
            row.advance(logits_V, stack.layers, stack.eos_tokens)
            self._running.append(row)
            admitted.append(row)
        return admitted

    def _advance(self, rows: list[Sequence]) -> None:
        self.kv.reserve(1 + max(row.position for row in rows))
        result = self.decoder.step(rows)
        for index, row in enumerate(rows):
            layer = result.exit_layers[index]
            row.advance(result.logits_BV[index], layer, self.stack.eos_tokens)

    def _release(self, finished: dict[str, Sequence]) -> None:
        for row in [row for row in self._running if row.is_finished]:
            finished[row.request.id] = row
            self._vacate(row)
            self._outbox.forget(row.request.id)

    def _vacate(self, row: Sequence) -> None:
        # The last row moves into the hole, so that running rows stay the first slots.
        last = self._running.pop()
        if last is not row:
            self._running[row.slot] = last
            self.kv.move(last.slot, row.slot, last.position)
            last.slot = row.slot
