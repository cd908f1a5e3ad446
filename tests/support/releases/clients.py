"""Clients that never pause while a channel is disturbed, and what each of their requests got."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

from swapping.streamed import StreamedRequest, replay, stream

from offramp.controller.policies.protocols import FixedExit, Policy
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.request import FULL_DEPTH, PolicySnapshot
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.service import EngineService
from offramp.worker.following.refresh import PolicyRefresher
from support.models import make_model
from support.releases.channel import Bench
from support.releases.waiting import eventually

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
PROMPTS = ((5, 6), (7, 8, 9), (11,))
"""One for each client, which asks it again and again."""


class Clients:
    """Streams of an engine that decodes under whatever a worker runs.

    Nothing is audited: policies made up for tests would trip, and go to full depth midway.
    """

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._current: Callable[[], PolicySnapshot] = lambda: FULL_DEPTH
        self._engine = AdaptiveEngine.from_pretrained(
            make_model("llama"),
            slots=2,  # fewer than clients, so that one waits
            current_policy=lambda: self._current(),
            config=EngineConfig(audit_share=0.0),
        )
        self._service = EngineService(self._engine)
        self._rounds: list[list[StreamedRequest]] = [[] for _ in PROMPTS]
        self._is_over = False

    @property
    def requests(self) -> list[StreamedRequest]:
        """Those that ended so far."""
        return [each for rounds in self._rounds for each in rounds]

    def follow(self, worker: PolicyRefresher) -> None:
        """Have requests from now on run under what a worker runs."""
        self._current = lambda: worker.current

    def generations(self) -> set[int]:
        """Releases that requests report which begin from now on: one of each client at least."""
        before = [len(rounds) for rounds in self._rounds]
        # The next to end may have begun earlier.
        assert eventually(
            lambda: all(len(r) >= n + 2 for r, n in zip(self._rounds, before, strict=True))
        )
        fresh = [rounds[n + 1] for rounds, n in zip(self._rounds, before, strict=True)]
        return {generation for each in fresh for generation in each.generations}

    @contextlib.contextmanager
    def asking(self) -> Iterator[Clients]:
        """Ask while the context is open; at its end every answer must be whole.

        Each is decoded again offline, alone, under the policy that the ledger has of the one
        release that it reports.
        """
        thread = threading.Thread(target=lambda: asyncio.run(self._ask_all()))
        # On a machine that never ran it this compiles kernels, for which nobody is to wait below.
        replay(self._engine, PROMPTS[0], FixedExit(2), "project", GREEDY)
        self._service.start()
        thread.start()
        try:
            yield self
        finally:
            self._is_over = True
            thread.join()
            self._service.stop()
        assert [each.error for each in self.requests if each.error] == []
        assert torn(self.requests, self._bench.policy_of) == []

    async def _ask_all(self) -> None:
        await asyncio.gather(*map(self._ask, PROMPTS, self._rounds))

    async def _ask(self, prompt: tuple[int, ...], rounds: list[StreamedRequest]) -> None:
        while not self._is_over:
            rounds.append(await stream(self._service, prompt, GREEDY))


class LoneClient:
    """Asks once at a time, in the caller's thread; ``requests`` are those that ended."""

    def __init__(self) -> None:
        self._engine = AdaptiveEngine.from_pretrained(make_model("llama"), slots=1)
        self.requests: list[StreamedRequest] = []

    def ask(self, worker: PolicyRefresher) -> None:
        """Have an answer under what a worker runs."""
        row = replay(self._engine, PROMPTS[0], worker.current, "project", GREEDY)
        self.requests.append(
            StreamedRequest(
                prompt=PROMPTS[0],
                generation=worker.current.generation,
                tokens=row.emitted,
                generations={*row.generations},
            )
        )


def torn(
    requests: list[StreamedRequest], policy_of: Callable[[int], Policy]
) -> list[StreamedRequest]:
    """Those whose tokens differ from a replay, or that more than one release decided."""
    alone = AdaptiveEngine.from_pretrained(make_model("llama"), slots=1)
    expected: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for each in requests:
        place = (each.prompt, each.generation)
        if place not in expected:
            policy = policy_of(each.generation)
            expected[place] = replay(alone, each.prompt, policy, each.kv_mode, GREEDY).emitted
    return [
        each
        for each in requests
        if each.tokens != expected[each.prompt, each.generation]
        or each.generations != {each.generation}
    ]
