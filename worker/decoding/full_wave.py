"""Rows that nobody asks on their way: from the embedding through all layers in one go."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from operator import attrgetter

from offramp.worker.decoding.schedule import Launch
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.decoding.wave_context import Arrival, WaveContext, is_spared, sent
from offramp.worker.model.attention import decode_window
from offramp.worker.model.kv import EXACT


def is_full(context: WaveContext, launch: Launch[Sequence]) -> bool:
    """Whether all that a launch runs are new tokens that go through every layer unasked.

    An adapter layer that a row's policy names reads each of its tokens, asked or not.
    """
    if launch.first > 0 or launch.last < context.stack.layers or launch.later:
        return False
    for row in launch.members:
        if row.open or (row.policy.exits and not is_spared(row, launch.ending)):
            return False
    return not context.reader.exits_with_layers(launch.members)


def full_wave(context: WaveContext, rows: Rows[Sequence]) -> list[Arrival]:
    """Run the rows' new tokens: what a ``Wave`` does for them, in fewer steps.

    A small model's full depth is bound by such steps, not by its layers.

    Args:
        context: Model and cache.
        rows: Rows for which ``is_full`` holds.
    """
    stack, kv = context.stack, context.kv
    rows = sorted(rows, key=attrgetter("slot"))
    positions = [row.position for row in rows]
    tokens_N1, places = sent(rows, [row.next_input for row in rows], stack)
    x_N1D = stack.embed(tokens_N1, places[1])
    slots = [row.slot for row in rows]
    window = decode_window(slots, positions, stack.heads_per_key, x_N1D, places)
    kv.open(window)
    rotary = stack.rotary(x_N1D, window.positions_BT)
    x_N1D = stack.run_layers(0, stack.layers, x_N1D, rotary, window, kv)
    for row, position in zip(rows, positions, strict=True):
        row.layer_calls += stack.layers
        kv.mark(row.slot, slice(position, position + 1), EXACT)
        row.note_depth(stack.layers, stack.layers)
        row.early = 0
    return [Arrival(row, stack.layers, x_N1D[n], True) for n, row in enumerate(rows)]
