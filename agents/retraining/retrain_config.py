"""When policies are trained again, on what, and what they must keep to."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from offramp.agents.calibration.calibrate import Promise
from offramp.agents.calibration.pvalues import least_units
from offramp.agents.recording.drift import LEAST_DOCUMENTS
from offramp.controller.errors import ConfigError

CALIBRATION_SHARE, VALIDATION_SHARE = 0.4, 0.15
"""Shares of the requests that the certificate is made on, and that settings are chosen on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainConfig:
    """Settings of continuous learning.

    Attributes:
        traces: Folder that ``offramp record`` wrote: what the served policy was trained on.
        traffic: Folder that holds a folder of live traffic per worker.
        out: Folder of the rounds and of what was decided.
        false_alarms: Chance, at each test, of calling traffic changed that did not.
        window: Requests of each test for drift; each request is tested once.
        tokens: Tokens of live traffic that are reason enough by themselves; 0: none are.
        requests: Requests that a round learns from, at least.
        promise: What the certificate is to bound.
        percent: Share of the requests that the canary begins with.
        steps: Steps of PPO.
        threads: Torch threads.
        dtype: Number format of the weights that workers serve with.

    Raises:
        ConfigError: a number outside its range, or too few requests for the promise.
    """

    traces: Path
    traffic: Path
    out: Path
    false_alarms: float = 0.01
    window: int = 40
    tokens: int = 0
    requests: int = 200
    promise: Promise = field(default_factory=Promise)
    percent: float = 5.0
    steps: int = 300_000
    threads: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not 0.002 <= self.false_alarms <= 0.5:
            problem = f"{self.false_alarms} is not in [0.002, 0.5]"
            raise ConfigError("false_alarms", problem, "Give a chance such as 0.01")
        if self.window < LEAST_DOCUMENTS:
            raise ConfigError("window", f"{self.window} is below {LEAST_DOCUMENTS} requests")
        least = least_units(self.promise.delta, self.promise.epsilon)
        if self.requests * CALIBRATION_SHARE < least:
            raise ConfigError(
                "requests",
                f"{CALIBRATION_SHARE:.0%} of {self.requests} can certify no bound of "
                f"{self.promise.delta:g}, it takes {least}",
                f"Give {round(least / CALIBRATION_SHARE) + 1} or more, or relax the bound",
            )
