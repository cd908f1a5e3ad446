"""The engine as scripts use it: whole completions, or a stream of tokens."""

from __future__ import annotations

import itertools
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offramp.controller.policies.protocols import Policy
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import (
    FULL_DEPTH,
    CompletionStats,
    FinishReason,
    KVWish,
    PolicySnapshot,
    Request,
    TokenEvent,
    TopLogprobs,
)
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.admission import require_mode
from offramp.worker.engine.core import EngineCore
from offramp.worker.engine.encoding import Prompt, as_prompts, prompt_text
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.points import Asked, pinned
from offramp.worker.model.adapter_layers import ExitAdapters
from offramp.worker.model.loading import load_model, load_tokenizer, parse_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What ``generate`` returns per prompt.

    Attributes:
        text: Decoded tokens, special ones left out; up to a stop string. With echo, behind the
            prompt's text.
        token_ids: Emitted tokens, the one that ended it included.
        exit_layers: Layers executed for each of them.
        finish_reason: "stop" at an end-of-sequence token, a stop token or a stop string, "length"
            at max_tokens.
        stats: What it cost.
        index: Which of the prompt's ``n`` completions, from 0.
        logprobs: Log-probability of each token at the layer it left from, under the logits as the
            model gave them; None if not asked for.
        top_logprobs: Per token, the most likely tokens there, best first; None if not asked for.
    """

    text: str
    token_ids: list[int]
    exit_layers: list[int]
    finish_reason: FinishReason
    stats: CompletionStats
    index: int = 0
    logprobs: list[float] | None = None
    top_logprobs: list[TopLogprobs] | None = None


def mean_layer(exit_layers: Items[int]) -> float:
    """Mean of the layers executed; 0 for no tokens."""
    return sum(exit_layers) / len(exit_layers) if exit_layers else 0.0


def completion_of(
    request: Request, events: Items[TokenEvent], *, index: int = 0, prefix: str = ""
) -> Completion:
    """The completion of a request whose events have all come.

    Args:
        request: Request that was answered.
        events: Events of all its tokens, in order.
        index: Which of the prompt's completions it is.
        prefix: What its text is put behind.
    """
    layers = [event.exit_layer for event in events]
    finish_reason, stats = events[-1].finish_reason, events[-1].stats
    assert finish_reason is not None
    assert stats is not None
    reports = request.sampling.logprobs is not None
    return Completion(
        text=prefix + "".join(event.text for event in events),
        token_ids=[event.token for event in events],
        exit_layers=layers,
        finish_reason=finish_reason,
        stats=stats,
        index=index,
        logprobs=[e.logprob for e in events if e.logprob is not None] if reports else None,
        top_logprobs=[e.top_logprobs for e in events] if reports else None,
    )


class AdaptiveEngine(EngineCore):
    """Early-exit decoding of a Hugging Face causal LM.

    One thread drives it: scripts by ``generate`` and ``stream``, a server by ``submit``,
    ``step`` and ``cancel``. Arguments and errors are those of the core.
    """

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
            slots, current_policy, config: Passed on to the class.

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
        policy: Asked = None,
        *,
        kv_mode: KVWish | None = None,
        prefill: Prefill | None = None,
        echo: bool = False,
    ) -> list[Completion]:
        """Complete some prompts together: ``sampling.n`` completions per prompt, in order.

        Args:
            prompts: Strings or lists of token ids; one prompt alone is allowed.
            sampling: For all of them; greedy, 64 tokens by default.
            policy: For all of them; the engine's current one by default. Of a ``PolicyBundle`` it
                is checked that it was made for this model; its certificate counts, drafters verify.
            kv_mode, prefill: For all of them; the engine's own by default.
            echo: Put the prompt's text before the completion's.

        Raises:
            RequestError: a prompt, sampling value or policy that cannot be served.
            DecodeFailedError: a completion failed while it was decoded; the others are given up.
        """
        samples = (sampling or SamplingParams()).each()
        prompts = as_prompts(prompts)
        requests = self._submit_all(prompts, samples, policy, kv_mode, prefill)
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
        policy: Asked = None,
        *,
        kv_mode: KVWish | None = None,
        prefill: Prefill | None = None,
    ) -> Generator[TokenEvent, None, None]:
        """Complete one prompt, yielding each token as it is emitted.

        Closing the iterator early frees its slot. Raises as ``generate`` does.
        """
        samples = [sampling or SamplingParams()]
        [request] = self._submit_all([prompt], samples, policy, kv_mode, prefill)
        try:
            yield from self._await(request)
        finally:
            self.cancel(request.id)

    def follow(self, requests: Items[Request]) -> Iterator[TokenEvent]:
        """Step until requests that were just submitted have ended; their events as they come.

        One that is cancelled in between has no further events.
        """
        self._inboxes.update((request.id, deque()) for request in requests)
        while following := [each.id for each in requests if each.id in self._inboxes]:
            self._pump()
            for request_id in following:
                while inbox := self._inboxes.get(request_id):
                    event = inbox.popleft()
                    if event.finish_reason is not None:
                        del self._inboxes[request_id]
                    yield event
                if request_id in self.failed:
                    del self._inboxes[request_id]
                    raise self.failed.pop(request_id)

    def prepare(self, policy: Policy, adapters: ExitAdapters | None = None) -> None:
        """Compute now, in any thread, what a policy's probes would compute on their first use.

        Args:
            policy: One that requests are to run under.
            adapters: What its exits are to be read through; None: the engine's own.

        Raises:
            RequestError: it leaves on a copy of the layers that this engine does not have, counts
                other drafts than may pend, or does not go with the engine's cache mode.
        """
        self.config.require_drafts(policy)
        layers = (adapters or self.decoder.translators).layers
        if layers:
            require_mode(self.config.kv_mode, (), policy, layers)
        self.decoder.prepare(policy)

    def take_in(self, folder: str | Path) -> ExitAdapters:
        """Take in adapters that ``offramp tune`` wrote, from any thread, while requests run.

        They join between two steps. Requests under way keep those that they began with; a
        ``PolicySnapshot`` that names the new ones is read through them.

        Raises:
            ConfigError: they are damaged or another model's, or the cache's budget is too small.
        """
        adapters = self.adapters.take_in(Path(folder))
        self.row_tokens = self.config.row_tokens(self.stack.context, self.kv.bytes_per_token)
        return adapters

    def tell_ends(self, to: Callable[[Sequence], object]) -> None:
        """Have someone told, within the step, of each request that ends by itself; not to raise."""
        self._roster.on_end.append(to)

    def step(self, finished: dict[str, Sequence] | None = None) -> list[TokenEvent]:
        """See the core; adapters that are to join wait for its end."""
        with self.adapters.turn:
            return super().step(finished)

    def cancel(self, request_id: str) -> None:
        """Forget a request, running or waiting; its slot is free at the next step."""
        super().cancel(request_id)
        self._inboxes.pop(request_id, None)

    def _submit_all(
        self,
        prompts: list[Prompt],
        samples: Items[SamplingParams],
        policy: Asked,
        kv_mode: KVWish | None,
        prefill: Prefill | None,
    ) -> list[Request]:
        """All of the prompts, each with all of the samples, or, if one is refused, none."""
        requests: list[Request] = []
        # One for all of them: what one call returns is comparable.
        current = partial(self._track, uuid.uuid4().hex)
        policy = pinned(policy, current, self.stack, self._loaded)
        encoded = [self.encoder.encode(prompt) for prompt in prompts]
        try:
            for prompt, sampling in itertools.product(encoded, samples):
                request = self.submit(prompt, sampling, policy, kv_mode=kv_mode, prefill=prefill)
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
            if request.id in self.failed:
                raise self.failed.pop(request.id)
            self._pump()

    def _pump(self) -> None:
        for event in self.step():
            if event.request_id in self._inboxes:
                self._inboxes[event.request_id].append(event)
