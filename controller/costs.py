"""Measured costs of one token's parts, shared by workers (who measure) and envs (who charge)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """Seconds per part of one decode step at batch 1, each the median of repeated timings.

    Attributes:
        layer_s: One decoder layer.
        head_s: Final norm, LM head and argmax: paid once per token.
        probe_s: One candidate probe.
        policy_s: One decision of a learned policy.
        fill_s: Filling the KV of one skipped layer.
        step_s: What every token pays besides (embedding, rotary, bookkeeping).
        layers: Number of layers L of the model measured.
        machine: What it was measured on: processor, dtype, threads.
    """

    layer_s: float
    head_s: float
    probe_s: float
    policy_s: float
    fill_s: float
    step_s: float
    layers: int
    machine: str

    def __post_init__(self) -> None:
        for name in ("layer_s", "head_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, "must be a positive number of seconds")

    @property
    def full_s(self) -> float:
        """Seconds of one token at full depth with no probe: the KV-cached baseline."""
        return self.step_s + self.layers * self.layer_s + self.head_s

    def leaving(self, exits: tuple[int, ...]) -> FloatArray:
        """Cost of leaving at each exit, and of full depth after probing them all, [E + 1].

        In units of ``full_s`` (dimensionless). Leaving at exit i has paid i + 1 probes and
        decisions: step + e·layer + (i+1)·(probe + policy) + (L−e)·fill + head.
        """
        decision_s = self.probe_s + self.policy_s
        seconds = [
            self.step_s
            + exit_layer * self.layer_s
            + probes * decision_s
            + (self.layers - exit_layer) * self.fill_s
            + self.head_s
            for probes, exit_layer in enumerate(exits, start=1)
        ]
        seconds.append(self.full_s + len(exits) * decision_s)
        return np.asarray(seconds, np.float32) / np.float32(self.full_s)
