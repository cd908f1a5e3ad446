"""One chunk of a prompt on its way through the layers; its tokens may leave at exits.

Shape suffixes: T tokens still in the stack, D width.
"""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray
from offramp.worker.decoding.prompting.prompt_exits import PromptExits
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.decoding.wave_context import WaveContext
from offramp.worker.model.attention import chosen_window, prefill_window
from offramp.worker.model.filling.kv_map import KVMap
from offramp.worker.model.kv import EXACT, PROJECTED
from offramp.worker.model.transfers import take, upload
from offramp.worker.probes.prompt_probe import PromptProbe


class PromptChunk:
    """Runs the next tokens of a row's prompt.

    Args:
        context: Model, cache and what decides.
        row: Row whose prompt is read.
        tokens: Tokens to read.
    """

    def __init__(self, context: WaveContext, row: Sequence, tokens: int) -> None:
        self._context, self._row = context, row
        self._stack, kv = context.stack, context.kv
        self._first = row.prefilled
        chunk = row.request.prompt[self._first : self._first + tokens]
        self._heads = (self._stack.heads_per_key, kv.keys_LSGCH)
        self._window = prefill_window(row.slot, self._first, len(chunk), *self._heads)
        where_1T = self._window.positions_BT
        self._x_1TD = self._stack.embed(upload([chunk], self._stack.device), where_1T)
        self._rotary = self._stack.rotary(self._x_1TD, where_1T)
        self._positions_T = np.arange(self._first, self._first + len(chunk))
        self._asked = self._exits()
        self._probe = self._made_probe()

    def run(self) -> Tensor:
        """Run every layer over the tokens that stay; their states, [T, D]."""
        row, kv, reader = self._row, self._context.kv, self._context.reader
        kv.mark(row.slot, slice(self._first, self._first + len(self._positions_T)), EXACT)
        kv.open(self._window)
        adapted = reader.exits_with_layers([row])
        exits = () if self._asked is None else self._asked.policy.exits
        stops = sorted({0, self._stack.layers, *adapted, *exits})
        for start, end in pairwise(stops):
            step = (self._rotary, self._window, kv)
            self._x_1TD = self._stack.run_layers(start, end, self._x_1TD, *step)
            if end in adapted:
                reader.run(end, [row], self._x_1TD, step)
            row.prompt_calls += len(self._positions_T) * (end - start + (end in adapted))
            if end in exits and end < self._stack.layers:
                self._ask(end)
                if not len(self._positions_T):
                    break
        return self._x_1TD[0]

    def _exits(self) -> PromptExits | None:
        """Who is asked; None if no token of this chunk may leave."""
        asked = self._row.request.prompts
        if asked is None or self._row.prompt_failed:
            return None
        return asked if self._may_leave(asked).any() else None

    def _may_leave(self, asked: PromptExits) -> BoolArray:
        last = len(self._row.request.prompt) - asked.keep_last
        return (self._positions_T >= asked.keep_first) & (self._positions_T < last)

    def _made_probe(self) -> PromptProbe | None:
        if self._asked is None or self._asked.policy.schema is None:
            return None
        prompt = self._row.request.prompt
        return PromptProbe(self._x_1TD[0], prompt, self._first, self._stack.layers)

    def _ask(self, executed: int) -> None:
        """Let the policy say who leaves; if it fails, the rest of the prompt is read in full."""
        assert self._asked is not None
        if self._row.prompt_failed:
            return
        start = time.perf_counter()
        leave_T = self._context.guard.decide(self._asked.policy, self._features(executed))
        self._context.overhead.deciding_s += time.perf_counter() - start
        if leave_T is None:
            self._row.prompt_failed = True
            self._context.overhead.failures += 1
            return
        leave_T = leave_T & self._may_leave(self._asked)
        if leave_T.any():
            self._remove(executed, leave_T)

    def _features(self, executed: int) -> FloatArray:
        if self._probe is None:
            return np.empty((len(self._positions_T), 0), np.float32)
        return self._probe.features(executed, self._x_1TD[0])

    def _remove(self, executed: int, leave_T: BoolArray) -> None:
        """Fill what the leaving tokens skip, since deeper layers read it; go on with the others."""
        row, kv = self._row, self._context.kv
        left_T, stay = self._positions_T[leave_T], np.flatnonzero(~leave_T).tolist()
        start = time.perf_counter()
        states_TD = take(self._x_1TD[0], np.flatnonzero(leave_T).tolist())
        kv_map = self._context.reader.under(row.request.snapshot).kv_map
        slots_T = np.full(len(left_T), row.slot)
        if kv_map.reads_before(executed):
            self._keep_before(executed, leave_T, kv_map)
        self._context.filler.fill_states(executed, states_TD, slots_T, left_T, kv_map)
        self._context.overhead.filling_s += time.perf_counter() - start
        for position in left_T.tolist():
            kv.mark(row.slot, slice(position, position + 1), PROJECTED)
        if self._probe is not None:
            self._probe.keep(~leave_T)
        self._positions_T = self._positions_T[~leave_T]
        self._x_1TD = take(self._x_1TD[0], stay)[None]
        if stay:
            self._rotary = tuple(take(part[0], stay)[None] for part in self._rotary)
            self._window = chosen_window(row.slot, self._positions_T.tolist(), *self._heads)
            kv.open(self._window)

    def _keep_before(self, executed: int, leave_T: BoolArray, kv_map: KVMap) -> None:
        """Write early what the next layer keeps of tokens that stay in front of leaving ones."""
        before_T = ~leave_T & np.isin(self._positions_T + 1, self._positions_T[leave_T])
        if not before_T.any():
            return
        states_TD = take(self._x_1TD[0], np.flatnonzero(before_T).tolist())
        slots_T = np.full(len(states_TD), self._row.slot)
        positions_T = self._positions_T[before_T]
        self._context.filler.keep_next(executed, states_TD, slots_T, positions_T, kv_map)
