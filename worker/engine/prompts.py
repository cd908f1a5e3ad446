"""Reads prompts between two launches, chunk by chunk, and takes from the prefix cache what it can.

A chunk is ``config.prefill_tokens`` long, and the last of a prompt as long as what is left; where
prompts are kept, the first chunks are shorter (``next_cut``). Nothing else ever cuts a prompt. How
many tokens are read together decides the last bits of their entries, so a prompt's entries depend
on no neighbour, and those of another prompt with the same chunks are its own, bit for bit. What was
decoded token by token is not kept: reading it would give other bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from functools import partial
from itertools import takewhile

from offramp.controller.errors import ConfigError
from offramp.worker.decoding.decoder import Decoder
from offramp.worker.decoding.emit import Emitter
from offramp.worker.decoding.sequence import Sequence
from offramp.worker.engine.engine_config import MIB, EngineConfig
from offramp.worker.engine.prefixes import PrefixCache, beginnings, next_cut


class PromptReader:
    """Reads the prompts of rows.

    Args:
        decoder: Runs chunks over the cache.
        emitter: Emits the first token of a prompt that was read.
        config: Says how long a chunk is, and what may be kept of prompts.

    Raises:
        ConfigError: the prefix cache would hold not even one chunk.
    """

    def __init__(self, decoder: Decoder, emitter: Emitter, config: EngineConfig) -> None:
        self._decoder, self._kv, self._emitter = decoder, decoder.kv, emitter
        self._chunk = config.prefill_tokens
        most_bytes = int(config.prefix_cache_mib * MIB)
        self.prefixes = PrefixCache(most_bytes) if most_bytes else None
        least = self._kv.bytes_per_token // self._kv.held * self._chunk
        if 0 < most_bytes < least:
            raise ConfigError(
                "prefix_cache_mib",
                f"{config.prefix_cache_mib} MiB hold less than the {self._chunk} tokens that are "
                "read and kept together",
                f"Give at least {least / MIB:.1f}, read fewer together, or give 0 to keep nothing",
            )

    def read(self, rows: Iterable[Sequence]) -> None:
        """Read the next chunks of prompts, first come, first served: in all at most as many tokens
        as the longest has, lest running rows wait longer. What is taken from the prefix cache does
        not count: copying a whole context takes less than reading such a chunk.
        """
        left = self._chunk
        for row in rows:
            try:
                while not row.is_prefilled:
                    if row.prefilled == 0:
                        self._recall(row)
                    tokens = self._next_end(row) - row.prefilled
                    if tokens > left:
                        return
                    left -= tokens
                    self._read(row, tokens)
            except Exception as error:
                row.error = error

    def _next_end(self, row: Sequence) -> int:
        """Where the row's next chunk ends."""
        read, chunk = row.prefilled, self._chunk
        end = next_cut(read, chunk) if self._may_share(row) else read + chunk
        return min(end, len(row.request.prompt))

    def _may_share(self, row: Sequence) -> bool:
        """Whether the prompt's entries are the same for every request that begins so.

        Where tokens may leave they are not: some are projected, and those above attend to them.
        Nor does such a row recall others': its tokens must depend on nothing but its request.
        """
        return self.prefixes is not None and row.request.prompts is None

    def _read(self, row: Sequence, tokens: int) -> None:
        self._kv.reserve(row.prefilled + tokens)
        judged = self._decoder.prefill(row, tokens)
        self._keep(row)
        if judged is not None:
            self._emitter.emit(row, *judged, self._decoder.stack.layers)

    def _recall(self, row: Sequence) -> None:
        """Copy what is known of the prompt's beginning into the row's slot.

        At least its last chunk is read: the first token is drawn from the state after it.
        """
        if self.prefixes is None or not self._may_share(row):
            return
        if row.request.sampling.prompt_logprobs is not None:
            return  # which need the states of all of the prompt's tokens
        found, row.recalled = [], 0
        for end, name in self._beginnings(row):
            entries = self.prefixes.find(name)
            if entries is None or end == len(row.request.prompt):
                break
            found.append((slice(row.recalled, end), entries))
            row.recalled = end
        self._kv.reserve(row.recalled)
        for where, entries in found:
            self._kv.restore(row.slot, where, self._layers(row), entries)
        row.prefilled = row.recalled

    def _keep(self, row: Sequence) -> None:
        """Keep the chunk that was just read, unless it is the shorter one at a prompt's end."""
        if self.prefixes is None or not self._may_share(row):
            return
        read = takewhile(lambda each: each[0] <= row.prefilled, self._beginnings(row))
        ends, names = zip((0, b""), *read, strict=True)
        if ends[-1] == row.prefilled:
            where = slice(*ends[-2:])
            entries = partial(self._kv.entries, row.slot, where, self._layers(row))
            self.prefixes.keep(names[1:], entries)

    def _beginnings(self, row: Sequence) -> Iterator[tuple[int, bytes]]:
        """Name the prompt's beginnings; a policy matters only if adapter layers read along."""
        reader, request = self._decoder.reader, row.request
        behind = self._layers(row)[self._decoder.stack.layers :]
        digest = reader.under(request.snapshot).digest if behind else ""
        root = f"{digest} {behind} {request.cache_salt}"
        return beginnings(root, request.prompt, self._chunk)

    def _layers(self, row: Sequence) -> Items[int]:
        """Indices of the layers that have entries of the prompt: the model's, then adapters'."""
        reader = self._decoder.reader
        adapters = reader.under(row.request.snapshot).layers
        behind = (adapters[exit_] for exit_ in sorted(reader.exits_with_layers([row])))
        return [*range(self._decoder.stack.layers), *behind]
