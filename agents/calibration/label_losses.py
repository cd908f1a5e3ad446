"""Losses of a policy that classifies, by label, on texts that nothing was fitted to or chosen on.

A policy that disagrees with full depth may be more right, so agreement is not what is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from offramp.agents.calibration.pvalues import Losses
from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray
from offramp.controller.policies.protocols import IndexArray, NeverExit, Policy
from offramp.controller.release.certificate import DecodeMode, Unit
from offramp.worker.classifying.classifier import Classifier

LABEL_ERROR = "label error"
"""1 where the label is not found, else 0: its mean is 1 minus the accuracy."""

LOST_LABELS = "lost labels"
"""1 where full depth finds the label and the policy does not, else 0: its mean is at least what
accuracy loses against full depth, for labels that the policy alone finds are not set off."""

LABEL_LOSSES = {"label-error": LABEL_ERROR, "lost-labels": LOST_LABELS}
"""What can be bounded, as ``offramp calibrate --loss`` calls it."""

ROWS = 32
"""Texts classified together, of like length."""


class Labels:
    """Classifies texts with the exits really taken.

    Args:
        classifier: The model and its heads.
        sequences: Token ids of the texts, each of which is a unit of its own.
        label_N: Index of the class of each.
        loss: One of LABEL_LOSSES' values.
    """

    decode_mode: DecodeMode = "classify"
    new_tokens = 0

    def __init__(
        self,
        classifier: Classifier,
        sequences: Sequence[Sequence[int]],
        label_N: IndexArray,
        loss: str = LABEL_ERROR,
    ) -> None:
        self.loss = loss
        self._classifier, self._label_N = classifier, label_N
        order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
        self._batches = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
        self._sequences = sequences
        self._layers_N = np.zeros(len(sequences), np.int64)
        self._full_right_N = self._right(NeverExit())

    @property
    def full_error(self) -> float:
        """Share of the texts whose label full depth does not find."""
        return float(1.0 - self._full_right_N.mean())

    def losses(self, policy: Policy, unit: Unit) -> Losses:
        """Loss of each text, [N], 0 or 1.

        Raises:
            ConfigError: tokens are asked for as units.
        """
        if unit != "document":
            raise ConfigError("unit", f"a label is not a {unit}'s", "Use document")
        lost_N = ~self._right(policy)
        if self.loss == LOST_LABELS:
            lost_N &= self._full_right_N
        return lost_N.astype(np.float64)

    def leaves(self, exits: Sequence[int]) -> tuple[float, ...]:
        """Shares of the texts of the last policy that left at each exit."""
        return tuple(float((self._layers_N == depth).mean()) for depth in exits)

    def _right(self, policy: Policy) -> BoolArray:
        found_N = np.zeros(len(self._sequences), np.int64)
        for places in self._batches:
            run = self._classifier.run([self._sequences[place] for place in places], policy)
            found_N[places], self._layers_N[places] = run.label_N, run.layers_N
        return np.asarray(found_N == self._label_N)
