"""Attention over slots ≡ softmax attention written out, query by query.

Shape suffixes: S slots, G key/value heads, C capacity, H head_dim, B rows of the step,
A query heads, T columns.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.worker.model.attention import (
    Window,
    decode_window,
    prefill_window,
    ragged_window,
    slot_attention,
)
from offramp.worker.model.kv import SlotKV

SLOTS, HEAD_DIM, CAPACITY = 6, 8, 128
SCALE = 0.3


def cache(kv_heads: int, dtype: torch.dtype = torch.float32) -> SlotKV:
    # All that a cache reads of a stack.
    shape: Any = SimpleNamespace(
        blocks=[None, None],
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    kv = SlotKV(shape, SLOTS)
    kv.keys_LSGCH.normal_()
    kv.values_LSGCH.normal_()
    return kv


def attend(
    kv: SlotKV, window: Window, query_BATH: Tensor, keys_BGTH: Tensor, values_BGTH: Tensor
) -> Tensor:
    """As a layer does: write the new entries, then attend; [B, T, A, H]."""
    kv.open(window)
    keys, values = kv.update(keys_BGTH, values_BGTH, 1)
    module: Any = None
    return slot_attention(module, query_BATH, keys, values, window, scaling=SCALE)[0]


def written_out(query_AH: Tensor, keys_GTH: Tensor, values_GTH: Tensor) -> Tensor:
    """One query over the entries it sees, head by head."""
    shared = len(query_AH) // len(keys_GTH)
    heads = []
    for head, query_H in enumerate(query_AH):
        scores_T = keys_GTH[head // shared] @ query_H * SCALE
        heads.append(torch.softmax(scores_T, -1) @ values_GTH[head // shared])
    return torch.stack(heads)


def check(
    kv: SlotKV, slots: list[int], positions: list[int], lengths: list[int], heads_per_key: int
) -> None:
    """Run one step's window; compare every query, and every entry of the cache."""
    kv_heads, columns = kv.keys_LSGCH.shape[2], max(lengths)
    query = torch.randn(len(slots), kv_heads * heads_per_key, columns, HEAD_DIM)
    new_keys, new_values = torch.randn(2, len(slots), kv_heads, columns, HEAD_DIM)
    keys, values = kv.keys_LSGCH.clone(), kv.values_LSGCH.clone()
    for row, (slot, position, length) in enumerate(zip(slots, positions, lengths, strict=True)):
        for back in range(length):
            keys[1, slot, :, position - back] = new_keys[row, :, columns - 1 - back]
            values[1, slot, :, position - back] = new_values[row, :, columns - 1 - back]
    if columns == 1:
        window = decode_window(slots, positions, heads_per_key, query)
    else:
        window = ragged_window(slots, positions, lengths, heads_per_key, query)
    out = attend(kv, window, query, new_keys, new_values)
    torch.testing.assert_close(kv.keys_LSGCH, keys, rtol=0, atol=0)
    torch.testing.assert_close(kv.values_LSGCH, values, rtol=0, atol=0)
    for row, (slot, position, length) in enumerate(zip(slots, positions, lengths, strict=True)):
        for back in range(length):
            seen = (1, slot, slice(None), slice(position - back + 1))
            expected = written_out(query[row, :, columns - 1 - back], keys[seen], values[seen])
            torch.testing.assert_close(out[row, columns - 1 - back], expected)
    assert torch.isfinite(out).all()  # padding columns, too


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_query_sees_its_own_row_up_to_itself(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    slots = sorted(data.draw(st.sets(st.integers(0, SLOTS - 1), min_size=1)))
    columns = data.draw(st.integers(1, 4))
    positions = [data.draw(st.integers(columns - 1, 40)) for _ in slots]
    lengths = [data.draw(st.integers(1, columns)) for _ in slots]
    kv_heads, heads_per_key = data.draw(st.sampled_from([(2, 2), (1, 3), (3, 1)]))
    check(cache(kv_heads), slots, positions, lengths, heads_per_key)


def test_rows_without_a_token_in_the_step_are_written_nowhere() -> None:
    kv = cache(2)
    before = kv.keys_LSGCH.clone()
    query = torch.randn(2, 4, 1, HEAD_DIM)
    window = ragged_window([0, 1], [5, 9], [1, 0], 2, query)
    attend(kv, window, query, torch.randn(2, 2, 1, HEAD_DIM), torch.randn(2, 2, 1, HEAD_DIM))
    changed = (kv.keys_LSGCH != before).any(-1).any(2).nonzero().tolist()
    assert changed == [[1, 0, 5]]


def test_neighbouring_slots_are_one_run_and_gaps_begin_another() -> None:
    like = torch.zeros(1)
    window = decode_window([0, 1, 3, 4, 5], [7, 7, 2, 9, 9], 1, like)
    assert [(run.rows, run.slots, run.span) for run in window.runs] == [
        (slice(0, 2), slice(0, 2), 8),
        (slice(2, 5), slice(3, 6), 10),
    ]
    assert window.runs[0].later is None  # equally long rows need none
    assert window.runs[1].later is not None


@pytest.mark.parametrize(("kv_heads", "heads_per_key"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("chunks", [[9], [1, 8], [4, 4, 1], [1] * 9])
def test_a_prompt_in_chunks_sees_what_the_whole_prompt_sees(
    chunks: list[int], kv_heads: int, heads_per_key: int
) -> None:
    torch.manual_seed(0)
    kv = cache(kv_heads)
    tokens = sum(chunks)
    query = torch.randn(1, kv_heads * heads_per_key, tokens, HEAD_DIM)
    keys, values = torch.randn(2, 1, kv_heads, tokens, HEAD_DIM)
    parts, first = [], 0
    for count in chunks:
        at = (slice(None), slice(None), slice(first, first + count))
        window = prefill_window(2, first, count, heads_per_key, query)
        parts.append(attend(kv, window, query[at], keys[at], values[at]))
        first += count
    out_TAH = torch.cat(parts, 1)[0]
    for token in range(tokens):
        expected = written_out(
            query[0, :, token], keys[0, :, : token + 1], values[0, :, : token + 1]
        )
        torch.testing.assert_close(out_TAH[token], expected)


def test_without_a_window_a_pass_is_plainly_causal() -> None:
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    module: Any = None
    out_BTAH = slot_attention(module, query, keys, values, None, scaling=SCALE)[0]
    for token in range(5):
        expected = written_out(
            query[0, :, token], keys[0, :, : token + 1], values[0, :, : token + 1]
        )
        torch.testing.assert_close(out_BTAH[0, token], expected)
