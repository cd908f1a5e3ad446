"""Exit translators: small frozen corrections of the hidden state at an exit.

A model that was never trained to exit keeps its early states in a basis that its own norm and head
read badly. A translator maps the state after a layer to one they read well:
``t(x) = x + B (A x) + b``, a low-rank form of the tuned lens (Belrose et al. 2023, section 3).
``offramp tune`` fits them. What they return is for probes and the head only: the cache and the
deeper layers take the state as it was, so full depth never sees a translator.

A folder holds ``translators.safetensors`` (float32 tensors ``layer.A`` [r, D], ``layer.B`` [D, r]
and ``layer.b`` [D] per exit) and ``tune.json`` (what they were fitted to, and how well). It may
also hold what skipped layers are filled through (``fill.KVMap``), or that alone.

Shape suffixes: N rows (any number of leading dimensions), D width, r rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import linear

from offramp.controller.adapters.adapter_folder import (
    AGAIN,
    DESCRIPTION,
    FORMAT,
    HEADS_KIND,
    OPTION,
    TUNE_AGAIN,
    WEIGHTS,
    read_description,
)
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.worker.model.filling.kv_map import PARTS, UNMAPPED, KVMap, take_kv_map

FILL = "kv"
"""What the description of a folder says that holds a map of the fill, and reads exits plainly."""


@dataclass(frozen=True, slots=True)
class Translator:
    """The correction at one exit.

    Attributes:
        A_rD: Projects the state down to rank r.
        B_Dr: Projects it up again.
        b_D: Shift of the state.
    """

    A_rD: Tensor
    B_Dr: Tensor
    b_D: Tensor

    def __call__(self, x_ND: Tensor) -> Tensor:
        """x + B (A x) + b, [N, D], in the dtype of x."""
        return x_ND + linear(linear(x_ND, self.A_rD), self.B_Dr, self.b_D)

    def to(self, dtype: torch.dtype, device: torch.device | str) -> Translator:
        """Copy to another dtype and device."""
        return Translator(*(part.to(device, dtype) for part in (self.A_rD, self.B_Dr, self.b_D)))


class ExitTranslators:
    """The translators of a model, by the layer they follow; none of a layer is the identity.

    Args:
        by_layer: Layers are counted from 1, as exits are.

        digest: SHA-256 of the file they were loaded from; "" if from none.
        kv_map: What skipped layers are filled through.

    Attributes:
        layers: Index of the adapter layer after an exit, by exit: there are none.
    """

    def __init__(
        self,
        by_layer: Mapping[int, Translator] | None = None,
        digest: str = "",
        kv_map: KVMap = UNMAPPED,
    ) -> None:
        self.digest = digest
        self.kv_map = kv_map
        self.layers: dict[int, int] = {}
        self._by_layer = dict(sorted((by_layer or {}).items()))

    @property
    def exits(self) -> tuple[int, ...]:
        """Layers that have a translator, ascending."""
        return tuple(self._by_layer)

    def apply(self, layer: int, x_ND: Tensor) -> Tensor:
        """The state [N, D] that norm, head and probes should read after ``layer`` layers.

        Where the layer has no translator this is ``x_ND`` itself, not a copy.
        """
        translator = self._by_layer.get(layer)
        return x_ND if translator is None else translator(x_ND)

    def correct(self, layer: int, x_ND: Tensor) -> Tensor:
        """The same while tokens are decoded."""
        return self.apply(layer, x_ND)

    def to(self, dtype: torch.dtype, device: torch.device | str) -> ExitTranslators:
        """Copy to another dtype and device."""
        moved = {layer: each.to(dtype, device) for layer, each in self._by_layer.items()}
        return ExitTranslators(moved, self.digest, self.kv_map)

    def save(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Write both files; the description gets the format, the exits and the weights' digest.

        Args:
            folder: Made if missing.
            description: At least ``model`` (fingerprint), ``layers`` and ``width``.

        Raises:
            OSError: the folder cannot be written.
        """
        save_exits(folder, self._tensors(), {**description, "exits": list(self.exits)})

    @classmethod
    def load(
        cls,
        folder: Path,
        fingerprint: str,
        layers: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        values: int = 0,
    ) -> ExitTranslators:
        """Read a folder that ``offramp tune`` wrote, for the model that it was fitted to.

        Args:
            folder: With both files.
            fingerprint: Fingerprint of the model in use (``worker.loading.model_fingerprint``).
            layers: Number of layers of the model; exits lie below.
            width: D of the model.
            dtype: Dtype that they get: the model's.
            device: Where they are used.
            values: How many numbers a layer's values of one token are; without, a map that reads
                them is refused.

        Raises:
            ConfigError: field ``translators``; a file is missing or damaged, they belong to
                another model, or a tensor is missing, misshapen or not finite.
        """
        facts = read_description(folder)
        exits = exits_of(folder, facts, fingerprint, layers)
        tensors = read_weights(folder, facts)
        kv_map = take_kv_map(folder, tensors, exits, layers, (width, values))
        read = () if facts.get("kind") == FILL else exits
        _check(folder, tensors, read, width)
        parts = {
            layer: Translator(*(tensors[f"{layer}.{part}"] for part in PARTS)) for layer in read
        }
        return cls(parts, str(facts["digest"]), kv_map).to(dtype, device)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{layer}.{part}": tensor
            for layer, each in self._by_layer.items()
            for part, tensor in zip(PARTS, (each.A_rD, each.B_Dr, each.b_D), strict=True)
        }


