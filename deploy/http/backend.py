"""The seam between the routes and what decodes behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from offramp.worker.decoding.request import KVMode, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import PromptEncoder


class Backend(Protocol):
    """What the routes need of what decodes.

    Attributes:
        model_id: Name that clients ask for.
        api_key: What clients must present; None asks for none.
        started_at: Unix time, seconds.
        tokenizer: The model's.
        encoder: Encodes prompts with it.
        most_tokens: Most tokens of a request, those of its prompt included.
    """

    model_id: str
    api_key: str | None
    started_at: int

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
        kv_mode: KVMode | None,
        request_id: str,
    ) -> tuple[list[str], AsyncIterator[TokenEvent]]:
        """Queue ``sampling.n`` requests per prompt, in order.

        While a canary runs, the id decides which policy all of them run under.

        Returns:
            The requests' ids, and their events as they come; closing the iterator gives them up.

        Raises:
            RequestError: they cannot be served.
            OverloadedError: there is no room for them.
            DecodeFailedError: nobody decodes any more.
        """
        ...

    def trouble(self) -> str | None:
        """Why it can make no tokens now, such as "stuck"; None if nothing is known against it."""
        ...

    def waiting(self) -> tuple[int, int]:
        """Requests that wait for a slot, and how many may."""
        ...

    async def policy_report(self) -> dict[str, Any]:
        """The running policy and the state of its refresh."""
        ...
