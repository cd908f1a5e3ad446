"""Where in the traces a run of tokens can start.

Shape suffix: N tokens.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.errors import ConfigError, TraceError
from offramp.envs.cores.batch import IndexArray
from offramp.envs.traces.tokens import TokenTraces


class Sequences:
    """Runs of recorded tokens of one document, in order.

    Args:
        traces: Recorded tokens, document by document.
        horizon: Tokens of a run; of a shorter document, the whole of it.

    Attributes:
        starts: Rows of the traces where a run of full length (or its document) starts.
        length_N: Tokens of the run that starts at each row: the horizon, or what is left of the
            document.

    Raises:
        ConfigError: the horizon is below 1.
        TraceError: all tokens are of one document, or a document's are not in order.
    """

    def __init__(self, traces: TokenTraces, horizon: int) -> None:
        if horizon < 1:
            raise ConfigError("horizon", f"{horizon} is below 1", "Give tokens per episode")
        if len(traces.documents) < 2:
            raise TraceError(
                "documents",
                "are a single one, whose runs would all be parts of one text",
                "Record more documents",
            )
        document_N = traces.document_N
        is_next_N = np.diff(document_N) == 0
        _require_order(traces, is_next_N)
        ends = np.append(np.flatnonzero(~is_next_N) + 1, len(traces))
        end_N = np.repeat(ends, np.diff(ends, prepend=0))
        begin_N = np.repeat(np.append(0, ends[:-1]), np.diff(ends, prepend=0))
        rest_N = end_N - np.arange(len(traces))
        self.length_N: IndexArray = np.minimum(rest_N, horizon)
        self.starts: IndexArray = np.flatnonzero(rest_N >= np.minimum(horizon, end_N - begin_N))


def _require_order(traces: TokenTraces, is_next_N: np.ndarray) -> None:
    if 1 + (~is_next_N).sum() != len(np.unique(traces.document_N)):
        raise TraceError("document_N", "comes back to a document", "Keep each one's rows together")
    if (np.diff(traces.position_N)[is_next_N] != 1).any():
        raise TraceError("position_N", "skips a token of a document", "Keep its rows in order")
