"""Who runs and who waits: rows occupy the first slots of the cache, without holes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from offramp.controller.errors import DecodeFailedError
from offramp.worker.decoding.request import Request
from offramp.worker.decoding.sampler import Sampler
from offramp.worker.decoding.schedule import Launch
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.stack import LayerStack


def failure_of(error: Exception) -> DecodeFailedError:
    """What the caller of a request is told of the error that ended it."""
    if isinstance(error, DecodeFailedError):  # it says more by itself
        return error
    failure = DecodeFailedError("the request failed while it was decoded")
    failure.__cause__ = error
    return failure


class Roster:
    """Requests in line, and rows in slots.

    Args:
        kv: The cache whose slots are given out.
        stack: The model, as a stack of layers.

    Attributes:
        on_end: Are told of each row that ended by itself, and did not fail, before its slot is
            free.
    """

    def __init__(self, kv: SlotKV, stack: LayerStack) -> None:
        self.kv = kv
        self.stack = stack
        self.on_end: list[Callable[[Sequence], object]] = []
        self.waiting: deque[Request] = deque()
        self.rows: list[Sequence] = []

    def admit(self) -> dict[str, DecodeFailedError]:
        """Seat waiting requests while there are slots, first come, first served.

        Returns:
            What requests failed with that cannot be seated, by id.
        """
        failed: dict[str, DecodeFailedError] = {}
        while self.waiting and len(self.rows) < self.kv.slots:
            request = self.waiting.popleft()
            try:
                self.rows.append(self._seated(request))
            except Exception as error:  # the policies that it looks into are a caller's code
                failed[request.id] = failure_of(error)
        return failed

    def _seated(self, request: Request) -> Sequence:
        stack = self.stack
        sampler = request.sampler or Sampler(
            request.sampling, request.prompt, stack.eos_tokens, stack.vocab
        )
        return Sequence(request, len(self.rows), sampler)

    def holds(self, request_id: str) -> bool:
        """Whether a request runs or waits."""
        everybody = (*self.waiting, *(row.request for row in self.rows))
        return any(request.id == request_id for request in everybody)

    @property
    def served(self) -> tuple[int, int]:
        """Rows running, requests waiting, but for shadows, for which nobody waits."""
        running = sum(not row.request.is_shadow for row in self.rows)
        return running, sum(not request.is_shadow for request in self.waiting)

    def standing(self) -> dict[int, list[Sequence]]:
        """Rows that can go on, by the depth at which they stand."""
        standing: dict[int, list[Sequence]] = {}
        for row in self.rows:
            if row.is_prefilled:
                standing.setdefault(row.depth, []).append(row)
        return standing

    def catch_up(self, launch: Launch[Sequence]) -> list[Sequence]:
        """Rows whose pending tokens all stand within a stage that runs to the end."""
        if launch.first == 0 or launch.last < self.stack.layers:
            return []
        return [
            row
            for row in self.rows
            if row.open
            and not (row.projects or row.undecided)
            and row.open[-1].depth >= launch.first
        ]

    def remove(self, request_id: str) -> None:
        """Forget a request, running or waiting."""
        self.waiting = deque(r for r in self.waiting if r.id != request_id)
        for row in [row for row in self.rows if row.request.id == request_id]:
            self.vacate(row)

    def vacate(self, row: Sequence) -> None:
        """Free a row's slot; the last row moves into the hole."""
        if row.is_finished and row.error is None:
            for tell in self.on_end:
                tell(row)
        row.last_group = None  # which names the row again: a cycle would await garbage collection
        last = self.rows.pop()
        self.kv.clear(row.slot)
        if last is not row:
            self.rows[row.slot] = last
            self.kv.move(last.slot, row.slot, last.entries)
            self.kv.clear(last.slot)
            last.slot = row.slot
