"""The learned policy that jumps: a small MLP with one logit per next exit.

Shape suffixes: N rows, F features, C columns of outlook, A actions, E exits, V vocabulary,
K candidates.
"""

from __future__ import annotations

import numpy as np

from offramp.controller.errors import RequestError
from offramp.controller.features import OUTLOOK_V1, FeatureSchema, FloatArray, IntArray
from offramp.controller.policies.codec import (
    CLOSE_LOGIT,
    Kind,
    Params,
    PolicyParts,
    Tensors,
    pack_layers,
    unpack_layers,
)
from offramp.controller.policies.net import TanhNet, Weights
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.strict import COUNT, FLAG, or_null

LEAVE = 0
"""Action: leave at this exit. Action k ≥ 1 asks next at the k-th exit from here."""


class MlpRouter:
    """Leaves or jumps as the largest logit of a tanh MLP on [features | outlook] says.

    Action 0 leaves, action k asks next at exit ``here`` + k, where E, the end, counts as the exit
    after the last. Jumps beyond E are masked. With ``ends`` the last action runs all layers
    unasked, from any exit. Buffers are preallocated; one instance serves one thread.

    Args:
        exits: Layers to ask after, ascending; E = len(exits).
        schema: The features read; F = schema.width.
        weights: Layers of the net, [F + C] to [A], constants (such as log λ) folded into the first
            bias.
        first: Index of the exit that every token is first asked at; or the weights of a net on
            the outlook alone, whose last output stands for E ("run to the end", in ``verify``
            "verify now") and output i for exit i.
        ends: Whether the last action runs to the end.
        candidates_VK: Candidate table for the candidate probe, or None.

    Raises:
        RequestError: shapes that do not chain, or more jumps or first exits than there are exits.
    """

    def __init__(
        self,
        exits: tuple[int, ...],
        schema: FeatureSchema,
        weights: Weights,
        *,
        first: int | Weights = 0,
        ends: bool = False,
        candidates_VK: IntArray | None = None,
    ) -> None:
        self.exits = exits
        self.schema = schema
        self.first = first
        self.ends = ends
        self.candidates_VK = candidates_VK
        self.jumps = _actions(weights, "weights") - 1 - ends
        _require_jumps(self.jumps, len(exits))
        inputs = schema.width + OUTLOOK_V1.width
        self._net = TanhNet(weights, inputs=inputs, outputs=1 + self.jumps + ends)
        self._starter = None if isinstance(first, int) else _starter(first, len(exits))
        if isinstance(first, int) and not 0 <= first <= len(exits):
            raise RequestError("first", f"{first} is not in [0, {len(exits)}]")
        self._target_EA = targets(len(exits), self.jumps, ends=ends)
        self._mask_EA = np.where(self._target_EA < 0, -np.inf, 0).astype(np.float32)
        self._masks = list(self._mask_EA)
        self._targets = self._target_EA.tolist()
        self._anywhere = np.zeros(0 if self._starter is None else self._starter.outputs, np.float32)
        self._one = np.empty(1, np.int64)

    @property
    def weights(self) -> list[tuple[FloatArray, FloatArray]]:
        """Layers of the net that routes."""
        return self._net.weights

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        """Index of the exit each row is first asked at; E for none, [N].

        Raises:
            PolicyFaultError: a logit is not finite.
        """
        if self._starter is None:
            return np.full(len(outlook_NC), self.first, np.int64)
        best_N = self._starter.bests(self._anywhere, outlook_NC)
        best_N[best_N == self._starter.outputs - 1] = len(self.exits)
        return best_N

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        """Where each row goes from the exit ``here``, [N]: ``here`` leaves, E runs to the end.

        A view that the next call reuses where N is 1.

        Raises:
            PolicyFaultError: a logit is not finite, so the inputs were not, or overflowed.
        """
        if len(features_NF) == 1:
            best = self._net.best(self._masks[here], features_NF[0], outlook_NC[0])
            self._one[0] = self._targets[here][best]
            return self._one
        best_N = self._net.bests(self._masks[here], features_NF, outlook_NC)
        target_N: IndexArray = self._target_EA[here, best_N]
        return target_N

    def logits(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> FloatArray:
        """Masked logits [N, A] (−∞ where an action is invalid), for up to MAX_ROWS rows."""
        logits_NA: FloatArray = self._net.rows(features_NF, outlook_NC) + self._mask_EA[here]
        return logits_NA

    def start_logits(self, outlook_NC: FloatArray) -> FloatArray:
        """Logits of the first exits, the last column those of the end; a view, up to MAX_ROWS."""
        assert self._starter is not None  # a fixed first exit has none
        return self._starter.rows(outlook_NC)

    def lead(self, features_NF: FloatArray, outlook_NC: FloatArray) -> FloatArray:
        """By how much the narrowest decision about each row is won, over start and exits, [N]."""
        asked = [self.logits(here, features_NF, outlook_NC) for here in range(len(self.exits))]
        if self._starter is not None:
            asked.append(self.start_logits(outlook_NC).copy())
        pairs = [
            np.sort(logits_NA, axis=1)[:, -2:] for logits_NA in asked if logits_NA.shape[1] > 1
        ]
        leads: FloatArray = np.min([pair[:, 1] - pair[:, 0] for pair in pairs], axis=0)
        return leads


def targets(exits: int, jumps: int, *, ends: bool = False) -> IndexArray:
    """Where each action leads from each exit, −1 where it is invalid, [E, A].

    >>> targets(3, 2)
    array([[ 0,  1,  2],
           [ 1,  2,  3],
           [ 2,  3, -1]])
    """
    here_E1 = np.arange(exits)[:, None]
    target_EA: IndexArray = here_E1 + np.arange(jumps + 1)
    target_EA[target_EA > exits] = -1
    if ends:
        return np.concatenate([target_EA, np.full((exits, 1), exits)], axis=1)
    return target_EA


def _actions(weights: Weights, field: str) -> int:
    if not weights:
        raise RequestError(field, "are empty", "Give one (weight, bias) pair per layer")
    return int(weights[-1][1].size)


def _starter(weights: Weights, exits: int) -> TanhNet:
    outputs = _actions(weights, "first")
    if not 1 <= outputs <= exits + 1:
        raise RequestError("first", f"has {outputs} outputs", f"Give at most {exits} exits and E")
    return TanhNet(weights, inputs=OUTLOOK_V1.width, outputs=outputs, field="first")


def _require_jumps(jumps: int, exits: int) -> None:
    if not 1 <= jumps <= exits:
        raise RequestError(
            "weights",
            f"are for jumps of up to {jumps} exits, and there are {exits}",
            "Name more exits, or train with shorter jumps",
        )


def _describe(policy: MlpRouter) -> tuple[Params, Tensors]:
    params = {"ends": policy.ends, "first": policy.first if isinstance(policy.first, int) else None}
    tensors = pack_layers(policy.weights)
    if not isinstance(policy.first, int):
        tensors |= pack_layers(list(policy.first), "start")
    return params, tensors


def _build(parts: PolicyParts) -> MlpRouter:
    first = parts.params["first"]
    return MlpRouter(
        parts.exits,
        parts.required_schema,
        unpack_layers(parts.tensors),
        first=unpack_layers(parts.tensors, "start") if first is None else int(first),
        ends=parts.params["ends"],
        candidates_VK=parts.candidates_VK,
    )


ROUTER = Kind(
    name="router",
    type=MlpRouter,
    params={"ends": FLAG, "first": or_null(COUNT)},
    describe=_describe,
    build=_build,
    clear=lambda policy, *inputs: policy.lead(*inputs) > CLOSE_LOGIT,
)
