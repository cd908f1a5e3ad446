"""What draft-and-verify episodes are replayed from: recorded tokens, and prices as arrays.

Shape suffixes: N tokens, E exits, L layers, S softmax columns, W tokens in one launch (the first
entry is for one), D depths, M tokens, B parallel episodes, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from offramp.controller.costs.prices import ROUTED
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, BoolArray, FloatArray, IntArray
from offramp.controller.policies.drafts.draft_trust import odds_of_top1
from offramp.controller.policies.exits import copy_weights, is_on_copy
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
        layer_W, head_W, step_W: One layer, the head, and what a launch pays besides, over 1, 2, …
            tokens.
        ask_s: One probe and one decision. Leaving costs nothing more: the whole-softmax probe
            computes the head, and the best candidate takes none.
        copy_layer_s, copy_ask_s: One layer over one token, and asking, on the copy that exits
            are on; the model's own where none are.
        fill_s: The entries of one token at one layer that a later draft on the copy reads.
        build_s: Preparing a row to be asked, and its probe, once per token that is asked at all.
        start_s: The decision before the first layer.
        full_s: One token at full depth, undrafted: the unit of time.
    """

    layer_W: SecondsArray
    head_W: SecondsArray
    step_W: SecondsArray
    ask_s: float
    copy_layer_s: float
    copy_ask_s: float
    fill_s: float
    build_s: float
    start_s: float
    full_s: float

    @classmethod
    def of(
        cls,
        costs: CostTable,
        max_pending: int,
        exits: Sequence[int] = (),
        *,
        probes: bool = True,
        headless: bool = False,
    ) -> DraftPrices:
        """Read prices off measured costs.

        Args:
            costs: Hold the probe of SOFTMAX_V2, or, if headless, of CANDIDATES_V1; a table of
                constants is taken as it is.
            max_pending: Drafts that may be open.
            exits: Those that will be asked at; they name the copy, if there is one.
            probes: Whether exits are probed; a policy that reads nothing still asks for the head
                of each draft.
            headless: Whether candidates are probed and drafted.

        Decisions and books are those of drafters that route, where these were measured.

        Raises:
            ConfigError: that probe, that copy, or launches of ``max_pending`` + 1 tokens, were not
                measured.
        """
        schema = CANDIDATES_V1 if headless else SOFTMAX_V2
        other_probe = costs.batches and costs.schema != schema.name
        measured = costs.with_probe(schema.name) if other_probe else costs
        one = measured.at(1)
        routed = measured.with_probe(ROUTED).at(1) if ROUTED in costs.probes else one
        weights = copy_weights(exits)
        copy = one if weights is None else measured.on_copy(weights)
        probe_s = routed.probe_s if headless else one.probe_s
        asked_s = probe_s if probes else one.head_s
        # A probe of candidates reads the model's own head; any other draft takes the copy's.
        on_copy_s = asked_s if headless else asked_s + copy.head_s - one.head_s
        spans = [measured.launch(tokens) for tokens in range(1, max_pending + 2)]
        return cls(
            layer_W=np.array([each.layer_s for each in spans]),
            head_W=np.array([each.head_s for each in spans]),
            step_W=np.array([each.step_s for each in spans]),
            ask_s=routed.policy_s + asked_s,
            copy_layer_s=copy.layer_s,
            copy_ask_s=routed.policy_s + on_copy_s,
            fill_s=one.fill_s,
            build_s=routed.build_s,  # mostly the books of rows that are asked, probed or not
            start_s=routed.policy_s,
            full_s=one.full_s,
        )


@dataclass(frozen=True, slots=True)
class DraftTables:
    """Recorded tokens as an episode reads them.

    Attributes:
        sure_NES: Top1, margin and entropy, of the full vocabulary or of the candidates.
        odds_NE: Log-odds at which the exit's token is held to be right.
        token_NE: The exit's token.
        right_NE: Whether it is full depth's.
        first_N, end_N: First token of each token's document, and the one after its last.
        startable_M: Tokens that are not their document's last.
        depth_D: Layers executed before the first exit, at each exit, and at the end, [E + 2].
        own_D: The model's own among them, from which the token goes on deeper, [E + 2].
        calls_L: Layers called where a token runs each of the model's own: two where an adapter
            layer follows, [L].
    """

    sure_NES: FloatArray
    odds_NE: FloatArray
    token_NE: IntArray
    right_NE: BoolArray
    first_N: IndexArray
    end_N: IndexArray
    startable_M: IndexArray
    depth_D: IndexArray
    own_D: IndexArray
    calls_L: IndexArray

    @property
    def on_copy_D(self) -> BoolArray:
        """Whether the layers executed there are a copy's, [E + 2]."""
        return np.asarray(self.own_D < self.depth_D)

    def checked_starts(self, tokens: ArrayLike, num_envs: int) -> IndexArray:
        """The tokens to start at, [B], of one or B.

        Raises:
            ConfigError: one is out of range, or the last of its document.
        """
        values = np.broadcast_to(np.asarray(tokens, np.int64), (num_envs,))
        if not np.isin(values, self.startable_M).all():
            raise ConfigError("token", "is no recorded token, or the last of its document")
        return values

    @classmethod
    def of(cls, traces: TokenTraces, odds_NE: FloatArray | None = None) -> DraftTables:
        """Lay out traces whose documents' tokens are contiguous and in order.

        Args:
            traces: The recorded tokens.
            odds_NE: Log-odds that each exit's token is right; None takes its top-1 probability's.

        Raises:
            TraceError: no document has two tokens, or the odds are of other traces.
        """
        exits = traces.header.exits
        calls_L = np.ones(traces.header.layers, np.int64)
        calls_L[[layer - 1 for layer in traces.header.adapters if layer in exits]] += 1
        starts = np.flatnonzero(np.diff(traces.document_N, prepend=-1))
        lengths = np.diff(starts, append=len(traces))
        end_N = np.repeat(starts + lengths, lengths)
        startable_M = np.flatnonzero(np.arange(len(traces)) < end_N - 1)
        if not len(startable_M):
            raise TraceError("traces", "hold no document of two tokens", "Record longer ones")
        return cls(
            sure_NES=traces.softmax_NES,
            odds_NE=_odds_of(traces, odds_NE),
            token_NE=traces.exit_token_NE,
            right_NE=traces.agree_NE > 0,
            first_N=np.repeat(starts, lengths),
            end_N=end_N,
            startable_M=startable_M,
            depth_D=np.array([0, *exits, traces.header.layers]),
            own_D=np.array([0, *(0 if is_on_copy(e) else e for e in exits), traces.header.layers]),
            calls_L=calls_L,
        )


def _odds_of(traces: TokenTraces, odds_NE: FloatArray | None) -> FloatArray:
    if odds_NE is None:
        return odds_of_top1(traces.softmax_NES[:, :, 0])
    if odds_NE.shape != traces.agree_NE.shape or not np.isfinite(odds_NE).all():
        problem = f"have shape {odds_NE.shape}, not {traces.agree_NE.shape}, or are not finite"
        raise TraceError("odds", problem, "Compute them from these traces")
    return odds_NE


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
