"""The learned drafter: one small net before the first layer, one at the exits.

Shape suffixes: N rows, F features, C columns of outlook, A actions, E exits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.controller.errors import PolicyFaultError, RequestError
from offramp.controller.features import (
    CANDIDATES_V1,
    MAX_PENDING,
    OUTLOOK_V1,
    SOFTMAX_V2,
    BoolArray,
    FeatureSchema,
    FloatArray,
    IntArray,
)
from offramp.controller.policies.codec import (
    CLOSE_LOGIT,
    Kind,
    Params,
    PolicyParts,
    Tensors,
    pack_layers,
    unpack_layers,
)
from offramp.controller.policies.drafts.draft_insight import pack_insight, unpack_insight
from offramp.controller.policies.drafts.draft_trust import ODDS_SCALE, DraftChances, TrustingPolicy
from offramp.controller.policies.drafts.drafter import require_exits
from offramp.controller.policies.net import TanhNet, Weights, finite
from offramp.controller.policies.protocols import IndexArray, Seen
from offramp.controller.policies.router import targets
from offramp.controller.strict import COUNT


class DraftRouter(TrustingPolicy):
    """What ``offramp/DraftExit-v0`` trains: the largest logit of a tanh MLP decides.

    Beside features and outlook it reads *odds*, the log-odds that the draft at hand is right
    (``DraftChances``), and *trust*, the product of the open drafts' chances of being right, each at
    the exit where it left (``DraftTrust``).

    Actions are the environment's: of E + 1 logits, before the first layer number a < E asks first
    at exit a; at an exit, 0 leaves and k asks next at the k-th exit from there; the last verifies.

    Args:
        exits: Layers to ask after, ascending; E = len(exits).
        starter: Layers of the net asked before the first layer, [C + 2] to [E + 1].
        router: Layers of the net asked at the exits, [F + C + 2] to [E + 1].
        max_pending: The engine's.
        candidates_VK: Candidate table. With it, it reads CANDIDATES_V1 and drafts the best
            candidate, *headless*; else SOFTMAX_V2, whose probe is the head.
        chances: How likely drafts of these exits are right; None: as top-1 probabilities say.

    Raises:
        RequestError: shapes that do not chain.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        starter: Weights,
        router: Weights,
        *,
        max_pending: int = MAX_PENDING,
        candidates_VK: IntArray | None = None,
        chances: DraftChances | None = None,
    ) -> None:
        require_exits(exits)
        if chances is not None and len(chances.line_E2) != len(exits):
            raise RequestError("chances", f"are of {len(chances.line_E2)} exits, not of {exits}")
        super().__init__(max_pending, chances)
        self.exits = exits
        self.candidates_VK = candidates_VK
        self.headless = candidates_VK is not None
        self.schema: FeatureSchema = CANDIDATES_V1 if self.headless else SOFTMAX_V2
        actions, seen = len(exits) + 1, OUTLOOK_V1.width + len(("odds", "trust"))
        self.starter = TanhNet(starter, inputs=seen, outputs=actions, field="starter")
        self.router = TanhNet(
            router, inputs=self.schema.width + seen, outputs=actions, field="router"
        )
        self._target_EA = targets(len(exits), len(exits) - 1, ends=True)
        self._mask_EA = np.where(self._target_EA < 0, -np.inf, 0).astype(np.float32)
        self._masks = list(self._mask_EA)
        self._anywhere = np.zeros(actions, np.float32)
        self._no_odds_1 = np.zeros(1, np.float32)
        self._known = np.zeros(seen - 1, np.float32)
        self._targets = self._target_EA.tolist()

    def start(self, outlook_NC: FloatArray, trust_N: FloatArray | None = None) -> IndexArray:
        """Exit first asked at, E to verify now, [N].

        Raises:
            PolicyFaultError: a logit is not finite.
        """
        trust_N = self._trust_of(outlook_NC, trust_N)
        if len(outlook_NC) == 1:
            parts = (outlook_NC[0], self._no_odds_1, trust_N)
            return np.array([self.starter.best(self._anywhere, *parts)])
        return self.starter.bests(self._anywhere, *self._begun(outlook_NC, trust_N))

    def route(
        self,
        here: int,
        features_NF: FloatArray,
        outlook_NC: FloatArray,
        trust_N: FloatArray | None = None,
        odds_N: FloatArray | None = None,
        seen: Seen | None = None,
    ) -> IndexArray:
        """Leave, go deeper or verify, [N].

        Args:
            here: Index of the exit.
            features_NF: What was probed.
            outlook_NC: What the engine knows of the rows.
            trust_N: Trust, where the caller follows it.
            odds_N: Log-odds that each draft is right, where the caller knows them.
            seen: What insight reads, where it is to compute them.

        Raises:
            PolicyFaultError: a logit is not finite.
        """
        if odds_N is None:
            odds_N = self.odds(here, features_NF, seen)
        if len(features_NF) == 1 and trust_N is None:
            return np.array([self._route_one(here, features_NF[0], outlook_NC, odds_N)])
        parts = (features_NF, *self._read(outlook_NC, odds_N, self._trust_of(outlook_NC, trust_N)))
        best_N = self.router.bests(self._masks[here], *parts)
        target_N: IndexArray = self._target_EA[here, best_N]
        return target_N

    def _route_one(
        self, here: int, features_F: FloatArray, outlook_1C: FloatArray, odds_1: FloatArray
    ) -> int:
        parts = (features_F, outlook_1C[0], odds_1 / ODDS_SCALE, self.trust.of(outlook_1C))
        best = self.router.best(self._masks[here], *parts)
        return self.settle(here, best, float(odds_1[0]))

    @property
    def is_compiled(self) -> bool:
        """Whether a row that is asked alone may be probed and routed in one compiled call."""
        return self.headless and self.chances is not None and not self.reads_state

    def compiled_parts(self, here: int, outlook_1C: FloatArray) -> tuple[Any, ...]:
        """What such a call takes behind the probe's own: see ``fused_route``."""
        assert self.chances is not None
        self._known[:-1] = outlook_1C[0]
        self._known[-1] = self.trust.of(outlook_1C)[0]
        net = (self.router.flat, self.router.sizes, self._masks[here])
        return (self._known, self.chances.lines[here], ODDS_SCALE, *net)

    def settle(self, here: int, best: int, odds: float) -> int:
        """Where the row goes by the call's best action; one that leaves is open from now on.

        Raises:
            PolicyFaultError: a logit is not finite.
        """
        if best < 0:
            raise PolicyFaultError("the logits are not finite")
        target: int = self._targets[here][best]
        if target == here:
            self.trust.add(odds)
        return target

    def _begun(self, outlook_NC: FloatArray, trust_N: FloatArray) -> tuple[FloatArray, ...]:
        """What the starter reads: nothing is drafted yet, so there are no odds."""
        return self._read(outlook_NC, np.zeros(len(outlook_NC), np.float32), trust_N)

    def _read(
        self, outlook_NC: FloatArray, odds_N: FloatArray, trust_N: FloatArray
    ) -> tuple[FloatArray, ...]:
        return outlook_NC, odds_N[:, None] / ODDS_SCALE, trust_N[:, None]

    def start_logits(self, outlook_NC: FloatArray) -> FloatArray:
        """Logits before the first layer, [N, A]."""
        parts = self._begun(outlook_NC, self.trust.of(outlook_NC))
        return finite(self.starter.rows(*parts)).copy()

    def route_logits(
        self, here: int, features_NF: FloatArray, outlook_NC: FloatArray
    ) -> FloatArray:
        """Logits at an exit, −∞ where a jump leads past the last exit, [N, A]."""
        odds_N = self.odds(here, features_NF)
        parts = self._read(outlook_NC, odds_N, self.trust.of(outlook_NC))
        logits_NA = self.router.rows(features_NF, *parts)
        masked_NA: FloatArray = finite(logits_NA) + self._mask_EA[here]
        return masked_NA


