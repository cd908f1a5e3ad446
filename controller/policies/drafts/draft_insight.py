"""What tells a right draft from a wrong one beside its lead: the state, and the text read so far.

Shape suffixes: N rows, E exits, D width, R numbers that a state is projected to, S softmax columns,
V vocabulary, K columns of a token's kind, I inputs of a net.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.controller.errors import PolicyRefusedError, Refusal, RequestError
from offramp.controller.features import FloatArray, IntArray
from offramp.controller.policies.codec import Tensors, pack_layers, unpack_layers
from offramp.controller.policies.drafts.leads import MARGIN, leads_of
from offramp.controller.policies.net import TanhNet, Weights
from offramp.controller.policies.protocols import Seen
from offramp.controller.traces import SOFTMAX_COLUMNS

KIND_BITS = 4
"""Flags of a token's kind: it ends a line, ends in a letter or digit, is blank, begins with a
space. The other four bits of its byte are its length, at most 15."""

KIND_COLUMNS = KIND_BITS + 1

SURE_COLUMNS = len(SOFTMAX_COLUMNS) + 1
"""Lead, then SOFTMAX_COLUMNS."""

EPSILON = 1e-12
"""Keeps the root mean square of an empty state from dividing by zero."""


class DraftInsight:
    """Adds to the log-odds that a draft is right what its state and the token it follows tell.

    At each exit a small net reads how sure the exit is, what kind of token was read, and the state
    (over its root mean square) through a projection to a few numbers, which was learned with it.

    Args:
        projections: For each exit, [E, D, R].
        nets: For each exit layers from [SURE_COLUMNS + KIND_COLUMNS + R] to one output.
        kinds: A byte for each token of the vocabulary, [V]: KIND_BITS and a length.

    Raises:
        RequestError: shapes that do not chain, another count of nets, or bytes of another kind.
    """

    def __init__(
        self, projections: FloatArray, nets: Sequence[Weights], kinds: NDArray[np.uint8]
    ) -> None:
        self.projection_EDR = np.ascontiguousarray(projections, np.float32)
        shape = self.projection_EDR.shape
        if len(shape) != 3 or shape[0] != len(nets) or not np.isfinite(self.projection_EDR).all():
            problem = f"have shape {shape} for {len(nets)} nets, or are not finite"
            raise RequestError("projections", problem, "Give [exits, width, numbers]")
        if kinds.ndim != 1 or kinds.dtype != np.uint8:
            raise RequestError("kinds", f"is {kinds.dtype} {kinds.shape}, not a byte a token")
        inputs = SURE_COLUMNS + KIND_COLUMNS + shape[2]
        self.nets = [
            TanhNet(net, inputs=inputs, outputs=1, field=f"insight[{here}]")
            for here, net in enumerate(nets)
        ]
        self.kinds_V = kinds
        self.kind_VK = kind_columns(kinds)

    @property
    def exits(self) -> int:
        """Number of exits E."""
        return len(self.nets)

    def part(self, places: Sequence[int]) -> DraftInsight:
        """The insight of some of the exits."""
        nets = [self.nets[here].weights for here in places]
        return DraftInsight(self.projection_EDR[list(places)], nets, self.kinds_V)

    def more(self, here: int, sure_NS: FloatArray, seen: Seen) -> FloatArray:
        """What is added to the log-odds of drafts of an exit, [N].

        Raises:
            PolicyFaultError: it is not finite, so the state or a feature was not.
        """
        kind_NK = kinds_of(self.kind_VK, seen.read_N)
        x_NI = inputs_of(sure_NS, kind_NK, self.projected(here, seen.state_ND))
        return self.nets[here].values(x_NI)[:, 0]

    def projected(self, here: int, state_ND: FloatArray) -> FloatArray:
        """The numbers that states at an exit are projected to, [N, R]."""
        projected_NR: FloatArray = scaled(state_ND) @ self.projection_EDR[here]
        return projected_NR


def scaled(state_ND: FloatArray) -> FloatArray:
    """States over their root mean square."""
    rms_N1 = np.sqrt(np.square(state_ND, dtype=np.float32).mean(1, keepdims=True) + EPSILON)
    return np.asarray(state_ND / rms_N1, np.float32)


def inputs_of(sure_NS: FloatArray, kind_NK: FloatArray, projected_NR: FloatArray) -> FloatArray:
    """What a net of insight reads, [N, I]."""
    lead_N1 = leads_of(sure_NS[:, 0], sure_NS[:, MARGIN])[:, None]
    parts = (lead_N1, sure_NS, kind_NK, projected_NR)
    return np.concatenate(parts, axis=1, dtype=np.float32)


def kinds_of(kind_VK: FloatArray, read_N: IntArray) -> FloatArray:
    """Columns of the kind of each token, [N, K]; zeros of one that is unknown."""
    known_N1 = ((read_N >= 0) & (read_N < len(kind_VK)))[:, None]
    return np.where(known_N1, kind_VK[np.where(known_N1[:, 0], read_N, 0)], 0.0)


def kind_byte(text: str) -> int:
    """The byte of a token that reads so: KIND_BITS, and its length in characters, at most 15.

    >>> kind_byte(" def"), kind_byte("\\n")
    (74, 21)
    """
    flags = (
        text.endswith("\n"),
        text[-1:].isalnum() or text.endswith("_"),
        text.isspace(),
        text.startswith(" "),
    )
    return sum(flag << bit for bit, flag in enumerate(flags)) | min(len(text), 15) << KIND_BITS


def kind_columns(kinds: NDArray[np.uint8]) -> FloatArray:
    """The columns of kinds, [V, K]: flags as 0 and 1, and a tenth of the length."""
    flags = [(kinds >> bit) & 1 for bit in range(KIND_BITS)]
    return np.stack([*flags, (kinds >> KIND_BITS) / 10], axis=1).astype(np.float32)


def pack_insight(insight: DraftInsight | None) -> Tensors:
    """Give the tensors of an insight; none of None."""
    if insight is None:
        return {}
    tensors: Tensors = {
        "insight_projections": insight.projection_EDR,
        "insight_kinds": insight.kinds_V.astype(np.float32),
    }
    for here, net in enumerate(insight.nets):
        tensors |= pack_layers(net.weights, f"insight_net_{here}")
    return tensors


def unpack_insight(tensors: Tensors, exits: int) -> DraftInsight | None:
    """The insight that ``pack_insight`` was given, of so many exits; None if there is none.

    Raises:
        RequestError: as ``DraftInsight``.
        PolicyRefusedError: BAD_SHAPE, a tensor is missing or not of bytes.
    """
    named = {name for name in tensors if name.startswith("insight_")}
    if not named:
        return None
    if not {"insight_projections", "insight_kinds"} <= named:
        raise PolicyRefusedError(Refusal.BAD_SHAPE, "an insight lacks projections or kinds")
    kinds_V = tensors["insight_kinds"]
    if not np.isin(kinds_V, np.arange(256)).all():
        raise PolicyRefusedError(Refusal.BAD_SHAPE, "insight_kinds holds what is no byte")
    nets = [unpack_layers(tensors, f"insight_net_{here}") for here in range(exits)]
    return DraftInsight(tensors["insight_projections"], nets, kinds_V.astype(np.uint8))
