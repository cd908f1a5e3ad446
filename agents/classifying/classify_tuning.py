"""Fit a head per exit to a frozen model: the whole way, top to bottom.

Shape suffixes: N texts, E exits, D width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.agents.classifying.classify_config import ClassifyTuneConfig, exits_of_stack
from offramp.agents.classifying.exit_states import STATES, ClassifyCheckpoint, exit_states
from offramp.agents.classifying.head_fitting import HeadQuality, fit_head, measure_head, temper
from offramp.agents.classifying.labelled_texts import (
    LabelledTexts,
    encoded,
    read_labelled,
    split_by_class,
)
from offramp.controller.errors import TraceError
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.classifying.best_of import bounds_of, log_odds
from offramp.worker.classifying.class_heads import ClassHead, ClassHeads
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.sequence_stack import Pool, parse_pool
from offramp.worker.model.loading import parse_dtype

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


def tune_classes(
    config: ClassifyTuneConfig,
    out: Path,
    *,
    resume: bool = False,
    on_progress: OnStage = lambda *_: None,
) -> ClassifyReport:
    """Fit and save a head per exit; the model stays as it is.

    Args:
        config: What is fitted to what.
        out: Folder of the heads.
        resume: Go on with the states that a run before this one kept there.
        on_progress: Told as states are computed and heads are fitted.

    Raises:
        ModelError: the model cannot be used.
        TraceError: field ``data``; the file is unusable, holds one class only, too few texts of
            them to hold some out, or a text that is empty or over the model's context.
        ConfigError: exits beyond the model, or ``resume`` with other settings.
    """
    torch.set_num_threads(config.threads)
    texts = read_labelled(config.data, config.text_field, config.label_field)
    three_ways(texts, config.held_out, config.seed)  # refused before states take minutes
    model = SequenceModel.load(config.model, parse_dtype(config.dtype), config.device)
    sequences = encoded(model, texts, config.data)
    exits = exits_of_stack(model.stack, config.exits)
    pool = parse_pool(config.pool) if config.pool else model.stack.best_pool
    settings = _settings(config, model, texts, exits, pool)
    if resume:
        ClassifyCheckpoint.load(out).require(settings)
    else:
        out.mkdir(parents=True, exist_ok=True)
        ClassifyCheckpoint(settings=settings).save(out)
    states_NED = exit_states(
        model.stack, sequences, exits, pool, out / STATES,
        lambda done, total: on_progress("states", done, total),
    )  # fmt: skip
    heads, report = fit_heads(
        texts, states_NED, exits, pool, config, lambda *count: on_progress("heads", *count)
    )
    description = {
        **settings,
        "layers": model.stack.layers,
        "width": model.stack.width,
        "report": asdict(report),
    }
    # Its presence says that the rest is there.
    heads.save(out, description)
    shutil.rmtree(out / STATES)
    return report


def fit_heads(
    texts: LabelledTexts,
    states_NED: FloatArray,
    exits: tuple[int, ...],
    pool: Pool,
    config: ClassifyTuneConfig,
    on_heads: Callable[[int, int], None] = lambda *_: None,
) -> tuple[ClassHeads, ClassifyReport]:
    """Fit the heads of all exits to states that were computed before.

    Args:
        texts: What was read, for its classes.
        states_NED: Pooled states of all texts after each exit.
        exits: Numbers of layers executed; the last is full depth.
        pool: What of a sequence the states are.
        config: Its share that is held out, and its seed.
        on_heads: Told (heads fitted, heads in all).
    """
    learned, chosen, measured = three_ways(texts, config.held_out, config.seed)
    classes = texts.of(learned).classes
    label_N = torch.from_numpy(texts.indices(classes))
    by_layer: dict[int, ClassHead] = {}
    rows = []
    for place, layer in enumerate(exits):
        states_ND = torch.from_numpy(states_NED[:, place])
        parts = [(states_ND[each], label_N[each]) for each in (learned, chosen, measured)]
        plain, _ = fit_head(*parts[0], *parts[1])
        by_layer[layer], temperature = temper(plain, *parts[1])
        rows.append(measure_head(layer, plain, by_layer[layer], temperature, *parts[2]))
        on_heads(place + 1, len(exits))
    _bound(by_layer, torch.from_numpy(states_NED[measured]))
    report = ClassifyReport(
        rows=tuple(rows), classes=len(classes), learned=len(learned), measured=len(measured)
    )
    return ClassHeads(classes, pool, by_layer), report


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

    Raises:
        TraceError: the classes have so few texts that a part would be empty.
    """
    learned, held = split_by_class(texts.labels, held_out, seed)
    halves = split_by_class([texts.labels[place] for place in held.tolist()], 0.5, seed)
    chosen, measured = (held[half] for half in halves)
    if not len(chosen) or not len(measured):
        raise TraceError(
            "data",
            f"holds {len(texts)} texts of {len(texts.classes)} classes, too few to hold some out",
            "Give more of each class, or a larger --held-out",
        )
    return learned, chosen, measured


def _settings(
    config: ClassifyTuneConfig,
    model: SequenceModel,
    texts: LabelledTexts,
    exits: Sequence[int],
    pool: str,
) -> dict[str, Any]:
    asked = asdict(replace(config, exits=tuple(exits), pool=pool))
    for name in ("data", "text_field", "label_field", "model", "device", "threads"):
        del asked[name]
    return {
        **asked,
        "exits": list(exits),
        "model": model.fingerprint,
        "tokenizer": model.tokenizer_fingerprint,
        "data": texts.digest,
    }
