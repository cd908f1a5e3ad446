"""The seam between the routes and what decodes behind them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from offramp.controller.errors import DecodeFailedError
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import PromptEncoder
from offramp.worker.engine.service import EngineService

Tokens = list[tuple[int, TokenEvent]]
"""Events that came together, each with the index of the choice that it belongs to."""


class Direct:
    """A way for tokens past whoever waits for them, from the second on.

    To wake the task that answers, through all that surrounds a route, costs as much as to send.

    Attributes:
        told: Is told what went this way.
        write: Sends tokens at once, and says whether it could; None while none may go this way.
    """

    def __init__(self) -> None:
        self.told: Callable[[Tokens], object] = lambda _: None
        self.write: Callable[[Tokens], bool] | None = None

    def take(self, tokens: Tokens) -> bool:
        """Send tokens, unless they have to be waited for; returns whether they were sent."""
        if self.write is None or not self.write(tokens):
            return False
        self.told(tokens)
        return True


class WorkerLostError(DecodeFailedError):
    """The worker of a request died, or froze."""


class Pool(Protocol):
    """What all routes need of what answers behind them.

    Attributes:
        model_id: Name that clients ask for.
        clients: Tells clients by their keys.
        started_at: Unix time, seconds.
        layers: Layers of the model.
        tokenizer: The model's.
        encoder: Encodes prompts with it.
        most_tokens: Most tokens of a request, those of its prompt included.
    """

    model_id: str
    clients: ClientKeys
    started_at: int
    layers: int

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        ...

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes prompts with it."""
        ...

    @property
    def most_tokens(self) -> int:
        """Most tokens of a request, those of its prompt included."""
        ...

    def trouble(self) -> str | None:
        """Why it can make no tokens now, such as "stuck"; None if nothing is known against it."""
        ...

    def load(self) -> tuple[int, int]:
        """Requests under way, running or waiting, and how many may be."""
        ...

    def reports(self) -> Sequence[dict[str, Any]]:
        """What each worker said of itself last, the latest at the end."""
        ...


class Backend(Pool, Protocol):
    """What the routes need that make tokens."""

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
        """Queue ``sampling.n`` requests per prompt, in order.

        While a canary runs, the id decides which policy all of them run under. What is kept of
        prompts is shared by requests with the same salt. Tokens that come while the iterator is
        waited for may go the direct way instead, but for those that end a request.

        Returns:
            Their events as they come, with the indices of their requests. An async generator;
            closing it gives them up.

        Raises:
            RequestError: they cannot be served.
            OverloadedError: there is no room for them.
            DecodeFailedError: nobody decodes any more.
        """
        ...


class ClassBackend(Pool, Protocol):
    """What the route needs that classifies.

    Attributes:
        labels: Names of the classes.
    """

    labels: tuple[str, ...]

    async def classify(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        quality: float | None,
        request_id: str,
        best: int | None = None,
    ) -> list[ClassifiedText]:
        """Classify texts, all of them under one policy, or find the best of them.

        Args:
            sequences: Token ids of each.
            quality: 1 minus the loss that the policy's certificate must bound, else full depth
                decides; None asks for nothing.
            request_id: Decides which policy, while a canary runs.
            best: Class of which the likeliest text is sought, without a policy; None: no one's.

        Raises:
            RequestError: they cannot be classified.
            OverloadedError: there is no room for them.
            DecodeFailedError: nobody classifies any more.
        """
        ...


class Embedded(Protocol):
    """The least that can be served: an engine's service, and what clients are to call its model.

    A further attribute ``api_key``, if there is one that is not None, is asked of clients.

    Attributes:
        model_id: Name that clients ask for.
        service: Decodes; it has been started.
    """

    model_id: str
    service: EngineService


class EngineBackend:
    """What decodes in this very process, without Ray or Redis: for apps that embed the routes.

    Args:
        model_id: Name that clients ask for.
        service: Decodes; start it before the first request.
        clients: Tells clients by their keys; by default no key is asked for.
    """

    def __init__(
        self, model_id: str, service: EngineService, clients: ClientKeys | None = None
    ) -> None:
        self.model_id = model_id
        self.service = service
        self.clients = clients or ClientKeys()
        self.started_at = int(time.time())
        self.layers: int = service.engine.stack.layers

    @classmethod
    def of(cls, embedded: Embedded) -> EngineBackend:
        """Serve what has a service."""
        keys = ClientKeys(shared=getattr(embedded, "api_key", None))
        return cls(embedded.model_id, embedded.service, keys)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.service.engine.tokenizer

    @property
    def encoder(self) -> PromptEncoder:
        """Encodes prompts with it."""
        return self.service.engine.encoder

    @property
    def most_tokens(self) -> int:
        """Most tokens of a request, those of its prompt included."""
        engine = self.service.engine
        return min(engine.stack.context, engine.row_tokens)

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
        requests, events = await self.service.submit_all(
            prompts,
            sampling,
            kv_mode=kv_mode,
            prefill=prefill,
            split_by=request_id,
            cache_salt=cache_salt,
        )
        return _placed({request.id: place for place, request in enumerate(requests)}, events)

    def trouble(self) -> str | None:
        """Why it can make no tokens now."""
        return None if self.service.is_healthy else "stuck"

    def load(self) -> tuple[int, int]:
        """Requests under way, and how many may be."""
        engine = self.service.engine
        return sum(engine.load), engine.kv.slots + self.service.max_waiting

    def reports(self) -> list[dict[str, Any]]:
        """What the engine runs, in the words of a pool's workers."""
        snapshot = self.service.engine.current_policy()
        running, waiting = self.service.engine.load
        tally = snapshot.watch.tally if snapshot.watch else None
        return [
            {
                "worker": "worker-0",
                "running": running,
                "waiting": waiting,
                "generation": snapshot.generation,
                "digest": snapshot.digest,
                "guarantee": snapshot.guarantee,
                "state": "ACK",
                "audited": tally.audited if tally else 0,
                "disagreed": tally.disagreed if tally else 0,
                **dict.fromkeys(
                    ("stale_s", "trips", "kept", "moved", "point", "moves", "tasks", "tokens"), 0
                ),
            }
        ]


async def _placed(
    places: dict[str, int], events: AsyncIterator[TokenEvent]
) -> AsyncIterator[Tokens]:
    async with aclosing(events):  # type: ignore[type-var]  # async generators have aclose
        async for event in events:
            yield [(places[event.request_id], event)]
