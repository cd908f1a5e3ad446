"""A linear head per exit: what reads a class off a pooled state, and the folder it is kept in.

A folder holds ``translators.safetensors`` (float32 ``layer.weight`` [C, D] and ``layer.bias`` [C]
per exit, each already divided by its temperature; in its header labels and pool, which so are part
of the digest) and ``tune.json``: model, exits, how well each does. Shape suffixes: N rows, C
classes, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import linear

from offramp.controller.adapters.adapter_folder import (
    HEADS_KIND,
    OF_HEADS,
    TUNE_AGAIN,
    WEIGHTS,
    read_description,
)
from offramp.controller.errors import ConfigError
from offramp.worker.classifying.sequence_stack import Pool, parse_pool
from offramp.worker.model.translators import read_weights, save_exits

AGAIN = TUNE_AGAIN[OF_HEADS]

SAID = "heads"
"""Key in the header of the weights, of labels and pool as JSON."""

PARTS = ("weight", "bias", "bound")
"""Names of a head's tensors, behind its layer."""


@dataclass(frozen=True, slots=True)
class ClassHead:
    """One exit's head.

    Attributes:
        weight_CD: Weights of the classes.
        bias_C: Biases of the classes.
        bound_C2: Slope and offset of the line over each class's log-odds here, below which full
            depth's lie for most texts; None at full depth, and of heads fitted without.
    """

    weight_CD: Tensor
    bias_C: Tensor
    bound_C2: Tensor | None = None

    def __call__(self, pooled_ND: Tensor) -> Tensor:
        """Logits of the classes, [N, C]."""
        return linear(pooled_ND, self.weight_CD, self.bias_C)


class ClassHeads:
    """The heads of a model's exits and of its full depth.

    Args:
        labels: Names of the C classes.
        pool: What of a sequence they read.
        by_layer: The heads, by number of layers executed; the deepest is full depth's.
        digest: SHA-256 of the file they were loaded from; "" if from none.

    Attributes:
        exits: Layers that have a head, ascending; the last is full depth.
    """

    def __init__(
        self,
        labels: tuple[str, ...],
        pool: Pool,
        by_layer: Mapping[int, ClassHead],
        digest: str = "",
    ) -> None:
        self.labels = labels
        self.pool: Pool = pool
        self.digest = digest
        self.exits = tuple(sorted(by_layer))
        self._by_layer = dict(by_layer)

    @property
    def has_bounds(self) -> bool:
        """Whether every exit bounds full depth's scores."""
        return all(self._by_layer[layer].bound_C2 is not None for layer in self.exits[:-1])

    def head(self, layer: int) -> ClassHead:
        """The head after so many layers."""
        return self._by_layer[layer]

    def logits(self, layer: int, pooled_ND: Tensor) -> Tensor:
        """Logits of the classes after so many layers, [N, C]."""
        return self._by_layer[layer](pooled_ND)

    def save(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Write both files.

        Args:
            folder: Made if missing.
            description: At least ``model`` (fingerprint), ``layers`` and ``width``.

        Raises:
            OSError: the folder cannot be written.
        """
        tensors = {
            f"{layer}.{part}": tensor
            for layer, head in self._by_layer.items()
            for part, tensor in zip(
                PARTS, (head.weight_CD, head.bias_C, head.bound_C2), strict=True
            )
            if tensor is not None
        }
        said = {"labels": list(self.labels), "pool": self.pool}
        facts = {**description, "kind": HEADS_KIND, **said, "exits": list(self.exits)}
        save_exits(folder, tensors, facts, {SAID: json.dumps(said)})

    @classmethod
    def load(cls, folder: Path, fingerprint: str, layers: int, width: int) -> ClassHeads:
        """Read a folder that ``offramp tune --task classify`` wrote, for the model of then.

        Args:
            folder: With both files.
            fingerprint: Fingerprint of the model in use.
            layers: Number of its layers.
            width: D of the model.

        Raises:
            ConfigError: field ``heads``; the folder holds no heads, or another model's, or a
                tensor is missing, misshapen or not finite.
        """
        facts = _facts_of(folder)
        exits, labels = _checked(folder, facts, fingerprint, layers)
        tensors = read_weights(folder, facts, OF_HEADS)
        known = {f"{layer}.{part}" for layer in exits for part in PARTS}
        if odd := sorted(tensors.keys() - known):
            raise ConfigError("heads", f"{folder} should not have {odd}", AGAIN)
        by_layer = {}
        for layer in exits:
            found = [tensors.get(f"{layer}.{part}") for part in PARTS]
            shapes = [None if part is None else tuple(part.shape) for part in found]
            classes = len(labels)
            if shapes[:2] != [(classes, width), (classes,)] or shapes[2] not in (
                None,
                (classes, 2),
            ):
                raise ConfigError("heads", f"exit {layer} has shapes {shapes}", AGAIN)
            parts = [part for part in found if part is not None]
            if not all(part.isfinite().all() for part in parts):
                raise ConfigError("heads", f"exit {layer} holds NaN or infinite values", AGAIN)
            by_layer[layer] = ClassHead(*parts)
        return cls(labels, parse_pool(str(facts.get("pool"))), by_layer, str(facts["digest"]))


def labels_in(folder: Path) -> tuple[str, ...]:
    """The names of the classes that a folder's heads tell apart.

    Raises:
        ConfigError: field ``heads``; the folder holds no heads.
    """
    facts = _facts_of(folder)
    return _labels_of(folder, facts)


def _facts_of(folder: Path) -> dict[str, Any]:
    """What a folder says of itself, and its weights of themselves if they do."""
    facts = read_description(folder, OF_HEADS)
    if facts.get("kind") != HEADS_KIND:
        raise ConfigError("heads", f"{folder} holds adapters of another task", AGAIN)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            said = json.loads((file.metadata() or {}).get(SAID, "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ConfigError(
            "heads", f"{folder} holds no readable {WEIGHTS} ({error})", AGAIN
        ) from error
    found = said if isinstance(said, dict) else {}
    return facts | {name: found[name] for name in ("labels", "pool") if name in found}


def _checked(
    folder: Path, facts: Mapping[str, Any], fingerprint: str, layers: int
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The exits and labels that a description names, if it is one of heads for this model."""
    if facts.get("model") != fingerprint:
        raise ConfigError("heads", f"{folder} was fitted to another model", AGAIN)
    exits, labels = facts.get("exits"), _labels_of(folder, facts)
    listed = isinstance(exits, list) and all(type(layer) is int for layer in exits)
    if not listed or exits != sorted(set(exits or ())) or not exits or exits[-1] != layers:
        raise ConfigError("heads", f"exits {exits} do not ascend to {layers}", AGAIN)
    if exits[0] < 1:
        raise ConfigError("heads", f"exit {exits[0]} is below 1", AGAIN)
    return tuple(exits), labels


def _labels_of(folder: Path, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes that a description names, each by a name of its own."""
    labels = facts.get("labels")
    named = isinstance(labels, list) and all(isinstance(e, str) and e.strip() for e in labels)
    if not named or len(set(labels or ())) < 2 or len(set(labels or ())) != len(labels or ()):
        raise ConfigError("heads", f"{folder} names no two classes or more", AGAIN)
    return tuple(labels or ())
