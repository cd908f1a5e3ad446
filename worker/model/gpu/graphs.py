"""CUDA graphs: neighbouring layers are captured once per shape, and replayed by one launch.

Of a small model on a GPU, kernels take less time than launching them one by one. A graph launches
all kernels of a segment at once, always over the same memory. So a step's numbers are copied into
static buffers, where a row stands as its slot says: attention then reads the cache as a view,
whichever rows run. Places that no row takes are computed, too; they write to the cache's spare
slot, and nobody reads what comes of them. Sizes are rounded up, so that few graphs serve all steps.

Shape suffixes: N rows of a step, T columns (tokens of a row, right-aligned), B rows of a graph,
C its columns, M tokens, D width.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.worker.model.attention import Window, slots_window
from offramp.worker.model.kv import BLOCK_TOKENS, SlotKV
from offramp.worker.model.stack import LayerStack, Rotary
from offramp.worker.model.transfers import upload

log = logging.getLogger(__name__)

MOST_TOKENS = 256
"""Tokens of a graph, padding included; with more, launches are no longer what takes the time."""

MOST_COLUMNS = 16
"""Tokens of a row in a graph; prompts have more."""

MOST_GRAPHS = 128
"""Graphs kept; of more, those that were not used for longest are dropped."""

Replay = Callable[[], None]
"""Does again what was recorded, over the same memory."""

Record = Callable[[Callable[[], None]], Replay]
"""Captures what a function has the device do; it is called more than once."""


def cuda_recorder(device: torch.device) -> Record:
    """Capture CUDA graphs that share one pool of memory; none runs while another one does."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(action: Callable[[], None]) -> Replay:
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            action()  # loads kernels and makes workspaces, which a capture may not
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its own stream as the current one; the outer block does not.
        # Threads that prepare policies meanwhile must not make it fail, hence thread_local.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            action()
        return graph.replay

    return record


