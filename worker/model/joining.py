"""Adapters of a running engine: its own, and those that come with releases.

A release's policy may name adapters that the engine was not started with. They join the stack
between two steps, behind those that are there, so the requests under way keep theirs to the end; a
set that no request and no release is read through any more leaves its places, and the cache's, to
the next.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from weakref import WeakValueDictionary

from offramp.controller.adapters.adapter_folder import read_description
from offramp.worker.model.adapter_layers import (
    KIND,
    AdapterLayers,
    ExitAdapters,
    load_translators,
    read_layers,
)
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.prepared import joining
from offramp.worker.model.stack import LayerStack


class Turn:
    """A lock that whoever waits for gets next, however soon its holder asks for it again."""

    def __init__(self) -> None:
        self._door, self._turn = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._door:  # a thread that waits for its turn stands in it
            self._turn.acquire()

    def __exit__(self, *_: object) -> None:
        self._turn.release()


class AdapterSets:
    """Every set of adapters that some request may be read through.

    Args:
        stack: The model, prepared.
        kv: Cache of the keys and values of its layers, and of adapter layers behind them.
        fingerprint: Names the model; what was fitted to another is refused.
        own: The set that the engine was made with.
        require_room: Told the context and the bytes of a position in all slots; refuses too many.

    Attributes:
        turn: Held while a step runs, and while layers join.
    """

    def __init__(
        self,
        stack: LayerStack,
        kv: SlotKV,
        fingerprint: str,
        own: ExitAdapters,
        require_room: Callable[[int, int], object],
    ) -> None:
        self.turn = Turn()
        self._stack = stack
        self._kv = kv
        self._fingerprint = fingerprint
        self._own = own
        self._require_room = require_room
        # A set lives as long as a snapshot names it: the current ones, and those of requests.
        self._living: WeakValueDictionary[str, ExitAdapters] = WeakValueDictionary()
        self._joining = threading.Lock()

    def take_in(self, folder: Path) -> ExitAdapters:
        """Read a folder that ``offramp tune`` wrote, and let its adapters join, from any thread.

        What is there already under its digest is not read again.

        Raises:
            ConfigError: as ``load_exits``, or the cache's memory budget is too small.
        """
        digest = str(read_description(folder).get("digest"))
        with self._joining:
            if digest == self._own.digest:
                return self._own
            found = self._living.get(digest)
            if found is None:
                self._living[digest] = found = self._read(folder)
            return found

    def _read(self, folder: Path) -> ExitAdapters:
        facts, stack = read_description(folder), self._stack
        if facts.get("kind") != KIND:
            return load_translators(folder, stack, self._fingerprint)
        blocks, kv_map = read_layers(folder, stack, self._fingerprint)
        places = dict(zip(blocks, self._places(), strict=False))
        layers = max(len(stack.blocks), *(place + 1 for place in places.values()))
        self._require_room(stack.context, self._kv.bytes_per_token_of(layers))
        joined = AdapterLayers(stack, blocks, str(facts["digest"]), places, kv_map)
        put = joining(stack, {places[exit_]: block for exit_, block in blocks.items()})
        with self.turn:
            self._kv.make_room(layers)
            put()
        return joined

    def _places(self) -> itertools.chain[int]:
        """Indices that layers may take: those of sets that are gone, then those behind all."""
        living = (self._own, *self._living.values())
        taken = {place for each in living for place in each.layers.values()}
        behind = len(self._stack.blocks)
        gone = [place for place in range(self._stack.layers, behind) if place not in taken]
        return itertools.chain(gone, itertools.count(behind))
