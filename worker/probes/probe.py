"""What every probe is, and what it may be built from.

Shape suffixes: N rows, K candidates, D width, V vocabulary, F features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from torch import Tensor

from offramp.controller.features import BoolArray, FloatArray, IntArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.worker.probes.readout import Readout


class Probe(Protocol):
    """Computes one schema's features for a shrinking set of rows, exit by exit."""

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """Features [N, F] of the rows' hidden states after ``layer`` layers.

        The array is the caller's; ``x_ND`` may be overwritten after the call.
        """
        ...

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left, as ``RemembersRows`` does."""
        ...

    def logits(self) -> Tensor | None:
        """Whole logits [N, V] that the last ``features`` computed anyway; None if it did not."""
        ...


class RemembersRows(Protocol):
    """Remembers something of each row; what is written after a copy was made, that never sees."""

    def keep(self, stay_N: BoolArray) -> None:
        """Forget the rows that left."""
        ...


R = TypeVar("R", bound=RemembersRows)


def part_of(memory: R, stay_N: BoolArray) -> R:
    """What is remembered of some of the rows, to be used beside that of the others."""
    part = copy.copy(memory)
    part.keep(stay_N)
    return part


class Decider(Probe, Protocol):
    """A probe that can ask an MLP policy by itself.

    Attributes:
        policy: The policy that it asks; None if the rows' policy is of another kind.
    """

    policy: MlpPolicy | None

    def leaving(self, layer: int, x_N1D: Tensor) -> tuple[list[int], list[int]]:
        """Ask the policy about all rows; those that leave, or fail, are then forgotten.

        Args:
            layer: Layers executed so far.
            x_N1D: The rows' hidden states.

        Returns:
            Places of the rows that leave, and of those whose features or logit are not finite.
        """
        ...


class Candidates(Probe, Protocol):
    """A probe that scores candidate tokens."""

    def best_N(self) -> IntArray:
        """The token of each row that the last ``features`` found best, [N]."""
        ...


Scores = Callable[[Tensor], Tensor]
"""Turns a row's logits [V] into what its next token is the largest of, [V]."""


class ProbeInputs(NamedTuple):
    """What some rows offer at the start of a step.

    Attributes:
        readout: The model's final norm and head, as probes read them.
        x_ND: The rows' embeddings: what the first probe is compared to.
        positions_N: Position of each token in its row.
        exits: Number of exits the policy may ask at.
        candidates_NK: Likely next tokens per row, distinct within a row; None if the policy
            carries no table.
        table_VK: The table they come from, or None.
        scores: How each row's next token is drawn; None of a row whose likeliest token is taken. ()
            if that is so of all.
    """

    readout: Readout
    x_ND: Tensor
    positions_N: IntArray
    exits: int
    candidates_NK: IntArray | None = None
    table_VK: IntArray | None = None
    scores: Sequence[Scores | None] = ()


class BlankProbe:
    """For policies that read nothing: features of zero width."""

    def features(self, layer: int, x_ND: Tensor) -> FloatArray:
        """An empty matrix [N, 0]."""
        return np.empty((len(x_ND), 0), np.float32)

    def keep(self, stay_N: BoolArray) -> None:
        """Do nothing: nothing is remembered of a row."""

    def logits(self) -> Tensor | None:
        """Give None: no logits were computed."""
        return None
