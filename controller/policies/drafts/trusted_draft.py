"""Drafts for as long as all open drafts are likely right.

Shape suffixes: N rows, F features, C columns of outlook, V vocabulary, K candidates; 2 the
intercept and the slope of a line.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from offramp.controller.features import (
    CANDIDATES_V1,
    MAX_PENDING,
    SOFTMAX_V2,
    BoolArray,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.codec import CLOSE_LOGIT, Kind, Params, PolicyParts, Tensors
from offramp.controller.policies.drafts.draft_insight import (
    DraftInsight,
    pack_insight,
    unpack_insight,
)
from offramp.controller.policies.drafts.draft_trust import DraftChances, TrustingPolicy
from offramp.controller.policies.drafts.drafter import (
    open_drafts,
    require_exits,
    require_length,
    require_share,
)
from offramp.controller.policies.protocols import IndexArray, Seen
from offramp.controller.strict import COUNT, NUMBER


class TrustedDraft(TrustingPolicy):
    """Verifies as soon as *trust*, the chance that all open drafts are right, is at a threshold.

    One more draft adds trust times its own chance to the tokens of a cycle, and costs the same
    each time. Trust only falls, so to stop where the gain first falls below the cost is optimal
    (the monotone case of optimal stopping: Chow, Robbins and Siegmund 1971, section 3.5). The
    threshold is that cost, in tokens at the rate that is earned; it is found by replay.

    A draft that is itself unsure is still drafted before the pass that verifies: it widens this by
    one token, and is often right.

    Args:
        layer: Layers executed for a draft.
        line: Intercept and slope of the log-odds that a draft is right, by its lead
            (``DraftChances``).
        insight: What it reads beside the lead, of this one exit; None: nothing.
        threshold: Trust at which drafting ends, in [0, 1].
        length: Drafts per cycle at most.
        max_pending: The engine's.
        candidates_VK: Candidate table. With it, the lead is that among the candidates and the
            best of them is drafted, *headless*.

    Raises:
        RequestError: an argument is out of range.
    """

    def __init__(
        self,
        layer: int,
        line: ArrayLike,
        threshold: float,
        *,
        length: int = MAX_PENDING,
        max_pending: int = MAX_PENDING,
        candidates_VK: IntArray | None = None,
        insight: DraftInsight | None = None,
    ) -> None:
        self.exits = (layer,)
        require_exits(self.exits)
        require_length(length, max_pending)
        require_share("threshold", threshold)
        chances = DraftChances(np.reshape(line, (1, -1)), self.exits, insight)
        super().__init__(max_pending, chances)
        self.threshold, self.length = threshold, length
        self.candidates_VK = candidates_VK
        self.headless = candidates_VK is not None
        self.schema: FeatureSchema = CANDIDATES_V1 if self.headless else SOFTMAX_V2

    def start(self, outlook_NC: FloatArray, trust_N: FloatArray | None = None) -> IndexArray:
        """Ask on, or verify now, [N]."""
        drafts_N = open_drafts(outlook_NC, self.max_pending)
        sure_N = self._trust_of(outlook_NC, trust_N) > self.threshold
        return np.where((drafts_N == 0) | ((drafts_N < self.length) & sure_N), 0, 1)

    def route(
        self,
        here: int,
        features_NF: FloatArray,
        outlook_NC: FloatArray,
        trust_N: FloatArray | None = None,
        odds_N: FloatArray | None = None,
        seen: Seen | None = None,
    ) -> IndexArray:
        """Everybody leaves."""
        if len(features_NF) == 1 and trust_N is None:
            self.trust.add(float(self.odds(here, features_NF, seen)[0]))
        return np.full(len(features_NF), here, np.int64)


def _describe(policy: TrustedDraft) -> tuple[Params, Tensors]:
    names = ("threshold", "length", "max_pending")
    assert policy.chances is not None
    params = {name: getattr(policy, name) for name in names}
    return params, {"line": policy.chances.line_E2[0], **pack_insight(policy.chances.insight)}


def _build(parts: PolicyParts) -> TrustedDraft:
    line = parts.tensors["line"]
    return TrustedDraft(
        parts.only_exit,
        line,
        candidates_VK=parts.candidates_VK,
        insight=unpack_insight(parts.tensors, 1),
        **parts.params,
    )


def _clear(policy: TrustedDraft, _: FloatArray, outlook_NC: FloatArray) -> BoolArray:
    distance_N = np.abs(policy.trust.of(outlook_NC) - policy.threshold)
    return np.asarray(distance_N > CLOSE_LOGIT)


TRUSTED = Kind(
    name="draft-trusted",
    type=TrustedDraft,
    params={"length": COUNT, "max_pending": COUNT, "threshold": NUMBER},
    describe=_describe,
    build=_build,
    clear=_clear,
)
