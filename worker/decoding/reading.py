"""Reads exits: each row through the adapters that its policy was recorded with.

While releases change, rows under different adapters share waves. Each is read through its own, by
the same code in the same order as alone, so a swap changes nothing for a request under way.

Shape suffixes: N rows, T columns, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import Any, cast

from torch import Tensor

from offramp.worker.decoding.open_token import OpenToken
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.model.adapter_layers import ExitAdapters
from offramp.worker.model.filling.cache_filler import ExitedToken
from offramp.worker.model.stack import LayerStack
from offramp.worker.model.transfers import take, upload


class ExitReader:
    """Says through which adapters a row is read, and reads.

    Args:
        stack: The model, as a stack of layers.
        own: What a policy is read through that names no adapters.
    """

    def __init__(self, stack: LayerStack, own: ExitAdapters) -> None:
        self.own = own
        self._stack = stack

    def under(self, snapshot: PolicySnapshot) -> ExitAdapters:
        """The adapters of requests that are pinned to a snapshot."""
        # An engine's releases are given nothing else.
        return self.own if snapshot.adapters is None else cast("ExitAdapters", snapshot.adapters)

    def exited(self, row: Sequence, token: OpenToken, depth: int, state_D: Tensor) -> ExitedToken:
        """What the fill must know of a row's token that left the stack there, in this state."""
        kv_map = self.under(row.request.snapshot).kv_map
        return ExitedToken(row.slot, token.position, depth, state_D, kv_map)

    def exits_with_layers(self, rows: Iterable[Sequence]) -> set[int]:
        """Exits that some row's policy names and behind which its adapter layer runs.

        Asked there or not: an adapter layer has to have an entry of each of a row's tokens.
        """
        found: set[int] = set()
        for row in rows:
            if layers := self.under(row.request.snapshot).layers:
                found |= layers.keys() & set(row.policy.exits)
        return found

    def run(self, executed: int, rows: Rows[Sequence], x_NTD: Tensor, step: Any) -> Tensor:
        """Run the adapter layers behind an exit over rows that stand there, [N, T, D].

        Args:
            executed: Layers that were executed.
            rows: Rows of the wave, in its order.
            x_NTD: Their states; what a row is read from that has no adapter layer here.
            step: What ``LayerStack.run_layers`` takes after the states.
        """
        places: dict[int | None, list[int]] = {}
        for n, row in enumerate(rows):
            if executed in row.policy.exits:  # nothing is read of the others
                index = self.under(row.request.snapshot).layers.get(executed)
                places.setdefault(index, []).append(n)
        plain = bool(places.pop(None, []))
        read_NTD = x_NTD.clone() if plain or len(places) > 1 else x_NTD
        for index, own in places.items():
            assert index is not None
            # Over all rows: another's entries in this layer are never read.
            out_NTD = self._stack.run_layers(index, index + 1, x_NTD, *step)
            if not plain and len(places) == 1:
                return out_NTD
            read_NTD[upload(own, x_NTD.device)] = take(out_NTD, own)
        return read_NTD

    def correct(self, executed: int, rows: Rows[Sequence], x_NTD: Tensor) -> Tensor:
        """Apply the rows' translators, which only probes and the head read, [N, T, D]."""
        places: dict[int, list[int]] = {}
        found: dict[int, ExitAdapters] = {}
        for n, row in enumerate(rows):
            adapters = self.under(row.request.snapshot)
            found[id(adapters)] = adapters
            places.setdefault(id(adapters), []).append(n)
        if len(found) == 1:
            return next(iter(found.values())).correct(executed, x_NTD)
        read_NTD = x_NTD.clone()
        for key, own in places.items():
            read_NTD[upload(own, x_NTD.device)] = found[key].correct(executed, take(x_NTD, own))
        return read_NTD
