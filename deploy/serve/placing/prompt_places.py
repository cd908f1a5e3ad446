"""Says which worker has read the beginning of a prompt, so that it goes there again."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from offramp.worker.engine.prefixes import beginnings

MOST_NAMES = 65_536
"""Beginnings that are remembered: of 256 tokens each, more than workers keep in tens of GiB."""


class PromptPlaces:
    """Chooses workers for prompts: who has read the most of one, unless others have less to do.

    Workers keep what they read for themselves and forget it unasked, so this is a guess; a wrong
    one costs no more than reading the prompt.

    Args:
        chunk: Tokens of the longest chunk that workers read prompts in; 0: they keep nothing, and
            every prompt is new.
        slack: Requests that a worker may have more than the idlest and still be preferred.

    Attributes:
        slack: As given; it may be changed.
        load: Requests of each worker that have not ended.
        kept: Prompts by the worker that got them because it had read their beginning.
        moved: Prompts by the worker that got them because those who had read it had too much to do.
    """

    def __init__(self, chunk: int, slack: int) -> None:
        self.slack = slack
        self.load: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self._chunk = chunk
        # Workers by the name of a beginning; the least recently used first.
        self._readers: OrderedDict[bytes, set[str]] = OrderedDict()

    def names(self, prompt: Sequence[int], cache_salt: str) -> list[bytes]:
        """Names of the prompt's beginnings, the shortest first."""
        if not self._chunk:
            return []
        return [name for _, name in beginnings(cache_salt, prompt, self._chunk)]

    def choose(self, names: Sequence[bytes], workers: Collection[str], requests: int) -> str:
        """Choose a worker for requests; call ``ended`` when they have, or use ``chosen``.

        Args:
            names: Names of their prompt's beginnings, the shortest first.
            workers: Those that can take requests, one or more.
            requests: Number of requests.

        Returns:
            The worker, the idlest if none has read anything of it.
        """
        least = min(self.load[worker] for worker in workers)
        chosen, is_known = None, False
        for name in reversed(names):
            readers = self._readers.get(name, set()).intersection(workers)
            is_known |= bool(readers)
            if readers and self.load[nearest := self._idlest(readers)] <= least + self.slack:
                chosen = nearest
                self.kept[chosen] += 1
                break
        if chosen is None:
            chosen = self._idlest(workers)
            if is_known:
                self.moved[chosen] += 1
        self.load[chosen] += requests
        self.note(names, chosen)
        return chosen

    @contextmanager
    def chosen(
        self, names: Sequence[bytes], workers: Collection[str], requests: int
    ) -> Iterator[str]:
        """Choose a worker as ``choose`` does, for requests that have ended when the block has."""
        chosen = self.choose(names, workers, requests)
        try:
            yield chosen
        finally:
            self.ended(chosen, requests)

    def ended(self, worker: str, requests: int) -> None:
        """Note that requests of a worker have ended."""
        self.load[worker] -= requests
        if not self.load[worker]:
            del self.load[worker]

    def note(self, names: Sequence[bytes], worker: str) -> None:
        """Note that a worker has read a prompt, or will in a moment."""
        # The longest first: without the shorter ones it is of no use.
        for name in reversed(names):
            self._readers.setdefault(name, set()).add(worker)
            self._readers.move_to_end(name)
        while len(self._readers) > MOST_NAMES:
            self._readers.popitem(last=False)

    def _idlest(self, workers: Collection[str]) -> str:
        # Of several at random: else the first would read whatever comes when all are idle.
        return min(workers, key=lambda worker: (self.load[worker], random.random()))
