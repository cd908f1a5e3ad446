"""Pooled states of texts after each exit, computed once, kept part by part for a resumed run.

Shape suffixes: N texts, E exits (full depth among them), D width.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch

from offramp.agents.training.resuming import Resumable
from offramp.controller.durable import write_durably
from offramp.controller.features import FloatArray
from offramp.worker.classifying.sequence_stack import Pool, SequenceBatch, SequenceStack

STATES = "states"
"""Folder of the parts, while a run lasts."""

PART = 512
"""Texts whose states are written together."""

ROWS = 32
"""Texts that run together, of like length."""


class TrainingState(TypedDict):
    """A whole model's training between two steps: all that it goes on with."""

    step: int
    model: dict[str, Any]
    heads: dict[str, Any]
    optimizer: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyCheckpoint(Resumable):
    """What a run was asked for; the parts of its states lie beside it.

    Attributes:
        settings: Whatever changes the result, as JSON.
        training: Where the training of the whole model is; None before it, and without it.
    """

    command: ClassVar[str] = "offramp tune --task classify"

    settings: dict[str, Any]
    training: TrainingState | None = None


def exit_states(
    stack: SequenceStack,
    sequences: Sequence[Sequence[int]],
    exits: Sequence[int],
    pool: Pool,
    folder: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> FloatArray:
    """Pooled states of all sequences after each exit, float32 [N, E, D].

    Args:
        stack: Runs the layers, all of them.
        sequences: Token ids.
        exits: Numbers of layers executed, ascending.
        pool: What of a sequence is kept.
        folder: Where parts are kept, and found by a run that goes on; None keeps none.
        on_progress: Told (texts done, texts in all).
    """
    parts = []
    for start in range(0, len(sequences), PART):
        path = None if folder is None else folder / f"{start:07d}.npy"
        if path is not None and path.exists():
            parts.append(np.load(path, allow_pickle=False))
        else:
            parts.append(_part(stack, sequences[start : start + PART], exits, pool))
            if path is not None:
                _keep(path, parts[-1])
        on_progress(min(start + PART, len(sequences)), len(sequences))
    return np.concatenate(parts)


@torch.inference_mode()
def _part(
    stack: SequenceStack, sequences: Sequence[Sequence[int]], exits: Sequence[int], pool: Pool
) -> FloatArray:
    out_NED = np.empty((len(sequences), len(exits), stack.width), np.float32)
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]))
    for start in range(0, len(order), ROWS):
        places = order[start : start + ROWS]
        batch = SequenceBatch(stack, [sequences[place] for place in places])
        for layer in range(1, exits[-1] + 1):
            batch.run_layer(layer - 1)
            if layer in exits:
                out_NED[places, exits.index(layer)] = batch.pooled(pool).cpu().numpy()
    return out_NED


def _keep(path: Path, states_NED: FloatArray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, states_NED)
    write_durably(path, buffer.getvalue())
