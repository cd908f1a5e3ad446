"""Finds the best of several sequences by one class's score, running few of them to the end.

Every exit's score says something of full depth's: an upper bound, which holds of a set share of
texts. As with upper confidence bounds in a bandit (Auer, Cesa-Bianchi and Fischer 2002), the
sequence whose bound is highest goes one exit further, until the one with the highest is at full
depth, where the bound is the score itself: then none of the others is better, if bounds hold.

Shape suffixes: N sequences, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.controller.errors import RequestError
from offramp.controller.features import FloatArray
from offramp.worker.classifying.classifier import Classified, Classifier
from offramp.worker.classifying.sequence_stack import SequenceBatch, require_sequences

SMALLEST = 1e-6
"""Chances nearer to 0 or 1 than this count as this far."""


def log_odds(probs: FloatArray) -> NDArray[np.float64]:
    """The logits of chances."""
    inside = np.clip(probs.astype(np.float64), SMALLEST, 1 - SMALLEST)
    return np.asarray(np.log(inside) - np.log1p(-inside))


@dataclass(frozen=True, slots=True)
class _Runner:
    """A sequence, how deep it is, and what is known of it there."""

    batch: SequenceBatch
    layer: int
    probs_C: FloatArray
    bound: float


class BestOf:
    """Looks for the sequence of which a class is likeliest at full depth.

    Args:
        classifier: The model and its heads, which were fitted with bounds.
        label: Index of the class.

    Raises:
        RequestError: the heads have no bounds, or there is no such class.
    """

    def __init__(self, classifier: Classifier, label: int) -> None:
        self._stack, self._heads, self._label = classifier.stack, classifier.heads, label
        if label not in range(len(self._heads.labels)):
            problem = f"{label!r} is no index of {len(self._heads.labels)} classes"
            raise RequestError("label", problem, "Count them from 0")
        if not self._heads.has_bounds:
            raise RequestError(
                "offramp.best",
                "asks for bounds, and these heads were fitted before there were any",
                "Fit them again with `offramp tune --task classify`, or leave it out",
            )

    @torch.inference_mode()
    def run(self, sequences: Sequence[Sequence[int]]) -> tuple[int, Classified]:
        """Race the sequences.

        Returns:
            Place of the best, and what is known of all: of the best at full depth, of the others
            at the exit where they were left.

        Raises:
            RequestError: there is no sequence, or one cannot be run; its place is the field.
        """
        require_sequences(sequences, self._stack)
        batch = SequenceBatch(self._stack, sequences)
        first = self._heads.exits[0]
        for index in range(first):
            batch.run_layer(index)
        logits_NC = self._heads.logits(first, batch.pooled(self._heads.pool))
        runners = [
            self._at(batch.alone(place), first, logits_NC[place]) for place in batch.rows.tolist()
        ]
        while runners[best := _highest(runners)].layer < self._stack.layers:
            runners[best] = self._further(runners[best])
        probs_NC = np.stack([each.probs_C for each in runners])
        return best, Classified(
            label_N=probs_NC.argmax(-1).astype(np.int32),
            probs_NC=probs_NC,
            layers_N=np.array([each.layer for each in runners], np.int32),
            launches=batch.launches + sum(each.batch.launches for each in runners),
            row_layers=batch.row_layers + sum(each.batch.row_layers for each in runners),
        )

    def _further(self, runner: _Runner) -> _Runner:
        """The same at the next exit."""
        after = self._heads.exits[self._heads.exits.index(runner.layer) + 1]
        for index in range(runner.layer, after):
            runner.batch.run_layer(index)
        return self._at(
            runner.batch, after, self._heads.logits(after, runner.batch.pooled(self._heads.pool))[0]
        )

    def _at(self, batch: SequenceBatch, layer: int, logits_C: Tensor) -> _Runner:
        probs_C = logits_C.float().softmax(-1).cpu().numpy()
        score = float(log_odds(probs_C[self._label : self._label + 1])[0])
        return _Runner(batch, layer, probs_C, self._bound(layer, score))

    def _bound(self, layer: int, score: float) -> float:
        bound_C2 = self._heads.head(layer).bound_C2
        if layer == self._stack.layers or bound_C2 is None:
            return score
        slope, offset = bound_C2[self._label].tolist()
        return float(slope * score + offset)


def _highest(runners: Sequence[_Runner]) -> int:
    return max(range(len(runners)), key=lambda place: runners[place].bound)


def bounds_of(scores_NEC: NDArray[np.float64], share: float) -> list[Tensor]:
    """Upper bounds on the last exit's score, by each of the exits before it, for every class.

    The last exit's score is regressed on the exit's by least squares; the offset is raised until
    the line is above the scores of the share.

    Args:
        scores_NEC: Scores of texts that nothing was fitted to.
        share: Share of the texts of which a bound is to hold.

    Returns:
        Slope and offset of each class, [C, 2], by exit.
    """
    last_NC = scores_NEC[:, -1]
    lines = []
    for here_NC in scores_NEC[:, :-1].swapaxes(0, 1):
        apart_NC = here_NC - here_NC.mean(0)
        slope_C = (apart_NC * last_NC).mean(0) / here_NC.var(0).clip(SMALLEST)
        offset_C = np.quantile(last_NC - slope_C * here_NC, share, axis=0)
        lines.append(torch.from_numpy(np.stack([slope_C, offset_C], axis=-1)).float())
    return lines
