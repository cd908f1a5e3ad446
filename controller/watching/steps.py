"""Steps of a canary and the bounds between them, as a YAML file gives them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from offramp.controller.errors import ConfigError
from offramp.controller.strict import COUNT, Check, is_number, or_null

_SHARE: Check = (lambda value: is_number(value) and 0 < value < 1, "a number in (0, 1)")
_RATIO: Check = (lambda value: is_number(value) and value > 0, "a number above 0")


SHADOW_SHARE = 0.05
"""Share of the time in which a worker may run what nobody waits for under a canary in shadow."""

SHADOW_PROMPT = 512
"""Tokens of a prompt, or of a text, that is repeated in shadow, at most."""


def _are_percents(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value or not all(map(is_number, value)):
        return False
    return value[0] >= 0 and value[-1] <= 100 and all(a < b for a, b in pairwise(value))


STEPS: dict[str, Check] = {
    "percents": (_are_percents, "a list of numbers in [0, 100], ascending"),
    "min_tokens": COUNT,
    "min_requests": COUNT,
    "min_audited": COUNT,
    "max_tokens": COUNT,
    "max_disagreement": _SHARE,
    "max_failures": _SHARE,
    "min_speed": _RATIO,
    "max_layers": or_null(_RATIO),
    "max_energy": or_null(_RATIO),
    "max_first_p99": or_null(_RATIO),
    "max_gap_p99": or_null(_RATIO),
    "confidence": _SHARE,
}
"""What each setting may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps of a canary, and what must hold before the next one is taken.

    Attributes:
        percents: Shares of the requests, ascending. The first is taken by hand; at 0, in shadow,
            requests are repeated under the canary, and nobody is served by it.
        min_tokens: Tokens of both tracks in a step before it is judged.
        min_requests: Requests of both tracks that ended in a step before it is judged.
        min_audited: Audited early tokens of the canary in a step before it is judged.
        max_tokens: Tokens of the canary in a step by which it must have passed or failed.
        max_disagreement: Share of them that full depth may disagree with: the whole interval must
            lie below it to pass, and above it to fail.
        max_failures: Failures of the policy per token; the whole interval above it fails.
        min_speed: Tokens per second of the canary's requests, in relation to the stable release's.
        max_layers: Layers executed per token, in the same relation; None: no bound.
        max_energy: Joules per token, likewise; a canary holds while no worker reads energy.
        max_first_p99: Time within which 99 % of the first tokens come, in the same relation.
        max_gap_p99: Time within which 99 % of the later tokens follow the one before, likewise.
        confidence: Probability that an interval is right at every look, in (0, 1).

    Raises:
        ConfigError: a setting is out of its range.
    """

    percents: tuple[float, ...] = (5, 25, 50, 100)
    min_tokens: int = 2000
    min_requests: int = 30
    min_audited: int = 200
    max_tokens: int = 200_000
    max_disagreement: float = 0.25
    max_failures: float = 0.01
    min_speed: float = 0.9
    max_layers: float | None = None
    max_energy: float | None = None
    max_first_p99: float | None = 1.5
    max_gap_p99: float | None = 1.5
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name, (holds, expected) in STEPS.items():
            if not holds(value := getattr(self, name)):
                raise ConfigError(name, f"{value!r} is not {expected}", "Correct the steps file")
        if self.max_tokens < self.min_tokens:
            problem = f"{self.max_tokens} is below min_tokens, {self.min_tokens}"
            raise ConfigError("max_tokens", problem, "Correct the steps file")

    @classmethod
    def load(cls, path: Path) -> Steps:
        """Read a YAML file.

        Raises:
            ConfigError: it cannot be read, or a setting is unknown or out of its range.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise ConfigError("steps", f"{path} is unreadable ({said})", "Write YAML") from error
        if not isinstance(values, dict):
            raise ConfigError("steps", f"{path} is no mapping", "Write name: value, one a line")
        known = [each.name for each in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(str(name), "is no known setting", f"Use {', '.join(known)}")
        return cls(**values)

    def after(self, percent: float) -> float | None:
        """The next step; None after the last."""
        return next((each for each in self.percents if each > percent), None)
