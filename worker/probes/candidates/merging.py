"""What followed before, and then what a table says: candidates without doubles, compiled.

Shape suffixes: N rows, K candidates, V vocabulary, J followers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.controller.policies.net_kernel import compiled


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
def merge_rows(table_VK: Any, last_N: Any, followers_NJ: Any) -> Any:
    """Merge the candidates of N rows with these last tokens, [N, K]."""
    out_NK = np.empty((last_N.size, table_VK.shape[1]), np.int32)
    for n in range(last_N.size):
        merge_row(table_VK[last_N[n]], followers_NJ[n], out_NK[n])
    return out_NK


@compiled
def _holds(tokens_K: Any, count: int, token: int) -> bool:
    for k in range(count):  # noqa: SIM110 - numba compiles loops, not generators
        if tokens_K[k] == token:
            return True
    return False
