"""Adapters in parts: they are too large for one blob of a registry.

Each part is a blob like any other, under its own SHA-256. The index, a blob, too, lists them; a
signed manifest names the index by its SHA-256, so every part is known by its digest before it is
fetched, and nothing but the publisher's bytes is ever put together. A publisher that was killed
half way has left parts that nobody names; what it puts again takes their place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from offramp.controller.adapters.adapter_folder import AGAIN, FORMAT, WEIGHTS, read_description
from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.policies.kinds import digest_of
from offramp.controller.strict import (
    COUNT,
    DIGEST,
    FINGERPRINT,
    TEXT,
    Check,
    canonical_json,
    list_of,
    parse_strictly,
    refuse,
)

PART_BYTES = 4 * 2**20
"""Size of every part but the last."""

MAX_INDEX_BYTES = 2**20
"""Longest index that is fetched; it lists some 60 GB."""

MAX_ADAPTER_MB = 512
"""Largest adapters that are published or fetched unless a setting says otherwise, in MiB."""

LIMIT = "OFFRAMP_MAX_ADAPTER_MB"
"""The setting that says so."""

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterIndex:
    """What adapters are, and which parts they are put together from.

    Attributes:
        format: Version of this list of fields, and of the folder's files.
        kind: "translator" or "layer", as ``offramp tune --kind`` has it.
        model: Fingerprint of the model that they were fitted to, hex.
        exits: Layers that have one, ascending.
        digest: SHA-256 of the weights' file, hex: the name by which policies know them.
        size: Length of that file, bytes.
        parts: SHA-256 of each part of it, hex, in order.
    """

    format: int = FORMAT
    kind: str
    model: str
    exits: tuple[int, ...]
    digest: str
    size: int
    parts: tuple[str, ...]

    @property
    def description(self) -> dict[str, Any]:
        """What stands in the description of a folder that is put together from it."""
        names = ("format", "kind", "model", "digest")
        return {name: getattr(self, name) for name in names} | {"exits": list(self.exits)}

    @property
    def name(self) -> str:
        """SHA-256 of the index itself, hex."""
        return digest_of(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical_json({each.name: getattr(self, each.name) for each in fields(self)})

    @classmethod
    def from_bytes(cls, raw: bytes) -> AdapterIndex:
        """Parse strictly.

        Raises:
            PolicyRefusedError: BAD_FORMAT, naming what is wrong.
        """
        values = parse_strictly(raw, _FIELDS)
        if values["format"] != FORMAT:
            refuse(f"adapters of format {values['format']}, not {FORMAT}")
        if len(values["parts"]) != -(-values["size"] // PART_BYTES) or not values["parts"]:
            refuse(f"adapters of {values['size']} bytes in {len(values['parts'])} parts")
        return cls(**values | {name: tuple(values[name]) for name in ("exits", "parts")})


_FIELDS: dict[str, Check] = {
    "format": COUNT,
    "kind": TEXT,
    "model": FINGERPRINT,
    "exits": list_of(COUNT),
    "digest": DIGEST,
    "size": COUNT,
    "parts": list_of(DIGEST),
}
assert _FIELDS.keys() == {field.name for field in fields(AdapterIndex)}


def _require_told(folder: Path) -> None:
    """Refuse heads whose weights do not say of which classes they are: they alone are sent."""
    try:
        with safe_open(folder / WEIGHTS, "np") as file:
            is_told = bool(file.metadata())
    except SafetensorError as error:
        raise ConfigError("heads", f"{folder / WEIGHTS} is unreadable ({error})", AGAIN) from error
    if not is_told:
        raise ConfigError(
            "heads",
            f"{folder} was fitted before heads could be sent to workers with others",
            "Run `offramp tune --task classify` again, and train policies for what it fits",
        )


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A folder that ``offramp tune`` wrote, and what it is found to hold.

    Attributes:
        folder: Where it lies.
        index: What it holds.
    """

    folder: Path
    index: AdapterIndex

    @classmethod
    def open(cls, folder: Path, limit_mb: float = MAX_ADAPTER_MB) -> AdapterSource:
        """Look a folder through, its weights part by part.

        Args:
            folder: With both files.
            limit_mb: Most MiB that the weights may have.

        Raises:
            ConfigError: the folder is unreadable or damaged, or over the limit.
        """
        facts = read_description(folder)
        whole, parts, size = hashlib.sha256(), [], 0
        try:
            require_size((folder / WEIGHTS).stat().st_size, limit_mb)
            for part in _cut(folder):
                whole.update(part)
                parts.append(digest_of(part))
                size += len(part)
        except OSError as error:
            problem = f"{folder} holds no readable {WEIGHTS} ({error.strerror or error})"
            raise ConfigError("translators", problem, AGAIN) from error
        if whole.hexdigest() != facts.get("digest"):
            problem = f"{folder / WEIGHTS} is not the file that its description names"
            raise ConfigError("translators", problem, AGAIN)
        if facts.get("kind") == "classify":
            _require_told(folder)
        values = {
            "format": FORMAT,
            "kind": facts.get("kind", "translator"),
            "model": facts.get("model"),
            "exits": facts.get("exits"),
            "digest": whole.hexdigest(),
            "size": size,
            "parts": parts,
        }
        try:
            return cls(folder, AdapterIndex.from_bytes(canonical_json(values)))
        except (PolicyRefusedError, TypeError, ValueError) as error:
            problem = f"{folder} has an unusable description ({error})"
            raise ConfigError("translators", problem, AGAIN) from error

    def blobs(self) -> Iterator[bytes]:
        """What a worker needs to put the folder together again, one at a time: the index last.

        Raises:
            ConfigError: the weights are no more those that were found.
        """
        for part, digest in zip_longest(_cut(self.folder), self.index.parts):
            if part is None or digest_of(part) != digest:
                problem = f"{self.folder / WEIGHTS} was changed while it was read"
                raise ConfigError("translators", problem, "Publish it again")
            yield part
        yield self.index.to_bytes()


def require_size(size: int, limit_mb: float) -> None:
    """Refuse adapters that are over the limit.

    Raises:
        ConfigError: naming the setting.
    """
    if size > limit_mb * MIB:
        problem = f"the adapters have {size / MIB:,.1f} MiB, over {limit_mb:g}"
        raise ConfigError(LIMIT, problem, "Raise it here and for the workers, or tune fewer exits")


def require_model(index: AdapterIndex, model: str) -> None:
    """Refuse adapters that were fitted to another model than a policy was trained for.

    Raises:
        PolicyRefusedError: WRONG_MODEL.
    """
    if index.model != model:
        detail = f"adapters {index.digest[:12]} were fitted to model {index.model}, not to {model}"
        raise PolicyRefusedError(Refusal.WRONG_MODEL, detail)


def _cut(folder: Path) -> Iterator[bytes]:
    with (folder / WEIGHTS).open("rb") as file:
        while part := file.read(PART_BYTES):
            yield part
