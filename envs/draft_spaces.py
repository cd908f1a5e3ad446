"""What the adapters of draft-and-verify episodes share: Gymnasium spaces and the reset options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from offramp.controller.errors import ConfigError
from offramp.envs.core import FEATURE_LIMIT


def draft_action_space(exits: int) -> spaces.Discrete:
    """0 to E. New each time: a space holds its own generator."""
    return spaces.Discrete(exits + 1)


def draft_observation_space(columns: int) -> spaces.Box[np.float32]:
    """Features, outlook, trust, place: a float32 Box of shape (columns,), the same for all traces."""
    high = np.full(columns, FEATURE_LIMIT, np.float32)
    return spaces.Box(-high, high, dtype=np.float32)


def draft_start(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``DraftExitCore.reset`` from Gymnasium's ``options``.

    Raises:
        ConfigError: an option is unknown.
    """
    given = options or {}
    unknown = sorted(set(given) - {"token"})
    if unknown:
        raise ConfigError("options", f"{unknown[0]!r} is unknown", "Use token")
    return {"tokens": given["token"]} if given else {}