class Layout(NamedTuple):
    """Where a step's tokens stand in the buffers.

    Attributes:
        rows, columns: Size of the graphs that serve it, B and C.
        span: Cache entries that attention reads.
        places_NT: Place of every token, and of padding to a row's left, among B · C.
        cells_2BC: Slots and positions that the places write to.
    """

    rows: int
    columns: int
    span: int
    places_NT: NDArray[np.int64]
    cells_2BC: NDArray[np.int64]

    @classmethod
    def of(cls, window: Window, shape: tuple[int, int], kv: SlotKV) -> Layout | None:
        """Lay out a step's rows and columns N, T; None if no graph is as large."""
        cells_NT3 = window.cells_M3.reshape(*shape, 3)
        slots_N = cells_NT3[:, -1, 0]
        rows = min(_power_of_two(int(slots_N.max()) + 1), kv.slots)
        columns = _power_of_two(shape[1])
        is_whole = bool(cells_NT3[:, -1, 2].all())
        if not is_whole or columns > MOST_COLUMNS or rows * columns > MOST_TOKENS:
            return None
        entries = int(cells_NT3[:, :, 1].max()) + 1
        blocks = _power_of_two(-(-entries // BLOCK_TOKENS))
        places_NT = slots_N[:, None] * columns + np.arange(columns - shape[1], columns)
        cells_2M = np.zeros((2, rows * columns), np.int64)
        cells_2M[0] = kv.spare
        is_token_NT = cells_NT3[:, :, 2] == 1
        cells_2M[:, places_NT[is_token_NT]] = cells_NT3[is_token_NT, :2].T
        span = min(blocks * BLOCK_TOKENS, kv.capacity)
        return cls(rows, columns, span, places_NT, cells_2M.reshape(2, rows, columns))


class StepBuffers:
    """Where captured layers find a step's numbers and leave theirs: always the same memory.

    Args:
        x_NTD, rotary: A step's; buffers are as wide and of the same dtype.
    """

    def __init__(self, x_NTD: Tensor, rotary: Rotary) -> None:
        def zeros_as(part: Tensor) -> Tensor:
            size = (MOST_TOKENS, part.shape[-1])
            return torch.zeros(size, dtype=part.dtype, device=part.device)

        self._x_MD, self._out_MD = zeros_as(x_NTD), zeros_as(x_NTD)
        self._angles = tuple(zeros_as(part) for part in rotary)
        self._cells = torch.zeros(2 * MOST_TOKENS, dtype=torch.long, device=x_NTD.device)
        self._places_M = self._cells[:0]

    def begin(self, layout: Layout, rotary: Rotary) -> None:
        """Take in what all layers of a step share."""
        numbers = np.concatenate((layout.cells_2BC.ravel(), layout.places_NT.ravel()))
        sent = upload(numbers, self._cells.device)
        size = layout.cells_2BC.size
        self._cells[:size].copy_(sent[:size])
        self._places_M = sent[size:]
        for buffer, part_NTX in zip(self._angles, rotary, strict=True):
            buffer.index_copy_(0, self._places_M, part_NTX.flatten(0, 1))

    def load(self, x_NTD: Tensor) -> None:
        """Take in hidden states of the step that was begun."""
        self._x_MD.index_copy_(0, self._places_M, x_NTD.flatten(0, 1))

    def result(self) -> Tensor:
        """What came of them, [N · T, D], a copy."""
        return self._out_MD.index_select(0, self._places_M)

    def views(self, rows: int, columns: int) -> tuple[Tensor, Rotary, Tensor, Tensor]:
        """States, angles, slots and positions of a graph's size, views made anew."""
        size = rows * columns
        x_BCD, *angles = (
            part[:size].view(rows, columns, -1) for part in (self._x_MD, *self._angles)
        )
        slots_BC, positions_BC = self._cells[: 2 * size].view(2, rows, columns).unbind()
        return x_BCD, tuple(angles), slots_BC, positions_BC

    def leave(self, x_BCD: Tensor) -> None:
        """Store what the layers computed."""
        self._out_MD[: x_BCD.shape[0] * x_BCD.shape[1]].copy_(x_BCD.flatten(0, 1))


class GraphedLayers:
    """Runs neighbouring layers of a stack by replaying them, where a graph of their size can be.

    Prompts, steps of very many tokens, layers with a hook and whatever is no inference are left to
    plain launches.
    If a capture fails, everything is, from then on.

    Args:
        stack: Prepared layers.
        make_recorder: Makes what captures; it is asked anew when all graphs have become useless.
    """

    def __init__(self, stack: LayerStack, make_recorder: Callable[[], Record]) -> None:
        self._stack = stack
        self._make_recorder = make_recorder
        self._record: Record | None = None
        self._graphs: OrderedDict[tuple[int, ...], Replay] = OrderedDict()
        self._hooks = tuple(
            tuple(
                hooks
                for module in block.modules()
                for hooks in (module._forward_hooks, module._forward_pre_hooks)
            )
            for block in stack.blocks
        )
        self._buffers: StepBuffers | None = None
        self._begun: tuple[Any, ...] = ()
        self._layout: Layout | None = None
        self._cache: Callable[[], Tensor | None] = lambda: None
        self.has_failed = False

    def __call__(
        self, first: int, last: int, x_NTD: Tensor, rotary: Rotary, mask: Any, kv: Any
    ) -> Tensor | None:
        """What the layers compute, [N, T, D]; None where they have to be run one by one."""
        if self.has_failed or not _is_step(mask, kv):
            return None
        if any(itertools.chain.from_iterable(self._hooks[first:last])):
            return None
        self._follow(kv)
        layout = self._begin(mask, x_NTD, rotary, kv)
        if layout is None:
            return None
        buffers = self._buffers
        assert buffers is not None
        buffers.load(x_NTD)
        replay = self._graph(first, last, layout, mask, kv)
        if replay is None:
            return None
        replay()
        return buffers.result().view_as(x_NTD)

    def __len__(self) -> int:
        return len(self._graphs)

    def _follow(self, kv: SlotKV) -> None:
        """Forget graphs over a cache that has grown: it lies elsewhere now."""
        if self._cache() is not kv.keys_LSGCH:
            self._graphs.clear()
            self._record, self._begun = None, ()
            self._cache = weakref.ref(kv.keys_LSGCH)

    def _begin(self, window: Window, x_NTD: Tensor, rotary: Rotary, kv: SlotKV) -> Layout | None:
        """Send a step's numbers to the device, once for all its segments."""
        if not self._begun or self._begun[0] is not window or self._begun[1] is not rotary:
            self._begun = (window, rotary)
            self._layout = Layout.of(window, (x_NTD.shape[0], x_NTD.shape[1]), kv)
            if self._layout is not None:
                self._buffers = self._buffers or StepBuffers(x_NTD, rotary)
                self._buffers.begin(self._layout, rotary)
        return self._layout

    def _graph(
        self, first: int, last: int, layout: Layout, window: Window, kv: SlotKV
    ) -> Replay | None:
        key = (first, last, *layout[:3])
        if key not in self._graphs:
            try:
                self._record = self._record or self._make_recorder()
                self._graphs[key] = self._record(partial(self._run, first, last, layout, kv))
            except Exception:  # whatever the driver, or a family's code, says to it
                self.has_failed = True
                self._graphs.clear()
                log.warning(
                    "cannot capture layers; each kernel is launched by itself", exc_info=True
                )
                return None
            finally:
                kv.open(window)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _run(self, first: int, last: int, layout: Layout, kv: SlotKV) -> None:
        """What is captured; it reads nothing but weights, cache and buffers."""
        stack, buffers = self._stack, self._buffers
        assert buffers is not None
        x_BCD, rotary, slots_BC, positions_BC = buffers.views(layout.rows, layout.columns)
        window = slots_window(slots_BC, positions_BC, layout.span, stack.heads_per_key, x_BCD)
        kv.open(window)
        for index in range(first, last):
            x_BCD = stack.run_layer(index, x_BCD, rotary, window, kv)
        buffers.leave(x_BCD)


def _is_step(window: Any, kv: Any) -> bool:
    # The buffers are made in inference mode, and may be written to in it only.
    is_ours = (
        type(kv) is SlotKV and isinstance(window, Window) and torch.is_inference_mode_enabled()
    )
    return is_ours and not window.runs[0].causal


def _power_of_two(size: int) -> int:
    """The smallest power of two that is as large."""
    return 1 << (size - 1).bit_length()
