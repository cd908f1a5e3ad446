"""What a policy would see of recorded tokens: features of its schema, and the outlook.

Shape suffixes: N tokens, M rows asked, F features, C outlook columns.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.errors import ConfigError
from offramp.controller.features import (
    OUTLOOK_V1,
    SCHEMAS,
    SOFTMAX_V2,
    STATE_V1,
    FloatArray,
    hidden_schema,
)
from offramp.controller.policies.protocols import IndexArray, Policy
from offramp.envs.traces.tokens import TokenTraces

OUTLOOK_TOKENS = 256.0
"""Divides token counts in OUTLOOK_V1."""


class RecordedFeatures:
    """Recorded tokens as one policy's probe shows them.

    SOFTMAX_V2 is exact for any exits and jumps. The recorded schema is shown as recorded: its
    columns that compare with the last probe compare with the recorded exit before, whether or not
    this policy asked there. Of STATE_V1 the columns that the recorded schema has too are shown,
    likewise; the others are NaN, so the policy must name the one ``column`` that it reads.

    Args:
        policy: Its exits must have been recorded, and its schema, or be SOFTMAX_V2.
        traces: Recorded tokens to show.

    Attributes:
        recorded: Index into the recorded exits of each of the policy's exits.

    Raises:
        ConfigError: the policy asks at a layer, or reads a schema, that was not recorded.
    """

    def __init__(self, policy: Policy, traces: TokenTraces) -> None:
        exits = traces.header.exits
        missing = set(policy.exits) - set(exits)
        if missing:
            raise ConfigError("exits", f"{sorted(missing)} were not recorded", f"Recorded: {exits}")
        _check_schema(policy, traces)
        self.recorded = [exits.index(layer) for layer in policy.exits]
        self._schema = policy.schema
        self._traces = traces
        self._best_N = np.full(len(traces), -1, np.int32)
        self._run_N = np.zeros(len(traces), np.float32)

    def features(self, here: int, rows_M: IndexArray) -> FloatArray:
        """Features [M, F] of some rows at the policy's exit ``here``; ask in order of exits."""
        index = self.recorded[here]
        if self._schema is None:
            return np.empty((len(rows_M), 0), np.float32)
        if self._schema.digest == self._traces.header.schema:
            return np.asarray(self._traces.features_NEF[rows_M, index])
        if self._schema.name == "hidden":
            assert self._traces.state_NED is not None  # checked above
            return np.asarray(self._traces.state_NED[rows_M, index], np.float32)
        if self._schema == STATE_V1:
            return self._state(index, rows_M)
        return self._softmax(index, rows_M)

    def _state(self, index: int, rows_M: IndexArray) -> FloatArray:
        out_MF = np.full((len(rows_M), STATE_V1.width), np.nan, np.float32)
        recorded = SCHEMAS[self._traces.header.schema]
        for column in set(STATE_V1.columns) & set(recorded.columns):
            values_NE = self._traces.features_NEF[:, :, recorded.index(column)]
            out_MF[:, STATE_V1.index(column)] = values_NE[rows_M, index]
        return out_MF

    def _softmax(self, index: int, rows_M: IndexArray) -> FloatArray:
        """SOFTMAX_V2; remembers the token seen, as the probe does."""
        traces = self._traces
        best_M = traces.exit_token_NE[rows_M, index]
        agrees_M = best_M == self._best_N[rows_M]
        run_M = np.where(agrees_M, self._run_N[rows_M] + 1, 0)
        self._best_N[rows_M], self._run_N[rows_M] = best_M, run_M
        out_MF = np.empty((len(rows_M), SOFTMAX_V2.width), np.float32)
        out_MF[:, :3] = traces.softmax_NES[rows_M, index]
        out_MF[:, 3] = agrees_M
        out_MF[:, 4] = run_M / len(self.recorded)
        recorded = SCHEMAS[traces.header.schema]
        for column in ("depth", "position"):
            values_NE = traces.features_NEF[:, :, recorded.index(column)]
            out_MF[:, SOFTMAX_V2.index(column)] = values_NE[rows_M, index]
        return out_MF


def documents(traces: TokenTraces) -> list[IndexArray]:
    """Rows of each document, in order."""
    ends = np.flatnonzero(np.diff(traces.document_N)) + 1
    return np.split(np.arange(len(traces)), ends)


def outlook(traces: TokenTraces) -> FloatArray:
    """OUTLOOK_V1 of tokens whose completion is their whole document, [N, C].

    ``step`` and ``left`` are exact. The rest is what a lone row without drafts would show:
    nothing pending, no debt, all accepted, the last token at full depth, one slot, nobody waiting.
    """
    steps = [np.arange(len(rows)) for rows in documents(traces)]
    step_N = np.concatenate(steps)
    tokens_N = np.concatenate([np.full(len(each), len(each)) for each in steps])
    out_NC = np.zeros((len(traces), OUTLOOK_V1.width), np.float32)
    out_NC[:, OUTLOOK_V1.index("step")] = step_N / OUTLOOK_TOKENS
    out_NC[:, OUTLOOK_V1.index("left")] = (tokens_N - step_N) / OUTLOOK_TOKENS
    for column in ("acceptance", "last_depth", "active"):
        out_NC[:, OUTLOOK_V1.index(column)] = 1.0
    return out_NC


def _check_schema(policy: Policy, traces: TokenTraces) -> None:
    schema = policy.schema
    if schema is None or schema.digest in (traces.header.schema, SOFTMAX_V2.digest):
        return
    if schema == hidden_schema(traces.header.width) and traces.state_NED is not None:
        return
    shared = set(schema.columns) & set(SCHEMAS[traces.header.schema].columns)
    if schema == STATE_V1 and getattr(policy, "column", None) in shared:
        return
    raise ConfigError(
        "schema",
        f"{schema.name!r} version {schema.version} was not recorded",
        f"Recorded: {SCHEMAS[traces.header.schema].name!r} and 'softmax'",
    )
