"""What draft-and-verify episodes are replayed from: recorded tokens, and prices as arrays.

Shape suffixes: N tokens, E exits, S softmax columns, W tokens in one launch (the first entry is
for one), D depths, M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import (
    CANDIDATES_V1,
    KEEP,
    OUTLOOK_V1,
    SOFTMAX_V2,
    BoolArray,
    FloatArray,
    IntArray,
)
from offramp.envs.cores.batch import IndexArray
from offramp.envs.cores.walk import Actions
from offramp.envs.traces.tokens import TokenTraces

SecondsArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CandidateDrafts(TokenTraces):
    """Tokens as policies meet them that draft the best candidate, without the head.

    An exit's token is its best candidate; top1, margin and entropy are those of the candidates.
    """


@dataclass(frozen=True, slots=True)
class DraftPrices:
    """Seconds of what a cycle is made of, for one row.

    Attributes:
        layer_W, head_W: One layer, and the head, over 1, 2, … tokens.
        ask_s: One probe and one decision. Leaving costs nothing more: the whole-softmax probe
            computes the head, and the best candidate takes none.
        build_s: Preparing the probe, once per token that is asked at all.
        start_s: The decision before the first layer.
        step_s: What every token pays besides.
        full_s: One token at full depth, undrafted: the unit of time.
    """

    layer_W: SecondsArray
    head_W: SecondsArray
    ask_s: float
    build_s: float
    start_s: float
    step_s: float
    full_s: float

    @classmethod
    def of(
        cls, costs: CostTable, max_pending: int, *, probes: bool = True, headless: bool = False
    ) -> DraftPrices:
        """Read prices off measured costs.

        Args:
            costs: Hold the probe of SOFTMAX_V2, or, if headless, of CANDIDATES_V1; a table of
                constants is taken as it is.
            max_pending: Drafts that may be open.
            probes: Whether exits are probed; a policy that reads nothing still asks for the head
                of each draft.
            headless: Whether candidates are probed and drafted.

        Raises:
            ConfigError: that probe, or launches of ``max_pending`` + 1 tokens, were not measured.
        """
        schema = CANDIDATES_V1 if headless else SOFTMAX_V2
        other_probe = costs.batches and costs.schema != schema.name
        measured = costs.with_probe(schema.name) if other_probe else costs
        one = measured.at(1)
        spans = [measured.launch(tokens) for tokens in range(1, max_pending + 2)]
        return cls(
            layer_W=np.array([each.layer_s for each in spans]),
            head_W=np.array([each.head_s for each in spans]),
            ask_s=one.policy_s + (one.probe_s if probes else one.head_s),
            build_s=one.build_s * probes,
            start_s=one.policy_s,
            step_s=one.step_s,
            full_s=one.full_s,
        )


@dataclass(frozen=True, slots=True)
class DraftTables:
    """Recorded tokens as an episode reads them.

    Attributes:
        sure_NES: Top1, margin and entropy, of the full vocabulary or of the candidates.
        token_NE: The exit's token.
        right_NE: Whether it is full depth's.
        first_N, end_N: First token of each token's document, and the one after its last.
        startable_M: Tokens that are not their document's last.
        depth_D: Layers executed before the first exit, at each exit, and at the end, [E + 2].
    """

    sure_NES: FloatArray
    token_NE: IntArray
    right_NE: BoolArray
    first_N: IndexArray
    end_N: IndexArray
    startable_M: IndexArray
    depth_D: IndexArray

    @classmethod
    def of(cls, traces: TokenTraces) -> DraftTables:
        """Lay out traces whose documents' tokens are contiguous and in order.

        Raises:
            TraceError: no document has two tokens.
        """
        starts = np.flatnonzero(np.diff(traces.document_N, prepend=-1))
        lengths = np.diff(starts, append=len(traces))
        end_N = np.repeat(starts + lengths, lengths)
        startable_M = np.flatnonzero(np.arange(len(traces)) < end_N - 1)
        if not len(startable_M):
            raise TraceError("traces", "hold no document of two tokens", "Record longer ones")
        return cls(
            sure_NES=traces.softmax_NES,
            token_NE=traces.exit_token_NE,
            right_NE=traces.agree_NE > 0,
            first_N=np.repeat(starts, lengths),
            end_N=end_N,
            startable_M=startable_M,
            depth_D=np.array([0, *traces.header.exits, traces.header.layers]),
        )


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


def require_arguments(num_envs: int, max_pending: int, cycles: int | None) -> None:
    """Refuse counts below 1.

    Raises:
        ConfigError: naming the one.
    """
    if num_envs < 1:
        raise ConfigError("num_envs", f"{num_envs} is below 1")
    if max_pending < 1:
        raise ConfigError("max_pending", f"{max_pending} is below 1")
    if cycles is not None and cycles < 1:
        raise ConfigError("cycles", f"{cycles} is below 1", "None goes to the document's end")


class DraftActions(Actions):
    """Before the first layer, action a asks first at exit a. At exit i, 0 leaves and k asks next
    at exit i + k. The last one, E, verifies now: all layers, unasked, from anywhere.

    Args:
        exits: Number E of recorded exits; there are E + 1 actions.
    """

    def __init__(self, exits: int) -> None:
        super().__init__("jump", exits, jumps=exits)

    def targets(self, here_B: IndexArray, actions_B: NDArray[Any]) -> IndexArray:
        """Exit asked at next: ``here`` leaves, E verifies, as does a jump past the last exit."""
        target_B = np.where(here_B < 0, actions_B, np.minimum(here_B + actions_B, self._exits))
        return np.where(actions_B == self._exits, self._exits, target_B)

    def masks(self, here_B: IndexArray) -> BoolArray:
        """All but the jumps past the last exit, [B, A]."""
        action_A = np.arange(self.count)
        reach_BA = np.maximum(here_B, 0)[:, None] + action_A
        return np.asarray((reach_BA < self._exits) | (action_A == self._exits))


FEATURES = SOFTMAX_V2.width
COLUMNS = FEATURES + OUTLOOK_V1.width + 2
"""Features, outlook, trust, place."""

AGREES, RUN_LENGTH, DEPTH = (SOFTMAX_V2.index(name) for name in ("agrees", "run_length", "depth"))

STEP_SCALE = 256.0
"""Tokens, the unit of the outlook's ``step`` and ``left``."""