UNTRANSLATED = ExitTranslators()
"""The identity at every exit."""


def save_exits(
    folder: Path,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    within: Mapping[str, str] | None = None,
) -> None:
    """Write what was fitted, as float32, and then what it is: its presence says both are there.

    Args:
        folder: Made if missing.
        tensors: What was fitted.
        description: What it is.
        within: What the file of the weights says of them itself, so that their digest holds it,
            and it goes wherever they are sent.
    """
    found = {
        n: t.detach().to("cpu", torch.float32).contiguous().clone() for n, t in tensors.items()
    }
    blob = save(found, None if within is None else dict(within))
    facts = {"format": FORMAT, **description, "digest": hashlib.sha256(blob).hexdigest()}
    write_durably(folder / WEIGHTS, blob)
    write_durably(folder / DESCRIPTION, (json.dumps(facts, indent=1) + "\n").encode())


def exits_of(
    folder: Path, facts: Mapping[str, Any], fingerprint: str, layers: int
) -> tuple[int, ...]:
    """The layers that were fitted; ConfigError for heads, another model's, or layers it lacks."""
    if facts.get("kind") == HEADS_KIND:
        problem = f"{folder} holds heads of a classification, which no token is read by"
        raise ConfigError("translators", problem, "Name it as heads, or adapters of `offramp tune`")
    if facts.get("model") != fingerprint:
        raise ConfigError(
            "translators",
            f"{folder} was fitted to the model {str(facts.get('model'))[:12]}…, "
            f"not to {fingerprint[:12]}…: other weights, or in fewer bytes; the dtype is free",
            AGAIN,
        )
    exits: Any = facts.get("exits")
    listed = isinstance(exits, list) and all(type(layer) is int for layer in exits)
    if not listed or exits != sorted(set(exits)) or not all(1 <= e < layers for e in exits):
        raise ConfigError(
            "translators", f"exits {exits} do not ascend within [1, {layers - 1}]", AGAIN
        )
    return tuple(exits)


def read_weights(folder: Path, facts: Mapping[str, Any], field: str = OPTION) -> dict[str, Tensor]:
    """The tensors that a description names; ConfigError if they are others, or damaged."""
    try:
        with (folder / WEIGHTS).open("rb") as file:  # hashed as it is read: it may be large
            found = hashlib.file_digest(file, "sha256").hexdigest()
        tensors: dict[str, Tensor] = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        problem = f"{folder} holds no readable {WEIGHTS} ({error})"
        raise ConfigError(field, problem, TUNE_AGAIN[field]) from error
    if found != facts.get("digest"):
        problem = f"{WEIGHTS} in {folder} is not the one {DESCRIPTION} names"
        raise ConfigError(field, problem, TUNE_AGAIN[field])
    return tensors


def _check(folder: Path, tensors: dict[str, Tensor], exits: tuple[int, ...], width: int) -> None:
    expected = {f"{layer}.{part}" for layer in exits for part in PARTS}
    if odd := sorted(expected ^ tensors.keys()):
        raise ConfigError("translators", f"{folder} lacks, or should not have, {odd}", AGAIN)
    for layer in exits:
        down, up, shift = (tensors[f"{layer}.{part}"] for part in PARTS)
        rank = down.shape[0] if down.ndim else 0
        shapes = [tuple(each.shape) for each in (down, up, shift)]
        if rank < 1 or shapes != [(rank, width), (width, rank), (width,)]:
            raise ConfigError(
                "translators",
                f"exit {layer} has shapes {shapes}, not [(r, {width}), ({width}, r), ({width},)]",
                AGAIN,
            )
        if not all(each.isfinite().all() for each in (down, up, shift)):
            raise ConfigError("translators", f"exit {layer} holds NaN or infinite values", AGAIN)
