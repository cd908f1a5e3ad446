"""An engine in this process as what decodes behind the routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from offramp.worker.decoding.request import KVMode, TokenEvent
from offramp.worker.decoding.sampling import SamplingParams
from offramp.worker.engine.encoding import PromptEncoder
from offramp.worker.engine.service import EngineService


class EngineBackend:
    """What the routes need, but for the names and the policy's report.

    Args:
        service: Runs the engine.
    """

    def __init__(self, service: EngineService) -> None:
        self.service = service

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
        kv_mode: KVMode | None,
        request_id: str,
    ) -> tuple[list[str], AsyncIterator[TokenEvent]]:
        """Queue requests; see ``Backend``."""
        requests, events = await self.service.submit_all(
            prompts, sampling, kv_mode=kv_mode, split_by=request_id
        )
        return [request.id for request in requests], events

    def trouble(self) -> str | None:
        """Why it can make no tokens now."""
        return None if self.service.is_healthy else "stuck"

    def waiting(self) -> tuple[int, int]:
        """Requests that wait for a slot, and how many may."""
        return self.service.engine.load[1], self.service.max_waiting
