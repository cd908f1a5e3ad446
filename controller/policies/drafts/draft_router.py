"""The learned drafter: one small net before the first layer, one at the exits.

Shape suffixes: N rows, F features, C columns of outlook, A actions, E exits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

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
from offramp.controller.policies.drafts.draft_trust import DraftChances, TrustingPolicy
from offramp.controller.policies.drafts.drafter import require_exits
from offramp.controller.policies.net import TanhNet, Weights, finite
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.policies.router import targets
from offramp.controller.strict import COUNT


class DraftRouter(TrustingPolicy):
    """What ``offramp/DraftExit-v0`` trains: the largest logit of a tanh MLP decides.

    Beside features and outlook it reads *trust*, the product of the open drafts' chances of being
    right, each at the exit where it left (``DraftTrust``).

    Actions are the environment's: of E + 1 logits, before the first layer number a < E asks first
    at exit a; at an exit, 0 leaves and k asks next at the k-th exit from there; the last verifies.

    Args:
        exits: Layers to ask after, ascending; E = len(exits).
        starter: Layers of the net asked before the first layer, [C + 1] to [E + 1].
        router: Layers of the net asked at the exits, [F + C + 1] to [E + 1].
        max_pending: The engine's.
        candidates_VK: Candidate table. With it, it reads CANDIDATES_V1 and drafts the best
            candidate, *headless*; else SOFTMAX_V2, whose probe is the head.
        chances: Lines of ``DraftChances``, [E, 2]; None: trust is of top-1 probabilities, as it was
            before drafters were calibrated.

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
        chances: ArrayLike | None = None,
    ) -> None:
        require_exits(exits)
        super().__init__(max_pending, None if chances is None else DraftChances(chances, exits))
        self.exits = exits
        self.candidates_VK = candidates_VK
        self.headless = candidates_VK is not None
        self.schema: FeatureSchema = CANDIDATES_V1 if self.headless else SOFTMAX_V2
        actions, seen = len(exits) + 1, OUTLOOK_V1.width + 1
        self.starter = TanhNet(starter, inputs=seen, outputs=actions, field="starter")
        self.router = TanhNet(
            router, inputs=self.schema.width + seen, outputs=actions, field="router"
        )
        self._target_EA = targets(len(exits), len(exits) - 1, ends=True)
        self._mask_EA = np.where(self._target_EA < 0, -np.inf, 0).astype(np.float32)
        self._masks = list(self._mask_EA)
        self._anywhere = np.zeros(actions, np.float32)
        self._targets = self._target_EA.tolist()

    def start(self, outlook_NC: FloatArray, trust_N: FloatArray | None = None) -> IndexArray:
        """Exit first asked at, E to verify now, [N].

        Raises:
            PolicyFaultError: a logit is not finite.
        """
        trust_N = self._trust_of(outlook_NC, trust_N)
        if len(outlook_NC) == 1:
            return np.array([self.starter.best(self._anywhere, outlook_NC[0], trust_N)])
        return self.starter.bests(self._anywhere, outlook_NC, trust_N[:, None])

    def route(
        self,
        here: int,
        features_NF: FloatArray,
        outlook_NC: FloatArray,
        trust_N: FloatArray | None = None,
    ) -> IndexArray:
        """Leave, go deeper or verify, [N].

        Raises:
            PolicyFaultError: a logit is not finite.
        """
        if len(features_NF) == 1 and trust_N is None:
            return np.array([self._route_one(here, features_NF[0], outlook_NC)])
        trust_N1 = self._trust_of(outlook_NC, trust_N)[:, None]
        best_N = self.router.bests(self._masks[here], features_NF, outlook_NC, trust_N1)
        target_N: IndexArray = self._target_EA[here, best_N]
        return target_N

    def _route_one(self, here: int, features_F: FloatArray, outlook_1C: FloatArray) -> int:
        trust_1 = self.trust.of(outlook_1C)
        best = self.router.best(self._masks[here], features_F, outlook_1C[0], trust_1)
        target = int(self._targets[here][best])
        if target == here:
            self.trust.add(here, features_F)
        return target

    def start_logits(self, outlook_NC: FloatArray) -> FloatArray:
        """Logits before the first layer, [N, A]."""
        return finite(self.starter.rows(outlook_NC, self.trust.of(outlook_NC)[:, None])).copy()

    def route_logits(
        self, here: int, features_NF: FloatArray, outlook_NC: FloatArray
    ) -> FloatArray:
        """Logits at an exit, −∞ where a jump leads past the last exit, [N, A]."""
        trust_N1 = self.trust.of(outlook_NC)[:, None]
        logits_NA = self.router.rows(features_NF, outlook_NC, trust_N1)
        masked_NA: FloatArray = finite(logits_NA) + self._mask_EA[here]
        return masked_NA


def _describe(policy: DraftRouter) -> tuple[Params, Tensors]:
    tensors = pack_layers(policy.starter.weights, "starter")
    tensors |= pack_layers(policy.router.weights, "router")
    if policy.chances is not None:
        tensors["chances"] = policy.chances.line_E2
    return {"max_pending": policy.max_pending}, tensors


def _build(parts: PolicyParts) -> DraftRouter:
    nets = (unpack_layers(parts.tensors, "starter"), unpack_layers(parts.tensors, "router"))
    return DraftRouter(
        parts.exits,
        *nets,
        candidates_VK=parts.candidates_VK,
        chances=parts.tensors.get("chances"),
        **parts.params,
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
