"""What heads are fitted to, tempered on and measured on, and how well they do.

Shape suffixes: N texts, M texts that are held out, E exits, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.exit_states import exit_states
from offramp.agents.classifying.head_fitting import HeadQuality, fit_head, measure_head, temper
from offramp.agents.classifying.labelled_texts import LabelledTexts, split_by_class
from offramp.controller.errors import TraceError
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.classifying.best_of import bounds_of, log_odds
from offramp.worker.classifying.class_heads import ClassHead, ClassHeads
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.sequence_stack import Pool

BOUNDED = 0.95
"""Share of the texts whose score at full depth an exit's upper bound is to hold of."""

OnStage = Callable[[str, int, int], None]
"""Told (stage, done so far, in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyReport:
    """How well the heads of all exits do on texts that nothing was fitted to or chosen on.

    Attributes:
        rows: One row per exit, full depth last.
        classes: Number of classes.
        learned: Texts that heads were fitted to.
        measured: Texts that they were measured on.
    """

    rows: tuple[HeadQuality, ...]
    classes: int
    learned: int
    measured: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTask:
    """What heads are fitted to, whatever the way.

    Attributes:
        texts: What was read.
        sequences: Token ids of each.
        exits: Numbers of layers executed; the last is full depth.
        pool: What of a sequence heads read.
        parts: Places to fit to, to choose and calibrate on, and to measure on.
    """

    texts: LabelledTexts
    sequences: Sequence[Sequence[int]]
    exits: tuple[int, ...]
    pool: Pool
    parts: tuple[IndexArray, IndexArray, IndexArray]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that are learned."""
        return self.texts.of(self.parts[0]).classes

    @property
    def label_N(self) -> Tensor:
        """Index of the class of each text."""
        return torch.from_numpy(self.texts.indices(self.classes))

    @property
    def held(self) -> IndexArray:
        """Places of the texts that nothing is fitted to: to choose on, then to measure on."""
        return np.concatenate(self.parts[1:])

    def states(self, model: SequenceModel, folder: Path, on_progress: OnStage) -> FloatArray:
        """Pooled states of all texts after each exit, kept in a folder."""
        return exit_states(
            model.stack, self.sequences, self.exits, self.pool, folder,
            lambda done, total: on_progress("states", done, total),
        )  # fmt: skip

    def plain_heads(
        self, states_NED: FloatArray, on_heads: Callable[[int, int], None]
    ) -> dict[int, ClassHead]:
        """A head for each exit of the frozen model, without its temperature."""
        by_layer = {}
        for place, layer in enumerate(self.exits):
            states_ND = torch.from_numpy(states_NED[:, place])
            parts = [(states_ND[each], self.label_N[each]) for each in self.parts[:2]]
            by_layer[layer], _ = fit_head(*parts[0], *parts[1])
            on_heads(place + 1, len(self.exits))
        return by_layer

    def finish(
        self, plain: Mapping[int, ClassHead], states_MED: FloatArray
    ) -> tuple[ClassHeads, ClassifyReport]:
        """Set temperatures and bounds, and measure.

        Args:
            plain: Heads as they were fitted.
            states_MED: Pooled states of the texts that are ``held``.
        """
        learned, chosen, measured = self.parts
        label_N, by_layer, rows = self.label_N, {}, []
        states = torch.from_numpy(states_MED)
        for place, layer in enumerate(self.exits):
            states_MD = states[:, place]
            choose = states_MD[: len(chosen)], label_N[chosen]
            unseen = states_MD[len(chosen) :], label_N[measured]
            by_layer[layer], temperature = temper(plain[layer], *choose)
            rows.append(measure_head(layer, plain[layer], by_layer[layer], temperature, *unseen))
        _bound(by_layer, states[len(chosen) :])
        report = ClassifyReport(
            rows=tuple(rows),
            classes=len(self.classes),
            learned=len(learned),
            measured=len(measured),
        )
        return ClassHeads(self.classes, self.pool, by_layer), report


def fit_heads(
    texts: LabelledTexts,
    states_NED: FloatArray,
    exits: tuple[int, ...],
    pool: Pool,
    config: ClassifyTuneConfig,
) -> tuple[ClassHeads, ClassifyReport]:
    """Fit the heads of all exits of a frozen model to states that were computed before.

    Args:
        texts: What was read, for its classes.
        states_NED: Pooled states of all texts after each exit.
        exits: Numbers of layers executed; the last is full depth.
        pool: What of a sequence the states are.
        config: Its share that is held out, and its seed.
    """
    parts = three_ways(texts, config.held_out, config.seed)
    task = HeadTask(texts=texts, sequences=(), exits=exits, pool=pool, parts=parts)
    plain = task.plain_heads(states_NED, lambda *_: None)
    return task.finish(plain, states_NED[task.held])


def _bound(by_layer: dict[int, ClassHead], states_NED: torch.Tensor) -> None:
    """Have each exit bound the last one's scores, as texts show it that nothing was fitted to."""
    heads = list(by_layer.items())
    scores = [
        log_odds(head(states_NED[:, place]).softmax(-1).numpy())
        for place, (_, head) in enumerate(heads)
    ]
    bounds = bounds_of(np.stack(scores, axis=1), BOUNDED)
    for (layer, head), bound_C2 in zip(heads, bounds, strict=False):  # full depth needs none
        by_layer[layer] = replace(head, bound_C2=bound_C2)


def three_ways(
    texts: LabelledTexts, held_out: float, seed: int
) -> tuple[IndexArray, IndexArray, IndexArray]:
    """Places to fit heads to, to choose and calibrate on, and to measure on.

    A text that is there more than once is in one of the parts alone.

    Raises:
        TraceError: the classes have so few texts that a part would be empty.
    """
    learned, held = split_by_class(texts.labels, held_out, seed)
    halves = split_by_class([texts.labels[place] for place in held.tolist()], 0.5, seed)
    chosen, measured = (held[half] for half in halves)
    seen = {texts.texts[place] for place in learned.tolist()}
    chosen = _others(texts, chosen, seen)
    measured = _others(texts, measured, seen | {texts.texts[p] for p in chosen.tolist()})
    if not len(chosen) or not len(measured):
        raise TraceError(
            "data",
            f"holds {len(texts)} texts of {len(texts.classes)} classes, too few to hold some out",
            "Give more of each class, or a larger --held-out",
        )
    return learned, chosen, measured


def _others(texts: LabelledTexts, places: IndexArray, seen: Container[str]) -> IndexArray:
    """Places of texts that were not seen."""
    return places[[texts.texts[place] not in seen for place in places.tolist()]]
