"""Likely next tokens without the LM head: a successor table plus the row's own n-grams.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from offramp.controller.errors import ConfigError
from offramp.controller.features import IntArray
from offramp.controller.policies.candidate_table import MOST_OWN, CondensedTable, merge_row
from offramp.controller.policies.net_kernel import compiled


@compiled
def merge_rows(table_VK: Any, last_N: Any, followers_NJ: Any) -> Any:
    """Merge the candidates of N rows with these last tokens, [N, K]."""
    out_NK = np.empty((last_N.size, table_VK.shape[1]), np.int32)
    for n in range(last_N.size):
        merge_row(table_VK[last_N[n]], followers_NJ[n], out_NK[n])
    return out_NK


FOLLOWERS = 4
"""Distinct followers remembered per n-gram, the latest first."""


def successor_table(documents: Iterable[Sequence[int]], vocab: int, width: int) -> IntArray:
    """The most frequent successors of each token, [V, K] int32, most frequent first.

    Rows with fewer than K distinct successors are filled up with the most frequent tokens, and so
    are those of the rarest pairs beyond ``MOST_OWN``: a release can carry every such table.

    Args:
        documents: Token ids per document.
        vocab: V, number of tokens.
        width: K, candidates per token.

    Raises:
        ConfigError: the width does not fit into the vocabulary, or the table into memory.
    """
    if not 2 <= width <= vocab:
        raise ConfigError("candidates", f"{width} is not between 2 and the vocabulary's {vocab}")
    pairs = [_pairs(np.asarray(tokens, np.int64), vocab) for tokens in documents]
    codes, counts = np.unique(np.concatenate(pairs or [np.empty(0, np.int64)]), return_counts=True)
    previous, following = np.divmod(codes, vocab)
    popular = _most_popular(following, counts, vocab)
    order = np.lexsort((following, -counts, previous))
    previous, following, counts = previous[order], following[order], counts[order]
    rank = np.arange(len(previous)) - np.searchsorted(previous, previous)
    kept = np.flatnonzero(rank < width)
    kept = np.sort(kept[np.argsort(-counts[kept], kind="stable")[:MOST_OWN]])
    lengths = np.bincount(previous[kept], minlength=vocab)
    parts = (popular[:width], lengths, following[kept])
    table = CondensedTable(*(np.ascontiguousarray(part, np.int32) for part in parts))
    if fault := table.fault():
        raise ConfigError("candidates", f"the table {fault}", "Ask for fewer candidates")
    return table.spread()


class NgramIndex:
    """What followed the current suffix earlier in this row (bigrams first, then unigrams)."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._after_one: dict[int, list[int]] = {}
        self._after_two: dict[tuple[int, int], list[int]] = {}
        self._last = -1
        self._before_last = -1
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the row."""
        if self._last >= 0:
            _remember(self._after_one.setdefault(self._last, []), token)
            if self._before_last >= 0:
                key = (self._before_last, self._last)
                _remember(self._after_two.setdefault(key, []), token)
        self._before_last = self._last
        self._last = token

    def followers(self, drafted: Sequence[int] = ()) -> tuple[int, list[int]]:
        """The last token, and what followed the last two and the last one before."""
        before_last, last = self._before_last, self._last
        if drafted:
            before_last, last = (before_last, last, *drafted)[-2:]
        after = self._after_two.get((before_last, last), []) + self._after_one.get(last, [])
        return last, after


def candidates_of(
    rows: Sequence[NgramIndex], table_VK: IntArray, drafted: Sequence[Sequence[int]]
) -> IntArray:
    """K distinct candidates for the token after each row's last one, [N, K] int32.

    Args:
        rows: Index of each row, N in all.
        table_VK: The successor table.
        drafted: Each row's tokens after those pushed; () if no row has any.
    """
    last_N = np.empty(len(rows), np.int64)
    followers_NJ = np.full((len(rows), 2 * FOLLOWERS), -1, np.int32)
    for n, row in enumerate(rows):
        last_N[n], after = row.followers(drafted[n] if drafted else ())
        followers_NJ[n, : len(after)] = after
    merged: IntArray = merge_rows(table_VK, last_N, followers_NJ)
    return merged


def _remember(followers: list[int], token: int) -> None:
    if token in followers:
        followers.remove(token)
    followers.insert(0, token)
    del followers[FOLLOWERS:]


def _pairs(tokens: np.ndarray, vocab: int) -> np.ndarray:
    return np.asarray(tokens[:-1] * vocab + tokens[1:])


def _most_popular(following: np.ndarray, counts: np.ndarray, vocab: int) -> np.ndarray:
    totals = np.bincount(following, weights=counts, minlength=vocab)
    return np.argsort(-totals, kind="stable")
