"""What draft-and-verify episodes are replayed from: recorded tokens, and prices as arrays.

Shape suffixes: N tokens, E exits, F features, W tokens in one launch (index W − 1), L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import SCHEMAS, BoolArray, FeatureSchema, FloatArray
from offramp.envs.tokens import TokenTraces

SecondsArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

KNOWS_HEAD = frozenset({"softmax"})
"""Schemas whose probe computes the whole head, from which the draft is then read for nothing."""

TIMELESS = frozenset({"top1", "margin", "entropy", "top_logit", "depth", "position"})
"""Columns that do not depend on which exits were asked before: a jump leaves them as recorded."""


@dataclass(frozen=True, slots=True)
class DraftPrices:
    """Seconds of what a cycle is made of, for one row.

    Attributes:
        layer_W, head_W: One layer, and the head, over 1, 2, … tokens.
        ask_s: One probe and one decision.
        build_s: Preparing the probe, once per token that is asked at all.
        start_s: The decision before the first layer.
        draft_s: The head of a draft; 0 if its probe has computed it.
        step_s: What every token pays besides.
        full_s: One token at full depth, undrafted: the unit of time.
    """

    layer_W: SecondsArray
    head_W: SecondsArray
    ask_s: float
    build_s: float
    start_s: float
    draft_s: float
    step_s: float
    full_s: float

    @classmethod
    def of(cls, costs: CostTable, schema: FeatureSchema | None, max_pending: int) -> DraftPrices:
        """From measured costs.

        Args:
            costs: Holds the probe of ``schema``.
            schema: What is probed; None: nothing, and no policy's time is charged.
            max_pending: Drafts that may be open.

        Raises:
            ConfigError: launches of ``max_pending`` + 1 tokens were not measured.
        """
        one = costs.at(1)
        spans = [costs.launch(tokens) for tokens in range(1, max_pending + 2)]
        reads = schema is not None
        has_head = schema is not None and schema.name in KNOWS_HEAD
        return cls(
            layer_W=np.array([each.layer_s for each in spans]),
            head_W=np.array([each.head_s for each in spans]),
            ask_s=(one.probe_s + one.policy_s) * reads,
            build_s=one.build_s * reads,
            start_s=one.policy_s * reads,
            draft_s=0.0 if has_head else one.head_s,
            step_s=one.step_s,
            full_s=one.full_s,
        )


@dataclass(frozen=True, slots=True)
class DraftTables:
    """Recorded tokens as an episode reads them.

    Attributes:
        features_NEF: Columns that depend on earlier probes are 0.
        right_NE: Whether the exit's token is full depth's.
        chance_NE: The probed chance of the exit's token; 1 without a column ``top1``.
        first_N, end_N: First token of each token's document, and the one after its last.
        startable_M: Tokens that are not their document's last.
        depth_D: Layers executed before the first exit, at each exit, and at the end, [E + 2].
    """

    features_NEF: FloatArray
    right_NE: BoolArray
    chance_NE: FloatArray
    first_N: IndexArray
    end_N: IndexArray
    startable_M: IndexArray
    depth_D: IndexArray

    @classmethod
    def of(cls, traces: TokenTraces) -> DraftTables:
        """Lay out traces whose documents' tokens are contiguous and in order.

        Raises:
            TraceError: no document has two tokens, or the feature schema is unknown.
        """
        schema = schema_of(traces)
        keep_F = np.array([column in TIMELESS for column in schema.columns], np.float32)
        first_N, end_N = _documents(traces)
        startable_M = np.flatnonzero(np.arange(len(traces)) < end_N - 1)
        if not len(startable_M):
            raise TraceError("traces", "hold no document of two tokens", "Record longer ones")
        right_NE = traces.agree_NE > 0
        chance_NE = np.ones(right_NE.shape, np.float32)
        if "top1" in schema.columns:
            chance_NE = traces.features_NEF[:, :, schema.index("top1")].copy()
        return cls(
            features_NEF=traces.features_NEF * keep_F,
            right_NE=right_NE,
            chance_NE=chance_NE,
            first_N=first_N,
            end_N=end_N,
            startable_M=startable_M,
            depth_D=np.array([0, *traces.header.exits, traces.header.layers]),
        )


def schema_of(traces: TokenTraces) -> FeatureSchema:
    """The schema that the traces' features were recorded under.

    Raises:
        TraceError: this version does not know it.
    """
    schema = SCHEMAS.get(traces.header.schema)
    if schema is None:
        digest = traces.header.schema[:12]
        raise TraceError("schema", f"{digest!r} is unknown", "Record the traces again")
    return schema


def require_same_model(traces: TokenTraces, costs: CostTable) -> None:
    """Refuse costs of another model.

    Raises:
        ConfigError: they are.
    """
    costs.require_model(traces.header.model)
    if costs.layers != traces.header.layers:
        raise ConfigError(
            "costs",
            f"are of a model with {costs.layers} layers, the traces of {traces.header.layers}",
            "Measure the model that was recorded",
        )


def _documents(traces: TokenTraces) -> tuple[IndexArray, IndexArray]:
    starts = np.flatnonzero(np.diff(traces.document_N, prepend=-1))
    lengths = np.diff(starts, append=len(traces))
    return np.repeat(starts, lengths), np.repeat(starts + lengths, lengths)
