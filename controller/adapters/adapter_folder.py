"""The folder of adapters that ``offramp tune`` writes: two files, and what one says of the other.

``translators.safetensors`` holds float32 tensors, named by exit; ``tune.json`` says which model
they were fitted to, for which exits, and what the weights' SHA-256 is.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from offramp.controller.durable import sync_folder
from offramp.controller.errors import ConfigError

WEIGHTS = "translators.safetensors"
DESCRIPTION = "tune.json"
KEPT = "translators"
"""Folder, in a recording's or beside bundles, of the adapters that they were recorded through."""

FORMAT = 1
"""Version of both files; a reader refuses any other."""

HEADS_KIND = "classify"
"""Kind that the description of a folder names that holds heads of a classification."""

OPTION, OF_HEADS = "translators", "heads"
"""What errors name a folder of adapters for tokens, and one of heads."""

TUNE = {OPTION: "offramp tune", OF_HEADS: "offramp tune --task classify"}
"""The command that writes either."""

TUNE_AGAIN = {field: f"Run `{command}` for this model again" for field, command in TUNE.items()}
AGAIN = TUNE_AGAIN[OPTION]


def read_description(folder: Path, field: str = OPTION) -> dict[str, Any]:
    """What a folder says of itself.

    Args:
        folder: The folder.
        field: What errors name it.

    Raises:
        ConfigError: that cannot be read.
    """
    try:
        facts = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            field,
            f"{folder} holds no readable {DESCRIPTION}",
            f"Name a folder that a finished `{TUNE[field]}` wrote",
        ) from error
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != FORMAT:
        problem = f"{folder / DESCRIPTION} has format {found}, not {FORMAT}"
        raise ConfigError(field, problem, TUNE_AGAIN[field])
    assert isinstance(facts, dict)
    return facts


def kept_in(folder: Path) -> Path | None:
    """The folder of the adapters that were kept in another; None if none were."""
    kept = folder / KEPT
    return kept if (kept / DESCRIPTION).exists() else None


def find_adapters(digest: str, *places: Path) -> Path | None:
    """The first place that says it holds the adapters of that digest; None if none does."""
    for place in places:
        with contextlib.suppress(ConfigError):
            if read_description(place).get("digest") == digest:
                return place
    return None


def require_found(digest: str, *places: Path) -> Path:
    """The first place that says it holds the adapters of that digest.

    Raises:
        ConfigError: none does.
    """
    found = find_adapters(digest, *places)
    if found is None:
        looked = " nor ".join(map(str, places))
        raise ConfigError(
            "translators",
            f"the adapters {digest[:12]}… that exits were recorded through are not in {looked}",
            "Name their folder with --translators",
        )
    return found


def keep_adapters(source: Path, folder: Path) -> None:
    """Copy adapters to where ``kept_in`` finds them in a folder, whole or not at all.

    Raises:
        ConfigError: they cannot be read, or the copy cannot be written.
    """
    kept, partial = folder / KEPT, folder / f".{KEPT}.partial"
    if find_adapters(str(read_description(source)["digest"]), kept) is not None:
        return
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        for name in (WEIGHTS, DESCRIPTION):
            shutil.copyfile(source / name, partial / name)
            _sync_file(partial / name)
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(partial, kept)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ConfigError(
            "translators",
            f"{source} cannot be copied to {kept} ({error.strerror or error})",
            "Name a readable folder, and write to a disk with room",
        ) from error


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
