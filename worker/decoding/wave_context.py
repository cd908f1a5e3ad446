"""What every wave of an engine works with, what comes out of one, and what is counted beside it.

Shape suffixes: N rows, T columns, M tokens that came out, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offramp.controller.features import FloatArray
from offramp.worker.decoding.asking.grouping import RowGrouper
from offramp.worker.decoding.asking.guard import PolicyGuard
from offramp.worker.decoding.reading import ExitReader
from offramp.worker.decoding.schedule import Ending
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.model.filling.cache_filler import CacheFiller
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.transfers import upload
from offramp.worker.probes import ProbeFactory

ExitRecords = Rows[tuple[int, FloatArray]]
"""Per token: index of the exit where it left, and what was probed there."""


class Known(NamedTuple):
    """What a probe computed anyway of a token that leaves.

    Attributes:
        logits_V: Its logits over the whole vocabulary.
        token: Id of its successor.
    """

    logits_V: Tensor | None
    token: int | None


@dataclass(slots=True)
class Arrival:
    """Tokens of a row that came out of the wave, by an exit or at the end.

    Attributes:
        row: The row that the tokens belong to.
        exit_layer: Layers executed so far.
        states_MD: Their hidden states, the oldest first: one at an exit, at the end also those
            of the tokens that were pending.
        decides: Whether the last of them is a token on its way, which now gets its successor.
        logits_V: Logits of that last one, if a probe computed them anyway.
        token: Its successor, if it is drafted without the LM head.
        left: Where the tokens that were pending had left, if their policy learns.
        drafted: Whether it came out at an exit, and in ``verify`` is a draft.
        on_copy: Whether it was drafted on the quantised copy, whose head reads it.
    """

    row: Sequence
    exit_layer: int
    states_MD: Tensor
    decides: bool
    logits_V: Tensor | None = None
    token: int | None = None
    left: ExitRecords = ()
    drafted: bool = False
    on_copy: bool = False


@dataclass(slots=True)
class Overhead:
    """What decoding spends beside the model, since the start.

    Attributes:
        deciding_s: Seconds in probes and policies.
        filling_s: Seconds of projecting keys and values of skipped layers.
        failures: Requests whose policy failed and that went on at full depth.
    """

    deciding_s: float = 0.0
    filling_s: float = 0.0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class DraftCopy:
    """The model's layers in fewer bytes, on which rows in ``verify`` draft.

    Attributes:
        stack: The quantised layers and head.
        probes: Makes the probes that policies read there.
        grouper: Puts rows into the groups they are asked in.
    """

    stack: LayerStack
    probes: ProbeFactory
    grouper: RowGrouper


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveContext:
    """What every wave of an engine works with.

    Attributes:
        stack: The model, as a stack of layers.
        kv: Cache of keys and values.
        filler: Writes keys and values of skipped layers.
        reader: Reads each row's exits through its adapters.
        grouper: Puts rows into the groups they are asked in.
        guard: Asks policies, and survives those that fail.
        max_pending: Tokens of a row that may be pending (``defer``, ``verify``).
        overhead: Counts what is spent beside the model.
        copy: Where rows in ``verify`` draft whose policy has exits there; None: there is none.
    """

    stack: LayerStack
    kv: SlotKV
    filler: CacheFiller
    reader: ExitReader
    grouper: RowGrouper
    guard: PolicyGuard
    max_pending: int
    overhead: Overhead
    copy: DraftCopy | None = None

    def must_go_deep(self, row: Sequence) -> bool:
        """Whether a row's new token may not leave early."""
        return row.policy_failed or row.must_go_deep(self.max_pending, self.stack.eos_tokens)

    def may_leave(self, row: Sequence, ending: Ending) -> bool:
        """Whether a row's policy is asked about its new token in a launch with such an ending."""
        is_bound = is_spared(row, ending) or self.must_go_deep(row)
        return not (is_bound or row.is_past_asking)


def is_spared(row: Sequence, ending: Ending) -> bool:
    """Whether a launch takes a row to the end without asking its policy.

    Only where tokens are full depth's in any case may the others have a say in a row's depth.
    """
    return ending == "all" and row.request.kv_mode == "verify"


def widened(
    stack: LayerStack,
    rows: Rows[Sequence],
    counts: Rows[int],
    joined: Rows[int],
    old: tuple[Tensor | None, Rows[int]],
) -> Tensor:
    """Hidden states of a wave that tokens have joined, [N, T, D], aligned to the right.

    The last column is every row's newest token. What a shorter row has to its left is written
    nowhere; zeros keep it finite.

    Args:
        stack: The model, as a stack of layers.
        rows: The rows, those that have just joined included.
        counts: Tokens of each row that now take part.
        joined: Tokens of each row that took part before.
        old: The states so far, if any, and the places of their rows among these.
    """
    columns = max(counts)
    shape = (len(rows), columns, stack.width)
    new_NTD = torch.zeros(shape, dtype=stack.dtype, device=stack.device)
    old_NTD, places = old
    if old_NTD is not None:
        before = slice(columns - old_NTD.shape[1], columns)
        if len(places) == len(rows):
            new_NTD[:, before] = old_NTD
        else:
            new_NTD[upload(places, stack.device), before] = old_NTD
    for n, row in enumerate(rows):
        fresh = row.open[len(row.open) - counts[n] : len(row.open) - joined[n]]
        for offset, token in enumerate(fresh):
            if token.state_D is not None:
                new_NTD[n, columns - counts[n] + offset] = token.state_D
    return new_NTD


def sent(
    rows: Rows[Sequence], numbers: Rows[int], stack: LayerStack
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A number per row, and slots and positions of the rows' newest tokens, each [N, 1].

    They go to the model's device together, since each upload costs a launch.
    """
    slots = [row.slot for row in rows]
    positions = [row.open[-1].position if row.open else row.position for row in rows]
    three = upload(np.array([numbers, slots, positions])[:, :, None], stack.device)
    numbers_N1, slots_N1, positions_N1 = three.unbind()
    return numbers_N1, (slots_N1, positions_N1)
