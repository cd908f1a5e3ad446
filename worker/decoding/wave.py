"""A wave: rows that move through layers together, one or several tokens each.

Shape suffixes: N rows still in the wave, T columns (tokens per row, right-aligned), D width,
M tokens that came to an end, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from offramp.worker.decoding.sequence import OpenToken, RowGroup, Sequence
from offramp.worker.decoding.wave_context import Arrival, Known, WaveContext, sent
from offramp.worker.model.attention import decode_window, ragged_window
from offramp.worker.model.fill import ExitedToken
from offramp.worker.model.kv import EXACT, PENDING, PROJECTED
from offramp.worker.model.stack import Rotary
from offramp.worker.model.transfers import take

FILL_AT = 16
"""Exited tokens of a row that are projected together at the latest."""


class Wave:
    """Runs some rows from one depth to another.

    Pending tokens join at their own depth, to the left of their row's newest token, so that every
    token runs every layer exactly once and in order.

    Args:
        context: Model, cache and what decides.
        rows: Rows whose newest token stands at ``first``; at 0 they begin a token.
        first: Index of the first layer to run.
        catch_up: Rows without a token on its way, whose pending tokens come along to the end.
    """

    def __init__(
        self, context: WaveContext, rows: Rows[Sequence], first: int, catch_up: Rows[Sequence] = ()
    ) -> None:
        self.context = context
        self.stack = context.stack
        # In the order of their slots: attention then reads runs of the cache, without a gather.
        self.rows = sorted((*rows, *catch_up), key=lambda row: row.slot)
        self.arrivals: list[Arrival] = []
        self._at = first
        self._joined = [0] * len(self.rows)
        self._x_NTD: Tensor | None = None
        self._rotary: Rotary = ()
        # Slots and positions [N, 1] of the rows' newest tokens on the device; None: not there yet.
        self._places: tuple[Tensor, Tensor] | None = None
        self.groups: list[RowGroup] = []
        if first == 0:
            self._begin_tokens()
        else:
            self._resume_groups()
        self._exits = {layer for group in self.groups for layer in group.exits}
        self._join_depths = {token.depth for row in self.rows for token in row.open} | {first}

    def run(self, last: int) -> list[Arrival]:
        """Advance to depth ``last``, where the rows that stay are left standing."""
        for index in range(self._at, last):
            if index in self._join_depths:
                self._join(index)
            if self._x_NTD is None:
                continue  # those that are left only catch up, and stand deeper
            self._x_NTD = self.stack.run_layer(
                index, self._x, self._rotary, self._window, self.context.kv
            )
            # Counted where a layer was called, and never derived from depths: a skipped layer is
            # one that was not called.
            for row, joined in zip(self.rows, self._joined, strict=True):
                row.layer_calls += joined
            if index + 1 < self.stack.layers:
                self._ask_exits(index + 1)
                if not self.rows:
                    return self.arrivals
        if last == self.stack.layers:
            self._finish()
        else:
            self._hold(last)
        return self.arrivals

    @property
    def _x(self) -> Tensor:
        assert self._x_NTD is not None
        return self._x_NTD

    def _begin_tokens(self) -> None:
        for row in self.rows:
            row.open.append(OpenToken(row.position, 0, None))
            row.undecided = True
            # Until its last layer has run, the entry is not full depth's, whatever it holds.
            self.context.kv.mark(row.slot, slice(row.position, row.position + 1), PENDING)
        self._joined = [1] * len(self.rows)
        tokens_N1, self._places = sent(self.rows, [row.next_input for row in self.rows], self.stack)
        self._x_NTD = self.stack.embed(tokens_N1, self._places[1])
        # A row that may leave no more tokens pending is not asked: it runs all layers anyway.
        free = [n for n, row in enumerate(self.rows) if not self.context.must_go_deep(row)]
        x_ND = self._x_NTD[:, 0]
        states_ND = x_ND if len(free) in (0, len(self.rows)) else take(x_ND, free)
        start = time.perf_counter()
        free_rows = [self.rows[n] for n in free]
        self.groups = self.context.grouper.group_rows(free_rows, states_ND)
        self.context.overhead.failures += sum(row.policy_failed for row in free_rows)
        self.context.overhead.deciding_s += time.perf_counter() - start

    def _resume_groups(self) -> None:
        self.groups = list({id(row.group): row.group for row in self.rows if row.group}.values())
        for group in self.groups:
            group.forget_all_but(self.rows)

    def _join(self, index: int) -> None:
        """Take in, or project, the tokens that stand at this depth."""
        self._fill([row for row in self.rows if row.projects], index)
        counts = [sum(token.depth <= index for token in row.open) for row in self.rows]
        columns = max(counts)
        # If nobody has joined, the window and the angles of the last layer still hold.
        if columns == 0 or (counts == self._joined and self._rotary):
            return
        if self._x_NTD is None or counts != self._joined:
            self._widen(counts, columns)
        self._joined = counts
        self._place()
        self._rotary = self.stack.rotary(self._x, self._window.positions_BT)

    def _widen(self, counts: list[int], columns: int) -> None:
        old = self._x_NTD
        shape = (len(self.rows), columns, self.stack.width)
        # Aligned to the right, so that the last column is every row's newest token. What a shorter
        # row has to its left is written nowhere; zeros keep it finite.
        new_NTD = torch.zeros(shape, dtype=self.stack.dtype, device=self.stack.device)
        if old is not None:
            new_NTD[:, columns - old.shape[1] :] = old
        for n, row in enumerate(self.rows):
            fresh = row.open[len(row.open) - counts[n] : len(row.open) - self._joined[n]]
            for offset, token in enumerate(fresh):
                if token.state_D is not None:
                    new_NTD[n, columns - counts[n] + offset] = token.state_D
        self._x_NTD = new_NTD

    def _place(self) -> None:
        """Say where the rows' tokens are written and what they attend to."""
        slots = [row.slot for row in self.rows]
        positions = [row.open[-1].position for row in self.rows]
        heads = self.stack.heads_per_key
        if self._x.shape[1] == 1 and all(self._joined):
            self._window = decode_window(slots, positions, heads, self._x, self._places)
        else:
            self._window = ragged_window(slots, positions, self._joined, heads, self._x)
        self.context.kv.open(self._window)

    def _ask_exits(self, executed: int) -> None:
        if executed not in self._exits:
            return
        asking = [group for group in self.groups if group.asks_at(executed)]
        if not asking:
            return
        start = time.perf_counter()
        # Probes and head read the translated state, deeper layers and cache the state itself.
        newest_N1D = self._x if self._x.shape[1] == 1 else self._x[:, -1:]
        read_N1D = self.context.translators.apply(executed, newest_N1D)
        leaving: dict[int, Known] = {}
        for group in asking:
            asked = group.rows
            # Rows may have changed slots, and so their order, while they waited.
            in_order = asked == self.rows
            places = [] if in_order else [self.rows.index(row) for row in asked]
            asked_N1D = read_N1D if in_order else take(read_N1D, places)
            left = group.ask(self.context.guard, executed, asked_N1D)
            if len(group.rows) + len(left.rows) < len(asked):
                self.context.overhead.failures += sum(row.policy_failed for row in asked)
            for n, row in enumerate(left.rows):
                logits_V = None if left.logits_NV is None else left.logits_NV[n]
                leaving[self.rows.index(row)] = Known(logits_V, left.token)
        self.context.overhead.deciding_s += time.perf_counter() - start
        if leaving:
            self._remove_leavers(executed, leaving, read_N1D[:, 0])

    def _remove_leavers(self, executed: int, leaving: dict[int, Known], read_ND: Tensor) -> None:
        # In order of place, whichever group was asked first.
        places = sorted(leaving)
        for n in places:
            row = self._mark_exited(n, executed)
            self.arrivals.append(Arrival(row, executed, read_ND[n : n + 1], True, *leaving[n]))
        full = [self.rows[n] for n in places if len(self.rows[n].open) >= FILL_AT]
        self._fill([row for row in full if row.projects], executed)
        stay = [n for n in range(len(self.rows)) if n not in leaving]
        self.rows = [self.rows[n] for n in stay]
        self._joined = [self._joined[n] for n in stay]
        if not stay:
            return
        columns = max(self._joined)
        if columns == 0:  # those that stay only catch up, from a deeper layer on
            self._x_NTD = self._places = None
            return
        stay_N1, self._places = sent(self.rows, stay, self.stack)
        self._x_NTD, *angles = (
            part.index_select(0, stay_N1[:, 0])[:, -columns:] for part in (self._x, *self._rotary)
        )
        self._rotary = tuple(angles)
        self._place()

    def _mark_exited(self, n: int, executed: int) -> Sequence:
        """Record how far a row's tokens have come; its newest one is now decided."""
        row = self.rows[n]
        self._note_depth(n, executed)
        row.undecided = False
        row.group = None
        row.early += 1
        row.open[-1].is_underway = False
        row.note_depth(executed / self.stack.layers)
        if row.projects:
            position = row.open[-1].position
            self.context.kv.mark(row.slot, slice(position, position + 1), PROJECTED)
        return row

    def _note_depth(self, n: int, executed: int) -> None:
        row, joined = self.rows[n], self._joined[n]
        for offset, token in enumerate(row.open[-joined:]):
            token.depth = executed
            token.state_D = self._x[n, offset - joined]

    def _fill(self, rows: Rows[Sequence], index: int) -> None:
        """Project what a layer will read of exited tokens: all that left at or before it.

        They wait until then, since one product fills many tokens for the price of one.
        """
        exited = [(row, token) for row in rows for token in row.open if token.has_left(index)]
        if not exited:
            return
        start = time.perf_counter()
        self.context.filler.fill(
            [
                ExitedToken(row.slot, token.position, token.depth, token.state_D)
                for row, token in exited
                if token.state_D is not None
            ]
        )
        for row in rows:
            row.open = [token for token in row.open if not token.has_left(index)]
        self.context.overhead.filling_s += time.perf_counter() - start

    def _hold(self, depth: int) -> None:
        for n in range(len(self.rows)):
            self._note_depth(n, depth)

    def _finish(self) -> None:
        for n, row in enumerate(self.rows):
            joined = self._joined[n]
            last = row.open[-1].position
            self.context.kv.mark(row.slot, slice(last - joined + 1, last + 1), EXACT)
            left = tuple(token.left_at for token in row.open if token.left_at is not None)
            self.arrivals.append(
                Arrival(row, self.stack.layers, self._x[n, -joined:], row.undecided, left=left)
            )
            if row.undecided:
                row.note_depth(1.0)
                row.early = 0
            row.open.clear()  # every token of the row has now run every layer
            row.undecided = False
            row.group = None
