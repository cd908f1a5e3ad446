"""Features that compare an exit to the one probed before it, for every such pair.

Traces are recorded with every exit probed, in order. A policy that jumps from exit p to exit e is
compared to p, not to e − 1. From what was recorded, with k running over p + 1 … e:

| column | of a jump from p to e | |
|---|---|---|
| norm_change | Σ norm_change[k] | exact |
| top1_change | top1[e] − top1[p]; 0 at the first probe | exact |
| agrees | 1 if all agrees[k] are 1, 0 if one of them is not | exact |
| agrees | more than one is not: whether the exits' whole-vocabulary tokens are equal | estimate |
| run_length | probes in a row with the same best, counted along the probes made | as agrees |
| cosine | of the hidden states, if they were recorded, and not the first probe | exact |
| cosine | else Π cosine[k] | estimate |

The product of cosines is exact if what layers p + 1 … e add at right angles to one state is also at
right angles to the states before. "Exact" is up to rounding: of float32, and for hidden states
of float16. Of ``softmax`` the best token is the whole vocabulary's, so that there agrees is always
exact. Between neighbours (e = p + 1) every column is the recorded one, bit for bit. The first
probe is compared to the embeddings (place 0).

Shape suffixes: N tokens, E exits, F feature columns, K exits on the way, D model width, P = E + 1
places probed before (0: none), Q compared columns.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.errors import TraceError
from offramp.controller.features import SCHEMAS, BoolArray, FeatureSchema, FloatArray, IntArray
from offramp.controller.traces import HalfArray, TraceHeader
from offramp.envs.traces.tokens import TokenTraces

COMPARED = ("cosine", "norm_change", "agrees", "top1_change")
"""Columns that depend on which exit was probed before."""

ALONE = frozenset({"top1", "margin", "entropy", "top_logit", "depth", "position", "run_length"})
"""Columns that depend on this exit only, and the run, which is counted along the way."""


SMALLEST = 1e-18
"""A smaller product of two lengths counts as this, as in the worker's probes."""


def schema_of(header: TraceHeader) -> FeatureSchema:
    """The schema that traces were recorded with.

    Raises:
        TraceError: this version knows no such schema.
    """
    schema = SCHEMAS.get(header.schema)
    if schema is None:
        known = ", ".join(f"{each.name} {each.version}" for each in SCHEMAS.values())
        raise TraceError(
            "schema", f"{header.schema[:12]!r} is unknown", f"Record again with one of: {known}"
        )
    return schema


class PairFeatures:
    """The compared columns of every token, for every pair of exits.

    Args:
        traces: Recorded tokens, each probed at every exit.

    Attributes:
        columns: Places of the Q compared columns in the schema.
        values_NPEQ: What they are at exit e if the probe before was at place p.
        run_column: Place of ``run_length``; None if the schema has none.
        agrees_NPE: Whether the best token is that of the probe before.

    Raises:
        TraceError: the schema is unknown, or has a column that cannot be had for a jump.
    """

    def __init__(self, traces: TokenTraces) -> None:
        schema = schema_of(traces.header)
        unknown = set(schema.columns) - ALONE - set(COMPARED)
        if unknown:
            raise TraceError(
                "schema",
                f"{schema.name!r} has {min(unknown)!r}, which is recorded for neighbours only",
                'Use actions="gate", or record another schema',
            )
        present = [name for name in COMPARED if name in schema.columns]
        self.columns = [schema.index(name) for name in present]
        has_run = "run_length" in schema.columns
        self.run_column = schema.index("run_length") if has_run else None
        tokens, exits, _ = traces.features_NEF.shape
        self.values_NPEQ = np.zeros((tokens, exits + 1, exits, len(present)), np.float32)
        columns = {name: traces.features_NEF[:, :, schema.index(name)] for name in schema.columns}
        for before in range(exits + 1):
            for here in range(before, exits):
                values = _compared(columns, traces, before, here)
                for q, name in enumerate(present):
                    self.values_NPEQ[:, before, here, q] = values[name]
        self.agrees_NPE = self._agrees(present)

    def _agrees(self, present: list[str]) -> BoolArray:
        if "agrees" not in present:
            return np.zeros(self.values_NPEQ.shape[:3], np.bool_)
        return self.values_NPEQ[..., present.index("agrees")] > 0


def _compared(
    columns: dict[str, FloatArray], traces: TokenTraces, before: int, here: int
) -> dict[str, FloatArray]:
    """Compared columns at exit ``here``, the probe before at place ``before`` (exit + 1)."""
    if here == before:
        return {name: columns[name][:, here] for name in COMPARED if name in columns}
    way = slice(before, here + 1)
    out: dict[str, FloatArray] = {}
    if "cosine" in columns:
        out["cosine"] = _cosine(columns["cosine"][:, way], traces.state_NED, before, here)
        out["norm_change"] = columns["norm_change"][:, way].sum(-1)
    if "agrees" in columns:
        out["agrees"] = _agrees(columns["agrees"][:, way], traces.exit_token_NE, before, here)
    if "top1" in columns:
        change_N = columns["top1"][:, here] - columns["top1"][:, before - 1]
        out["top1_change"] = change_N if before else np.zeros_like(change_N)
    return out


def _cosine(way_NK: FloatArray, state_NED: HalfArray | None, before: int, here: int) -> FloatArray:
    cosine_N: FloatArray
    if state_NED is None or before == 0:
        cosine_N = way_NK.prod(-1)
        return cosine_N
    now_ND, last_ND = (state_NED[:, each].astype(np.float32) for each in (here, before - 1))
    lengths_N = np.linalg.norm(now_ND, axis=-1) * np.linalg.norm(last_ND, axis=-1)
    cosine_N = np.einsum("nd,nd->n", now_ND, last_ND)
    cosine_N /= np.maximum(lengths_N, np.float32(SMALLEST))
    return cosine_N


def _agrees(way_NK: FloatArray, token_NE: IntArray, before: int, here: int) -> FloatArray:
    if before == 0:
        return np.zeros(len(way_NK), np.float32)  # a first probe agrees with nothing
    changes_N = (way_NK == 0).sum(-1)
    agrees_N: FloatArray
    same_N = token_NE[:, here] == token_NE[:, before - 1]
    agrees_N = ((changes_N == 0) | ((changes_N > 1) & same_N)).astype(np.float32)
    return agrees_N
