"""A wave: rows that move through layers together, one or several tokens each.

Shape suffixes: N rows still in the wave, T columns (tokens per row, right-aligned), D width,
M tokens that came to an end, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence as Rows
from operator import attrgetter

from torch import Tensor

from offramp.controller.policies.exits import is_on_copy
from offramp.worker.decoding.open_token import OpenToken
from offramp.worker.decoding.schedule import Ending
from offramp.worker.decoding.sequence import RowGroup, Sequence
from offramp.worker.decoding.wave_context import Arrival, Known, WaveContext, sent, widened
from offramp.worker.model.attention import decode_window, ragged_window
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
        later: Rows that join at the depths of their own tokens and run to the end: those that wait
            there, and those without a token on its way, whose pending tokens come along.
        ending: What becomes of rows that no policy is asked about any more.
    """

    def __init__(
        self,
        context: WaveContext,
        rows: Rows[Sequence],
        first: int,
        later: Rows[Sequence] = (),
        ending: Ending = "each",
    ) -> None:
        self.context = context
        self.stack = context.stack
        # In the order of their slots: attention then reads runs of the cache, without a gather.
        self.rows = sorted(rows, key=attrgetter("slot"))
        self.arrivals: list[Arrival] = []
        self._at, self._later, self._ending = first, list(later), ending
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
        self._exits = {e for group in self.groups for e in group.exits if not is_on_copy(e)}
        everybody = (*self.rows, *self._later)
        self._adapted = context.reader.exits_with_layers(everybody)
        self._exits |= self._adapted
        self._join_depths = {token.depth for row in everybody for token in row.open} | {first}

    def run(self, last: int) -> list[Arrival]:
        """Advance to depth ``last``, where the rows that stay are left standing."""
        stops = sorted(self._exits | self._join_depths | {self._at, last})
        for first, stop in itertools.pairwise(at for at in stops if self._at <= at <= last):
            if first in self._join_depths:
                self._join(first)
            if not self.rows:
                continue  # those that are left join deeper
            read_NTD = self._run_layers(first, stop)
            if stop < self.stack.layers:
                self._ask_exits(stop, read_NTD)
                if self._is_over(stop):
                    return self.arrivals
        if last == self.stack.layers:
            self._finish()
        else:
            self._hold(last)
        return self.arrivals

    def _run_layers(self, first: int, last: int) -> Tensor:
        step = (self._rotary, self._window, self.context.kv)
        self._x_NTD = read_NTD = self.stack.run_layers(first, last, self._x, *step)
        if adapted := last in self._adapted:
            read_NTD = self.context.reader.run(last, self.rows, self._x, step)
        # Counted where layers are called: a skipped layer is one that was not.
        for row, joined in zip(self.rows, self._joined, strict=True):
            row.layer_calls += joined * (last - first + adapted)
        return read_NTD

    def _is_over(self, executed: int) -> bool:
        """Whether nothing runs on from here: nobody is left, or those that are left now wait."""
        if not self.rows:
            return not self._later or self._ending == "wait"
        asked = any(group.rows and group.exits[-1] > executed for group in self.groups)
        if self._ending != "wait" or asked:
            return False
        if self.arrivals:
            # Others have left and will draft on: who is bound for the end waits for their drafts.
            self._hold(executed)
            return True
        self._ending = "each"  # nobody has left, so there is nothing to wait for
        self._later = [row for row in self._later if row.open[-1].depth >= executed]
        return False

    @property
    def _x(self) -> Tensor:
        assert self._x_NTD is not None
        return self._x_NTD

    def _begin_tokens(self) -> None:
        for row in self.rows:
            if not row.undecided:  # a token that nobody could draft has been opened before
                row.open.append(OpenToken(row.position, 0, None))
            row.undecided = True
            # Until its last layer has run, the entry is not full depth's, whatever it holds.
            self.context.kv.mark(row.slot, slice(row.position, row.position + 1), PENDING)
        self._joined = [1] * len(self.rows)
        tokens_N1, self._places = sent(self.rows, [row.next_input for row in self.rows], self.stack)
        self._x_NTD = self.stack.embed(tokens_N1, self._places[1])
        # A row that may leave no more tokens pending is not asked: it runs all layers anyway.
        free = [n for n, row in enumerate(self.rows) if self.context.may_leave(row, self._ending)]
        x_ND = self._x_NTD[:, 0]
        states_ND = x_ND if len(free) in (0, len(self.rows)) else take(x_ND, free)
        start = time.perf_counter()
        free_rows = [self.rows[n] for n in free]
        self.groups = self.context.grouper.group_rows(free_rows, states_ND)
        self.context.overhead.failures += sum(row.policy_failed for row in free_rows)
        self.context.overhead.deciding_s += time.perf_counter() - start
        if not self.groups and self._ending == "wait":
            self._ending = "each"  # nobody will leave, so there is nothing to wait for

    def _resume_groups(self) -> None:
        self.groups = list({id(row.group): row.group for row in self.rows if row.group}.values())
        for group in self.groups:
            group.forget_all_but(self.rows)

    def _join(self, index: int) -> None:
        """Take in, or project, the tokens that stand at this depth."""
        old, joined = self.rows, dict(zip(self.rows, self._joined, strict=True))
        self._take_in(index)
        self._fill([row for row in self.rows if row.projects], index)
        counts = [sum(token.depth <= index for token in row.open) for row in self.rows]
        # If nobody has joined, the window and the angles of the last layer still hold.
        if not counts or (counts == self._joined and self._rotary):
            return
        if self._x_NTD is None or counts != self._joined:
            joined_N = [joined.get(row, 0) for row in self.rows]
            places = [self.rows.index(row) for row in old]
            self._x_NTD = widened(self.stack, self.rows, counts, joined_N, (self._x_NTD, places))
        self._joined = counts
        self._place()
        self._rotary = self.stack.rotary(self._x, self._window.positions_BT)

    def _take_in(self, index: int) -> None:
        """Let rows join that stand at this depth, unless they wait on."""
        joining = [row for row in self._later if row.open[-1].depth == index]
        if joining and self._ending != "wait":
            self._later = [row for row in self._later if row not in joining]
            self.rows = sorted((*self.rows, *joining), key=attrgetter("slot"))
            self._places = None

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

    def _ask_exits(self, executed: int, read_NTD: Tensor) -> None:
        asking = [(group, group.asked_at(executed)) for group in self.groups]
        if not any(asked for _, asked in asking):
            return
        start = time.perf_counter()
        # Only probes and head read it; deeper layers and cache take the state itself.
        read_N1D = self.context.reader.correct(executed, self.rows, read_NTD[:, -1:])
        leaving: dict[int, Known] = {}
        for group, asked in asking:
            if not asked:
                continue
            before = len(group.rows)
            # Rows may have changed slots, and so their order, while they waited.
            in_order = asked == self.rows
            places = [] if in_order else [self.rows.index(row) for row in asked]
            asked_N1D = read_N1D if in_order else take(read_N1D, places)
            left = group.ask(self.context.guard, executed, asked_N1D)
            if len(group.rows) + len(left.rows) < before:
                self.context.overhead.failures += sum(row.policy_failed for row in asked)
            for n, row in enumerate(left.rows):
                logits_V = None if left.logits_NV is None else left.logits_NV[n]
                token = left.tokens[n] if left.tokens else None
                leaving[self.rows.index(row)] = Known(logits_V, token)
        self.context.overhead.deciding_s += time.perf_counter() - start
        if leaving:
            self._remove_leavers(executed, leaving, read_N1D[:, 0])

    def _remove_leavers(self, executed: int, leaving: dict[int, Known], read_ND: Tensor) -> None:
        places = sorted(leaving)
        for n in places:
            row = self._mark_exited(n, executed)
            self.arrivals.append(
                Arrival(row, executed, read_ND[n : n + 1], True, *leaving[n], drafted=True)
            )
        left = [self.rows[n] for n in places]
        self._fill([row for row in left if row.projects and len(row.open) >= FILL_AT], executed)
        stay = [n for n in range(len(self.rows)) if n not in leaving]
        self.rows = [self.rows[n] for n in stay]
        self._joined = [self._joined[n] for n in stay]
        if not stay:
            self._x_NTD, self._rotary, self._places = None, (), None
            return
        columns = max(self._joined)
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
        row.note_exit(executed, self.stack.layers)
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
                self.context.reader.exited(row, token, token.depth, token.state_D)
                for row, token in exited
                if token.state_D is not None
            ]
        )
        for row in rows:
            row.open = [token for token in row.open if not token.has_left(index)]
        self.context.overhead.filling_s += time.perf_counter() - start

    def _hold(self, depth: int) -> None:
        for n, row in enumerate(self.rows):
            self._note_depth(n, depth)
            if self._ending == "wait":
                row.group = None  # bound for the end: it is not asked again on the way

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
                row.note_depth(self.stack.layers, self.stack.layers)
                row.early = 0
            row.open.clear()  # every token of the row has now run every layer
            row.undecided = False
            row.group = None
