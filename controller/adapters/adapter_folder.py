"""The folder of adapters that ``offramp tune`` writes: two files, and what one says of the other.

``translators.safetensors`` holds float32 tensors, named by exit; ``tune.json`` says which model
they were fitted to, for which exits, and what the weights' SHA-256 is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from offramp.controller.errors import ConfigError

WEIGHTS = "translators.safetensors"
DESCRIPTION = "tune.json"
FORMAT = 1
"""Version of both files; a reader refuses any other."""

AGAIN = "Run `offramp tune` for this model again"


def read_description(folder: Path) -> dict[str, Any]:
    """What a folder says of itself.

    Raises:
        ConfigError: that cannot be read.
    """
    try:
        facts = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            "translators",
            f"{folder} holds no readable {DESCRIPTION}",
            "Name a folder that a finished `offramp tune` wrote",
        ) from error
    found = facts.get("format") if isinstance(facts, dict) else None
    if found != FORMAT:
        raise ConfigError(
            "translators", f"{folder / DESCRIPTION} has format {found}, not {FORMAT}", AGAIN
        )
    assert isinstance(facts, dict)
    return facts
