"""What became of a text that was classified, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offramp.controller.costs.readings import EnergyReading, EnergyShare
from offramp.worker.classifying.classifier import Classified
from offramp.worker.energy.step_meter import attributed


@dataclass(frozen=True, slots=True)
class ClassifiedText:
    """What became of a text.

    Attributes:
        label: Index of its likeliest class.
        name: What that class is called.
        probs: Chances of the classes.
        layers: Layers that it ran.
        generation: Release that decided it; 0: full depth, or no release.
        energy: Its share of what its batch took, by the layers that each text ran; None: unknown.
        is_best: Whether it is the best of those that it was compared with.
    """

    label: int
    name: str
    probs: tuple[float, ...]
    layers: int
    generation: int
    energy: EnergyShare | None = None
    is_best: bool = False


def shares_of(run: Classified, reading: EnergyReading | None) -> list[EnergyShare | None]:
    """What each text of a batch took, shared by the layers that each ran."""
    # A counter that did not move says nothing of so short a batch.
    if reading is None or not reading.joules:
        return [None] * len(run.layers_N)
    layer_j, read = reading.joules / int(run.layers_N.sum()), attributed(reading)
    return [EnergyShare(layer_j * layers, *read, 1.0) for layers in run.layers_N.tolist()]


def classified_text(
    run: Classified,
    row: int,
    labels: Sequence[str],
    energy: EnergyShare | None,
    generation: int,
    *,
    is_best: bool = False,
) -> ClassifiedText:
    """Tell what became of one row of a batch."""
    return ClassifiedText(
        label=int(run.label_N[row]),
        name=labels[int(run.label_N[row])],
        probs=tuple(run.probs_NC[row].tolist()),
        layers=int(run.layers_N[row]),
        generation=generation,
        energy=energy,
        is_best=is_best,
    )
