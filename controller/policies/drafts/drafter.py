"""What drafting policies share.

Shape suffixes: N rows, C columns of outlook.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, SOFTMAX_V2, FloatArray
from offramp.controller.policies.exits import ascend
from offramp.controller.policies.protocols import IndexArray

PENDING = OUTLOOK_V1.index("pending")
ACCEPTANCE = OUTLOOK_V1.index("acceptance")
TOP1 = SOFTMAX_V2.index("top1")
"""Column of the top-1 probability, in CANDIDATES_V1 as well."""

assert CANDIDATES_V1.index("top1") == TOP1


def open_drafts(outlook_NC: FloatArray, max_pending: int) -> IndexArray:
    """Drafts that are open, [N]."""
    return np.rint(outlook_NC[:, PENDING] * max_pending).astype(np.int64)


def require_length(length: int, max_pending: int) -> None:
    """Refuse to draft fewer than one token, or more than may be open.

    Raises:
        RequestError: naming the length.
    """
    if not 1 <= length <= max_pending:
        raise RequestError("length", f"{length} is not from 1 to {max_pending}")


def require_share(name: str, value: float) -> None:
    """Refuse a number outside of [0, 1].

    Raises:
        RequestError: naming it.
    """
    if not 0 <= value <= 1:
        raise RequestError(name, f"{value} is not in [0, 1]")


def require_exits(exits: tuple[int, ...]) -> None:
    """Refuse exits that do not ascend from 1 on.

    Raises:
        RequestError: naming them.
    """
    if not exits or not ascend(exits):
        remedy = "Sort them, those on a copy first"
        raise RequestError("exits", f"{exits} do not ascend from 1 on", remedy)
