"""Attention of some rows over the slot cache: no padding beyond a run, no gather of keys or values.

Shape suffixes: B rows of the step, A query heads, T tokens per row, H head_dim, S slots,
G key/value heads, C capacity, Q = A/G·T queries per key/value head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "offramp_slots"
"""Under which Hugging Face's attention modules find ``slot_attention``."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a step in neighbouring slots, so that their cache is one view.

    Attributes:
        rows: Rows of the step.
        slots: Slots of the rows in the cache.
        span: Cache entries read.
        mask: Added to the scores, [B, 1, Q, span]; None if every query sees the whole span.
        causal: The run is the beginning of a row: query t sees the entries up to t.
    """

    rows: slice
    slots: slice
    span: int
    mask: Tensor | None
    causal: bool = False


@dataclass(frozen=True, slots=True)
class Window:
    """What a step's rows write to the cache and read from it; layers take it for a mask.

    Attributes:
        runs: The rows, in order.
        write: Index of the cache [S, G, C, H] that the new entries go to.
        chosen: Which of the [B, T] new entries are written, as two index tensors; None: all.
    """

    runs: tuple[Run, ...]
    write: tuple[Any, ...]
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
            attn_mask=run.mask,
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
    if first == 0:
        return Window((Run(slice(0, 1), slice(slot, slot + 1), last, None, causal=True),), write)
    return Window((_run(slice(0, 1), [slot], [last - 1], tokens, heads_per_key, like),), write)


def decode_window(
    slots: Sequence[int], positions: Sequence[int], heads_per_key: int, like: Tensor
) -> Window:
    """One new token per row.

    Args:
        slots: Slot of each row, ascending.
        positions: Where each row's token goes; it sees everything up to itself.
        heads_per_key: Query heads per key/value head.
        like: Tensor whose dtype and device the masks take.
    """
    runs = tuple(_run(rows, slots, positions, 1, heads_per_key, like) for rows in _runs(slots))
    if len(slots) == 1:
        return Window(runs, (slots[0], slice(None), slice(positions[0], positions[0] + 1)))
    at = (torch.tensor(slots, device=like.device), torch.tensor(positions, device=like.device))
    return Window(runs, (at[0], slice(None), at[1]))


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
    runs = tuple(
        _run(rows, slots, positions, columns, heads_per_key, like) for rows in _runs(slots)
    )
    if len(slots) == 1:
        first = positions[0] - columns + 1
        return Window(runs, (slots[0], slice(None), slice(first, positions[0] + 1)))
    cells = [
        (row, column, slots[row], positions[row] - (columns - 1 - column))
        for row in range(len(slots))
        for column in range(columns - lengths[row], columns)
    ]
    row_M, column_M, slot_M, position_M = torch.tensor(cells, device=like.device).unbind(-1)
    return Window(runs, (slot_M, slice(None), position_M), chosen=(row_M, column_M))


def _runs(slots: Sequence[int]) -> list[slice]:
    breaks = [i + 1 for i, (a, b) in enumerate(itertools.pairwise(slots)) if b != a + 1]
    edges = [0, *breaks, len(slots)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _run(
    rows: slice,
    slots: Sequence[int],
    positions: Sequence[int],
    columns: int,
    heads_per_key: int,
    like: Tensor,
) -> Run:
    last = positions[rows]
    span = max(last) + 1
    where = slice(slots[rows.start], slots[rows.stop - 1] + 1)
    if columns == 1 and min(last) == span - 1:
        return Run(rows, where, span, None)
    device = like.device
    end_BT = torch.tensor(last, device=device)[:, None] - torch.arange(
        columns - 1, -1, -1, device=device
    )
    seen_BTS = torch.arange(span, device=device) <= end_BT.clamp(min=0)[:, :, None]
    mask = torch.zeros(seen_BTS.shape, dtype=like.dtype, device=device)
    mask.masked_fill_(~seen_BTS, float("-inf"))
    return Run(rows, where, span, mask.repeat(1, heads_per_key, 1)[:, None])