STEP, LEFT, PENDING, DEBT, ACCEPTANCE, LAST_DEPTH, ACTIVE, _WAITING = range(OUTLOOK_V1.width)


class DraftView:
    """The columns of B episodes that depend on their past, and their observations.

    Args:
        num_envs: Number B of parallel episodes.
        tables: The recorded tokens.
        max_pending: Drafts that may be open.
    """

    def __init__(self, num_envs: int, tables: DraftTables, max_pending: int) -> None:
        self._tables = tables
        self._max_pending = max_pending
        self._exits = tables.right_NE.shape[1]
        self._best_B = np.full(num_envs, -1, np.int64)  # token of the last probe
        self._run_B = np.zeros(num_envs, np.float32)  # probes since that agreed with it
        self._debt_B = np.zeros(num_envs, np.float32)
        self._acceptance_B = np.ones(num_envs, np.float32)
        self._last_depth_B = np.ones(num_envs, np.float32)
        self._trust_B = np.ones(num_envs, np.float32)

    def probed(self, place_K: IndexArray, token_K: IndexArray, here_K: IndexArray) -> None:
        """Exits were asked at; what their token is compared to is the last exit asked at."""
        best_K = self._tables.token_NE[token_K, here_K]
        agrees_K = best_K == self._best_B[place_K]
        self._run_B[place_K] = np.where(agrees_K, self._run_B[place_K] + 1, 0)
        self._best_B[place_K] = best_K

    def begin_token(self, place_K: IndexArray) -> None:
        """A new token: nothing is probed yet."""
        self._best_B[place_K] = -1
        self._run_B[place_K] = 0

    def begin(self, place_K: IndexArray) -> None:
        """A new completion: its first token came from the prompt, at full depth."""
        self._debt_B[place_K] = 0
        self._acceptance_B[place_K] = 1
        self._last_depth_B[place_K] = 1
        self._trust_B[place_K] = 1

    def drafted(self, place_K: IndexArray, depth_K: IndexArray, chance_K: FloatArray) -> None:
        """A token left early, after so many layers, with such a chance of being right."""
        share_K = (depth_K / self._tables.depth_D[-1]).astype(np.float32)
        self._last_depth_B[place_K] = share_K
        self._debt_B[place_K] = KEEP * self._debt_B[place_K] + (1 - KEEP) * (1 - share_K)
        self._trust_B[place_K] *= chance_K
        self.begin_token(place_K)

    def verified(self, place_K: IndexArray, right_K: IndexArray, pending_K: IndexArray) -> None:
        """A token ran all layers, and the drafts before it were judged."""
        self._last_depth_B[place_K] = 1
        self._debt_B[place_K] *= KEEP
        self._trust_B[place_K] = 1
        missing_K = (1 - self._acceptance_B[place_K]) * np.float32(KEEP) ** right_K
        wrong_K = np.where(right_K < pending_K, KEEP, 1.0)
        self._acceptance_B[place_K] = (1 - missing_K) * wrong_K

    def observe(
        self, place_K: IndexArray, token_K: IndexArray, here_K: IndexArray, pending_K: IndexArray
    ) -> FloatArray:
        """Observations [K, D] at these tokens and exits (−1: before the first layer)."""
        tables = self._tables
        token_K = np.minimum(token_K, len(tables.first_N) - 1)  # of one that is over
        obs_KD = np.zeros((len(place_K), COLUMNS), np.float32)
        asked_K = np.flatnonzero(here_K >= 0)
        here = here_K[asked_K]
        run_K = self._run_B[place_K[asked_K]]
        obs_KD[asked_K, :AGREES] = tables.sure_NES[token_K[asked_K], here]
        obs_KD[asked_K, AGREES] = run_K > 0
        obs_KD[asked_K, RUN_LENGTH] = run_K / self._exits
        obs_KD[asked_K, DEPTH] = tables.depth_D[here + 1] / tables.depth_D[-1]
        outlook_KC = obs_KD[:, FEATURES:-2]
        outlook_KC[:, STEP] = (token_K - tables.first_N[token_K] + 1) / STEP_SCALE
        outlook_KC[:, LEFT] = (tables.end_N[token_K] - token_K) / STEP_SCALE
        outlook_KC[:, PENDING] = pending_K / self._max_pending
        outlook_KC[:, DEBT] = self._debt_B[place_K]
        outlook_KC[:, ACCEPTANCE] = self._acceptance_B[place_K]
        outlook_KC[:, LAST_DEPTH] = self._last_depth_B[place_K]
        outlook_KC[:, ACTIVE] = 1
        obs_KD[:, -2] = self._trust_B[place_K]
        obs_KD[:, -1] = (here_K + 1) / self._exits
        return obs_KD
