"""A draft wave: rows that draft their next token on a quantised copy of the model's layers.

What it writes to the cache is scratch: the pass that verifies starts from the embeddings of all
pending tokens and writes every layer's entries anew, so that it reads nothing of a copy's.

Shape suffixes: N rows still in the wave, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from operator import attrgetter

from torch import Tensor

from offramp.worker.decoding.grouping import RowGrouper
from offramp.worker.decoding.sequence import OpenToken, RowGroup, Sequence
from offramp.worker.decoding.wave_context import Arrival, DraftCopy, Known, WaveContext, sent
from offramp.worker.model.attention import decode_window
from offramp.worker.model.fill import ExitedToken
from offramp.worker.model.kv import PENDING
from offramp.worker.model.transfers import take


class DraftWave:
    """Runs each row's newest token on the copy, until its policy lets it leave or gives up.

    Rows that give up, before the first layer or at some exit, are left standing at depth 0, and
    full depth takes them on: it verifies what they have pending.

    Args:
        context: Model, cache and what decides.
        copy: The quantised layers and what probes them.
        rows: Rows that begin a token and may leave it pending.
    """

    def __init__(self, context: WaveContext, copy: DraftCopy, rows: Rows[Sequence]) -> None:
        self.context = context
        self.stack = copy.stack
        self.arrivals: list[Arrival] = []
        # In the order of their slots: attention then reads runs of the cache, without a gather.
        self.rows = sorted(rows, key=attrgetter("slot"))
        for row in self.rows:
            row.open.append(OpenToken(row.position, 0, None))
            row.undecided = True
            context.kv.mark(row.slot, slice(row.position, row.position + 1), PENDING)
        tokens_N1, self._places = sent(self.rows, [row.next_input for row in self.rows], self.stack)
        # The model's own: the pass that verifies begins from it, too.
        self._x_N1D = context.stack.embed(tokens_N1, self._places[1])
        for row, x_1D in zip(self.rows, self._x_N1D, strict=True):
            row.open[-1].state_D = x_1D[0]
        self._rotary = self.stack.rotary(self._x_N1D, self._places[1])
        self.groups = self._ask_first(copy.grouper)
        self._exits = {layer for group in self.groups for layer in group.exits}
        self._place()

    def run(self) -> list[Arrival]:
        """Draft, and give what left."""
        self._drop_unasked()
        index = 0
        for stop in sorted({*self._exits, self.stack.layers}):
            if not self.rows:
                break
            self._x_N1D = self.stack.run_layers(
                index, stop, self._x_N1D, self._rotary, self._window, self.context.kv
            )
            for row in self.rows:
                row.copy_calls += stop - index
            if stop in self._exits:
                self._ask(stop)
                self._drop_unasked()
            index = stop
        return self.arrivals

    def _ask_first(self, grouper: RowGrouper) -> list[RowGroup]:
        start = time.perf_counter()
        free = [n for n, row in enumerate(self.rows) if not self.context.must_go_deep(row)]
        rows = [self.rows[n] for n in free]
        x_ND = self._x_N1D[:, 0]
        states_ND = x_ND if len(free) in (0, len(x_ND)) else take(x_ND, free)
        groups = grouper.group_rows(rows, states_ND)
        self.context.overhead.failures += sum(row.policy_failed for row in rows)
        self.context.overhead.deciding_s += time.perf_counter() - start
        return groups

    def _ask(self, executed: int) -> None:
        start = time.perf_counter()
        leaving: list[tuple[int, Known]] = []
        for group in [each for each in self.groups if each.asks_at(executed)]:
            asked = group.rows
            x_N1D = self._x_N1D
            if asked != self.rows:
                x_N1D = take(x_N1D, [self.rows.index(row) for row in asked])
            left = group.ask(self.context.guard, executed, x_N1D)
            if len(group.rows) + len(left.rows) < len(asked):
                self.context.overhead.failures += sum(row.policy_failed for row in asked)
            for n, row in enumerate(left.rows):
                logits_V = None if left.logits_NV is None else left.logits_NV[n]
                leaving.append((self.rows.index(row), Known(logits_V, left.token)))
        self.context.overhead.deciding_s += time.perf_counter() - start
        for n, known in sorted(leaving, key=lambda each: each[0]):
            self._leave(self.rows[n], executed, self._x_N1D[n], known)
        if executed < self.stack.layers:
            self._fill([n for n, _ in leaving], executed)
        gone = {n for n, _ in leaving}
        self._keep([n for n in range(len(self.rows)) if n not in gone])

    def _leave(self, row: Sequence, executed: int, state_1D: Tensor, known: Known) -> None:
        row.undecided = False
        row.group = None
        row.open[-1].is_underway = False
        row.note_depth(executed / self.stack.layers)
        self.arrivals.append(
            Arrival(row, executed, state_1D, True, *known, drafted=True, on_copy=True)
        )

    def _fill(self, places: list[int], executed: int) -> None:
        """Project what later drafts will read of tokens that left: a draft may be approximate."""
        start = time.perf_counter()
        self.context.filler.fill(
            [
                ExitedToken(row.slot, row.open[-1].position, executed, self._x_N1D[n, 0])
                for n, row in ((n, self.rows[n]) for n in places)
            ]
        )
        self.context.overhead.filling_s += time.perf_counter() - start

    def _drop_unasked(self) -> None:
        """Leave rows to full depth that nobody will ask any more."""
        asked = {id(row) for group in self.groups for row in group.rows}
        stay = [n for n, row in enumerate(self.rows) if id(row) in asked]
        if len(stay) < len(self.rows):
            for row in self.rows:
                if id(row) not in asked:
                    row.group = None
            self._keep(stay)

    def _keep(self, places: list[int]) -> None:
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[n] for n in places]
        if not self.rows:
            return
        stay_N1, self._places = sent(self.rows, places, self.stack)
        self._x_N1D, *angles = (
            part.index_select(0, stay_N1[:, 0]) for part in (self._x_N1D, *self._rotary)
        )
        self._rotary = tuple(angles)
        self._place()

    def _place(self) -> None:
        slots = [row.slot for row in self.rows]
        positions = [row.open[-1].position for row in self.rows]
        self._window = decode_window(
            slots, positions, self.stack.heads_per_key, self._x_N1D, self._places
        )
        self.context.kv.open(self._window)
