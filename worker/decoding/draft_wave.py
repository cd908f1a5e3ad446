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

from offramp.controller.policies.exits import is_on_copy
from offramp.worker.decoding.asking.grouping import RowGrouper
from offramp.worker.decoding.open_token import OpenToken
from offramp.worker.decoding.sequence import RowGroup, Sequence
from offramp.worker.decoding.wave_context import Arrival, DraftCopy, Known, WaveContext, sent
from offramp.worker.model.attention import decode_window
from offramp.worker.model.filling.cache_filler import ExitedToken
from offramp.worker.model.kv import PENDING
from offramp.worker.model.transfers import take


class DraftWave:
    """Runs each row's newest token on the copy, until its policy lets it leave or gives up.

    Other rows are left standing at depth 0, and the model's own layers take them on: to the exit
    there that their policy sent them to, or, if it gave up, to the end, verifying what is pending.

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
        self._begun = self.rows
        self.groups = self._ask_first(copy.grouper)
        self._place()

    def run(self) -> list[Arrival]:
        """Draft, and give what left."""
        exits = {layer for group in self.groups for layer in group.exits if is_on_copy(layer)}
        self._drop_unasked(0)
        self._fill_pending()
        index = 0
        for stop in sorted(exits):
            if not self.rows:
                break
            self._x_N1D = self.stack.run_layers(
                index, int(stop), self._x_N1D, self._rotary, self._window, self.context.kv
            )
            for row in self.rows:
                row.copy_calls += stop - index
            self._ask(stop)
            self._drop_unasked(stop)
            index = int(stop)
        self._hand_over()
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
        for group in self.groups:
            asked, before = group.asked_at(executed), len(group.rows)
            if not asked:
                continue
            x_N1D = self._x_N1D
            if asked != self.rows:
                x_N1D = take(x_N1D, [self.rows.index(row) for row in asked])
            left = group.ask(self.context.guard, executed, x_N1D)
            if len(group.rows) + len(left.rows) < before:
                self.context.overhead.failures += sum(row.policy_failed for row in asked)
            for n, row in enumerate(left.rows):
                logits_V = None if left.logits_NV is None else left.logits_NV[n]
                token = left.tokens[n] if left.tokens else None
                leaving.append((self.rows.index(row), Known(logits_V, token)))
        self.context.overhead.deciding_s += time.perf_counter() - start
        for n, known in sorted(leaving, key=lambda each: each[0]):
            self._leave(self.rows[n], executed, self._x_N1D[n], known)
        if executed < self.stack.layers:
            self._fill(
                [
                    self.context.reader.exited(row, row.open[-1], int(executed), self._x_N1D[n, 0])
                    for n, row in ((n, self.rows[n]) for n, _ in leaving)
                ]
            )
        gone = {n for n, _ in leaving}
        self._keep([n for n in range(len(self.rows)) if n not in gone])

    def _leave(self, row: Sequence, executed: int, state_1D: Tensor, known: Known) -> None:
        row.open[-1].is_filled = True
        row.note_exit(executed, self.stack.layers)
        self.arrivals.append(
            Arrival(row, executed, state_1D, True, *known, drafted=True, on_copy=True)
        )

    def _fill_pending(self) -> None:
        """Project what drafts will read here of tokens that left in the model's own layers."""
        pending = [(row, token) for row in self.rows for token in row.open[:-1]]
        missing = [(row, token) for row, token in pending if not token.is_filled]
        if not missing:
            return
        self._fill(
            [
                self.context.reader.exited(row, token, token.depth, token.state_D)
                for row, token in missing
                if token.state_D is not None
            ]
        )
        for _, token in missing:
            token.is_filled = True

    def _fill(self, tokens: Rows[ExitedToken]) -> None:
        """Project what later drafts will read of tokens that left: a draft may be approximate."""
        start = time.perf_counter()
        self.context.filler.fill(tokens)
        self.context.overhead.filling_s += time.perf_counter() - start

    def _drop_unasked(self, executed: int) -> None:
        """Keep the rows that will be asked at a deeper exit here."""
        asked = {
            id(row)
            for group in self.groups
            for row in group.rows
            if any(is_on_copy(layer) and layer > executed for layer in group.exits_of(row))
        }
        self._keep([n for n, row in enumerate(self.rows) if id(row) in asked])

    def _hand_over(self) -> None:
        """Let rows keep the group in which the model's own exits will ask them, if these will."""
        asked = {id(row) for g in self.groups if not is_on_copy(g.exits[-1]) for row in g.rows}
        for row in self._begun:
            if id(row) not in asked:
                row.group = None

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