def _describe(policy: DraftRouter) -> tuple[Params, Tensors]:
    tensors = pack_layers(policy.starter.weights, "starter")
    tensors |= pack_layers(policy.router.weights, "router")
    if policy.chances is not None:
        tensors["chances"] = policy.chances.line_E2
        tensors |= pack_insight(policy.chances.insight)
    return {"max_pending": policy.max_pending}, tensors


def _build(parts: PolicyParts) -> DraftRouter:
    nets = (unpack_layers(parts.tensors, "starter"), unpack_layers(parts.tensors, "router"))
    chances = None
    if "chances" in parts.tensors:
        insight = unpack_insight(parts.tensors, len(parts.exits))
        chances = DraftChances(parts.tensors["chances"], parts.exits, insight)
    return DraftRouter(
        parts.exits, *nets, candidates_VK=parts.candidates_VK, chances=chances, **parts.params
    )


def _clear(policy: DraftRouter, features_NF: FloatArray, outlook_NC: FloatArray) -> BoolArray:
    everywhere = range(len(policy.exits))
    routed = [policy.route_logits(here, features_NF, outlook_NC) for here in everywhere]
    ordered_PNA = np.sort([policy.start_logits(outlook_NC), *routed], axis=-1)
    lead_PN = ordered_PNA[:, :, -1] - ordered_PNA[:, :, -2]
    return np.asarray((lead_PN > CLOSE_LOGIT).all(0))


DRAFT_ROUTER = Kind(
    name="draft-router",
    type=DraftRouter,
    params={"max_pending": COUNT},
    describe=_describe,
    build=_build,
    clear=_clear,
)
