"""The seam between the routes and what decodes behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from offramp.controller.errors import DecodeFailedError
from offramp.deploy.clients.client_keys import ClientKeys
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import KVWish, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import PromptEncoder

Tokens = list[tuple[int, TokenEvent]]
"""Events that came together, each with the index of the choice that it belongs to."""


class WorkerLostError(DecodeFailedError):
    """The worker of a request died, or froze."""


class Backend(Protocol):
    """What the routes need of what decodes.

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
        """Queue ``sampling.n`` requests per prompt, in order.

        While a canary runs, the id decides which policy all of them run under. What is kept of
        prompts is shared by requests with the same salt.

        Returns:
            Their events as they come, with the indices of their requests. An async generator;
            closing it gives them up.

        Raises:
            RequestError: they cannot be served.
            OverloadedError: there is no room for them.
            DecodeFailedError: nobody decodes any more.
        """
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
