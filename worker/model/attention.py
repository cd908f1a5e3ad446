"""Attention of some rows over the slot cache: no padding beyond a run, no gather of keys or values.

Shape suffixes: B rows of the step, A query heads, T tokens per row, H head_dim, S slots,
G key/value heads, C capacity, Q = A/G·T queries per key/value head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from offramp.worker.model.transfers import upload

NAME = "offramp_slots"
"""Under which Hugging Face's attention modules find ``slot_attention``."""


class LaterEntries:
    """Hides from each query the entries behind it: added to the scores.

    Made when a layer first asks for it: compiled layers never do.

    Args:
        positions_BT: Positions of the queries.
        span: Cache entries read.
        heads_per_key: Query heads per key/value head.
        like: Tensor whose dtype and device the mask takes.
    """

    def __init__(self, positions_BT: Tensor, span: int, heads_per_key: int, like: Tensor) -> None:
        self._asked = (positions_BT, span, heads_per_key, like.dtype, like.device)
        self._made: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """0 or minus infinity, [B, 1, Q, span]."""
        if self._made is None:
            positions_BT, span, heads_per_key, dtype, device = self._asked
            unseen_BTS = torch.arange(span, device=device) > positions_BT[:, :, None]
            mask_BTS = torch.zeros(unseen_BTS.shape, dtype=dtype, device=device)
            mask_BTS.masked_fill_(unseen_BTS, float("-inf"))
            self._made = mask_BTS.repeat(1, heads_per_key, 1)[:, None]
        return self._made


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a step in neighbouring slots, so that their cache is one view.

    Attributes:
        rows: Rows of the step.
        slots: Slots of the rows in the cache.
        span: Cache entries read.
        later: Hides entries; None if every query sees the whole span.
        causal: The run is the beginning of a row: query t sees the entries up to t.
    """

    rows: slice
    slots: slice
    span: int
    later: LaterEntries | None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """What a step's rows write to the cache and read from it; layers take it for a mask.

    Attributes:
        runs: The rows, in order.
        write: Index of the cache [S, G, C, H] that the new entries go to.
        positions_BT: Position of every column, on the device; 0 at most for padding.
        cells_M3: The same for compiled code, column by column: slot, position, 0 for padding.
        chosen: Which of the [B, T] new entries are written, as two index tensors; None: all.
    """

    runs: tuple[Run, ...]
    write: tuple[Any, ...]
    positions_BT: Tensor
    cells_M3: NDArray[np.int64]
    chosen: tuple[Tensor, Tensor] | None = None


def slot_attention(
    _module: torch.nn.Module,
    query_BATH: Tensor,
    keys: Tensor,
    values: Tensor,
    window: Window | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function in Hugging Face's form; output [B, T, A, H].

    Query heads that share keys and values become more queries of one head, so that nothing is
    repeated. Without a window keys and values are [B, G, T, H] of one causal pass.
    """
    batch, heads, tokens, width = query_BATH.shape
    if window is None or window.runs[0].causal:
        if window is not None:
            [run] = window.runs
            keys, values = (part[run.slots, :, : run.span] for part in (keys, values))
        grouped = keys.shape[1] != heads
        out = scaled_dot_product_attention(
            query_BATH, keys, values, is_causal=tokens > 1, scale=scaling, enable_gqa=grouped
        )
        return out.transpose(1, 2), None
    query_BGQH = query_BATH.reshape(batch, keys.shape[1], -1, width)
    parts = [
        scaled_dot_product_attention(
            query_BGQH[run.rows],
            keys[run.slots, :, : run.span],
            values[run.slots, :, : run.span],
            attn_mask=None if run.later is None else run.later.mask,
            scale=scaling,
        )
        for run in window.runs
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(batch, heads, tokens, width).transpose(1, 2), None


AttentionInterface.register(NAME, slot_attention)


def prefill_window(slot: int, first: int, tokens: int, heads_per_key: int, like: Tensor) -> Window:
    """Some tokens in a row of one slot, from position ``first`` on."""
    last = first + tokens
    write = (slot, slice(None), slice(first, last))
    positions_1T = torch.arange(first, last, device=like.device)[None]
    where = slice(slot, slot + 1)
    cells_T3 = np.ones((tokens, 3), np.int64)
    cells_T3[:, 0], cells_T3[:, 1] = slot, np.arange(first, last)
    if first == 0:
        run = Run(slice(0, 1), where, last, None, causal=True)
    else:
        run = _run(slice(0, 1), [slot], [last - 1], positions_1T, heads_per_key, like)
    return Window((run,), write, positions_1T, cells_T3)


def chosen_window(slot: int, positions: Sequence[int], heads_per_key: int, like: Tensor) -> Window:
    """Some tokens in a row of one slot, at ascending positions, each of which sees all before it.

    The entries between them are there already.
    """
    positions_1T = upload([positions], like.device)
    write = (slot, slice(None), positions_1T[0])
    cells_T3 = np.ones((len(positions), 3), np.int64)
    cells_T3[:, 0], cells_T3[:, 1] = slot, positions
    run = _run(slice(0, 1), [slot], [positions[-1]], positions_1T, heads_per_key, like)
    return Window((run,), write, positions_1T, cells_T3)


def decode_window(
    slots: Sequence[int],
    positions: Sequence[int],
    heads_per_key: int,
    like: Tensor,
    places: tuple[Tensor, Tensor] | None = None,
) -> Window:
    """One new token per row.

    Args:
        slots: Slot of each row, ascending.
        positions: Where each row's token goes; it sees everything up to itself.
        heads_per_key: Query heads per key/value head.
        like: Tensor whose dtype and device the masks take.
        places: Slots and positions [B, 1] on the device, where they are there already.
    """
    if places is None:
        numbers = [[[slot] for slot in slots], [[position] for position in positions]]
        slots_B1, positions_B1 = upload(numbers, like.device).unbind()
    else:
        slots_B1, positions_B1 = places
    runs = tuple(
        _run(rows, slots, positions, positions_B1, heads_per_key, like) for rows in _runs(slots)
    )
    cells = [(slot, position, 1) for slot, position in zip(slots, positions, strict=True)]
    cells_B3 = np.array(cells, np.int64)
    if len(slots) == 1:
        here = slice(positions[0], positions[0] + 1)
        return Window(runs, (slots[0], slice(None), here), positions_B1, cells_B3)
    write = (slots_B1[:, 0], slice(None), positions_B1[:, 0])
    return Window(runs, write, positions_B1, cells_B3)


def ragged_window(
    slots: Sequence[int],
    positions: Sequence[int],
    lengths: Sequence[int],
    heads_per_key: int,
    like: Tensor,
) -> Window:
    """Several new tokens per row, right-aligned: row b has its last ``lengths[b]`` columns.

    Args:
        slots: Slot of each row, ascending.
        positions: Position of each row's last column.
        lengths: Columns that count; those before them are padding, written nowhere.
        heads_per_key, like: See ``decode_window``.
    """
    columns = max(lengths)
    if len(slots) == 1:
        first = positions[0] - columns + 1
        return prefill_window(slots[0], first, columns, heads_per_key, like)
    cells = [
        (row, column, slots[row], positions[row] - (columns - 1 - column))
        for row in range(len(slots))
        for column in range(columns - lengths[row], columns)
    ]
    # In one go: each upload costs a launch.
    numbers = upload([*positions, *itertools.chain.from_iterable(cells)], like.device)
    last_B1 = numbers[: len(slots), None]
    positions_BT = last_B1 - torch.arange(columns - 1, -1, -1, device=like.device)
    # Padding may lie before a row's first token; then it sees that one, so that no sum is empty.
    positions_BT = positions_BT.clamp(min=0)
    runs = tuple(
        _run(rows, slots, positions, positions_BT, heads_per_key, like) for rows in _runs(slots)
    )
    row_M, column_M, slot_M, position_M = numbers[len(slots) :].view(-1, 4).unbind(-1)
    cells_BT3 = np.zeros((len(slots), columns, 3), np.int64)
    for row, column, slot, position in cells:
        cells_BT3[row, column] = slot, position, 1
    write = (slot_M, slice(None), position_M)
    chosen = (row_M, column_M)
    return Window(runs, write, positions_BT, cells_BT3.reshape(-1, 3), chosen)


def slots_window(
    slots_BT: Tensor, positions_BT: Tensor, span: int, heads_per_key: int, like: Tensor
) -> Window:
    """The first slots of the cache, one after the other, as captured layers need them.

    Nothing is read from the host but sizes, so the window serves whatever the tensors hold later.

    Args:
        slots_BT: Where the new entries go: a row's own slot, or the spare one for padding.
        positions_BT: Their positions; each token sees its row's entries up to there.
        span: Cache entries read; more than any position.
        heads_per_key, like: See ``decode_window``.
    """
    whole = slice(0, len(slots_BT))
    later = LaterEntries(positions_BT, span, heads_per_key, like)
    _ = later.mask  # now: what is made during a capture belongs to it
    run = Run(whole, whole, span, later)
    write = (slots_BT.flatten(), slice(None), positions_BT.flatten())
    return Window((run,), write, positions_BT, np.empty((0, 3), np.int64))


def _runs(slots: Sequence[int]) -> list[slice]:
    breaks = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(slots)) if b != a + 1]
    edges = [0, *breaks, len(slots)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _run(
    rows: slice,
    slots: Sequence[int],
    positions: Sequence[int],
    positions_BT: Tensor,
    heads_per_key: int,
    like: Tensor,
) -> Run:
    last = positions[rows]
    span = max(last) + 1
    where = slice(slots[rows.start], slots[rows.stop - 1] + 1)
    if positions_BT.shape[1] == 1 and min(last) == span - 1:
        return Run(rows, where, span, None)
    return Run(rows, where, span, LaterEntries(positions_BT[rows], span, heads_per_key, like))
