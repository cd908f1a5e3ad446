"""What the adapters share: Gymnasium spaces and the reset options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from offramp.controller.errors import ConfigError
from offramp.envs.core import FEATURE_LIMIT, LAMBDA_LIMITS

_OPTIONS = {"token": "tokens", "lambda": "lambdas"}


def action_space() -> spaces.Discrete:
    """0 goes on to the next exit, 1 leaves here. New each time: a space holds its own generator."""
    return spaces.Discrete(2)


def observation_space(columns: int) -> spaces.Box[np.float32]:
    """Features, then ``log_lambda``: a float32 Box of shape (columns,).

    The bounds are the same for every trace and preference range, so that a policy trained on one
    can be loaded for another.
    """
    high = np.full(columns, FEATURE_LIMIT, np.float32)
    high[-1] = math.ceil(math.log(LAMBDA_LIMITS[1]))
    return spaces.Box(-high, high, dtype=np.float32)


def start_arguments(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of ``TokenExitCore.reset`` from Gymnasium's ``options``.

    Raises:
        ConfigError: an option is unknown.
    """
    given = options or {}
    unknown = sorted(set(given) - set(_OPTIONS))
    if unknown:
        raise ConfigError("options", f"{unknown[0]!r} is unknown", "Use token and lambda")
    return {_OPTIONS[name]: value for name, value in given.items()}
