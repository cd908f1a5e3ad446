"""Candidate tables, condensed: most tokens were followed by few others, and the rest is common.

A table [V, K] holds K likely next tokens of each token. Whole, it grows with the vocabulary: 12 MB
at 49,152 tokens, 67 MB at 262,144. As a release carries it, a row keeps its *own* successors only,
and is filled up with the tokens that are common to all rows: it grows with what was seen.

Shape suffixes: V vocabulary, K candidates, P own successors of all rows together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from offramp.controller.errors import ConfigError
from offramp.controller.features import IntArray
from offramp.controller.policies.net_kernel import compiled

MOST_OWN = 1_000_000
"""Own successors that a release carries: 4 MB, half of what its bytes may be."""

MOST_ENTRIES = 2**27
"""V·K of the largest table that is spread: 0.5 GiB."""


class CondensedTable(NamedTuple):
    """A candidate table as a release carries it, all int32.

    Attributes:
        common: K tokens that fill rows up, the likeliest first.
        lengths: Own successors of each token, [V].
        own: Own successors of all rows, one row after the other, [P].
    """

    common: IntArray
    lengths: IntArray
    own: IntArray

    def fault(self) -> str:
        """What makes it no table; "" if nothing does."""
        if any(each.dtype != np.int32 or each.ndim != 1 for each in self):
            return "has a part that is no row of int32"
        width, vocab = len(self.common), len(self.lengths)
        if not 0 < width <= vocab or width * vocab > MOST_ENTRIES:
            return f"is of {vocab} tokens by {width} candidates"
        if self.lengths.min() < 0 or self.lengths.max() > width:
            return f"has rows of other lengths than 0 to {width}"
        if int(self.lengths.sum(dtype=np.int64)) != len(self.own):
            return f"has {len(self.own)} own successors, not the sum of its rows' lengths"
        tokens = np.concatenate((self.common, self.own))
        if tokens.min() < 0 or tokens.max() >= vocab:
            return f"names tokens outside [0, {vocab})"
        return ""

    def spread(self) -> IntArray:
        """The whole table, [V, K]; the parts must be without ``fault``."""
        table_VK: IntArray = _spread(self.common, self.lengths, self.own)
        return table_VK


def condense(table_VK: IntArray) -> CondensedTable:
    """What ``spread`` makes the same table of.

    Args:
        table_VK: As ``successor_table`` makes it. Any other comes back, too, but is hardly
            shorter, since its rows do not end in the same tokens.
    """
    table_VK = np.ascontiguousarray(table_VK, np.int32)
    width = table_VK.shape[1]
    # Tokens without successors of their own all have one row: the commonest, by a checksum.
    draws = np.random.default_rng(0).integers(2**62, size=width)
    codes = table_VK.astype(np.int64) @ draws
    _, first, times = np.unique(codes, return_index=True, return_counts=True)
    common = np.ascontiguousarray(table_VK[first[times.argmax()]])
    lengths = _own_lengths(table_VK, common)
    found = CondensedTable(common, lengths, _own(table_VK, lengths))
    # A row that names a token twice does not end as others do.
    odd_V = (found.spread() != table_VK).any(1)
    lengths[odd_V] = width
    return CondensedTable(common, lengths, _own(table_VK, lengths))


def require_condensable(table_VK: IntArray) -> None:
    """Refuse a table that no release can carry, before hours are spent on a policy that reads it.

    Raises:
        ConfigError: its rows have too many successors of their own.
    """
    own = len(condense(table_VK).own)
    if own > MOST_OWN:
        raise ConfigError(
            "candidates",
            f"hold {own:,} successors, over the {MOST_OWN:,} that a release can carry",
            "Record again: offramp record keeps the most frequent ones",
        )


@compiled
def merge_row(table_K: Any, followers_J: Any, out_K: Any) -> None:
    """K distinct candidates of one row: its own followers (-1 is none), then the table's.

    Args:
        table_K: The table's, int32, distinct.
        followers_J: The row's own, the likeliest first, int32.
        out_K: Where they go.
    """
    count = 0
    for token in followers_J:
        if token >= 0 and count < out_K.size and not _holds(out_K, count, token):
            out_K[count] = token
            count += 1
    own = count
    for token in table_K:
        if count == out_K.size:
            break
        if not _holds(out_K, own, token):
            out_K[count] = token
            count += 1


@compiled
def _holds(tokens_K: Any, count: int, token: int) -> bool:
    for k in range(count):  # noqa: SIM110 - numba compiles loops, not generators
        if tokens_K[k] == token:
            return True
    return False


@compiled
def _spread(common_K: Any, lengths_V: Any, own_P: Any) -> Any:
    # Zeros: a row that common tokens cannot fill, since one is there twice, names valid tokens.
    table_VK = np.zeros((lengths_V.size, common_K.size), np.int32)
    start = 0
    for v in range(lengths_V.size):
        end = start + lengths_V[v]
        if end - start == common_K.size:
            table_VK[v] = own_P[start:end]
        else:
            merge_row(common_K, own_P[start:end], table_VK[v])
        start = end
    return table_VK


def _own(table_VK: IntArray, lengths_V: IntArray) -> IntArray:
    is_own_VK = np.arange(table_VK.shape[1]) < lengths_V[:, None]
    return np.ascontiguousarray(table_VK[is_own_VK])


def _own_lengths(table_VK: IntArray, common_K: IntArray) -> IntArray:
    """How many leading tokens of each row are not what filling up would give, [V] int32."""
    vocab, width = table_VK.shape
    place_T = np.full(max(vocab, int(table_VK.max()) + 1), -1, np.int32)
    place_T[common_K] = np.arange(width, dtype=np.int32)
    place_VK = place_T[table_VK]
    # Filling up takes common tokens in order, so the rest of a row ascends to its end ...
    climbs_VK = (place_VK[:, :-1] >= 0) & (place_VK[:, :-1] < place_VK[:, 1:])
    rest_V = np.logical_and.accumulate(climbs_VK[:, ::-1], axis=1).sum(1) + 1
    # ... and leaves out none that the row does not hold.
    last_V = place_VK[:, -1]
    held_V = ((place_VK >= 0) & (place_VK <= last_V[:, None])).sum(1)
    is_filled_V = (last_V >= 0) & (held_V == last_V + 1)
    lengths_V: IntArray = np.where(is_filled_V, width - rest_V, width).astype(np.int32)
    return lengths_V
