"""What policies for prompts are worth on held-out prompts: a row per policy, with intervals.

Shape suffix: N prompts, one of each document.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offramp.agents.evaluation.statistics import Estimate, bootstrap_ratio
from offramp.agents.prompting.prompt_meter import Completions, Floats, Readings


@dataclass(frozen=True, slots=True)
class Worth:
    """How readings are judged: the reward of ``offramp/PrefillExit-v0``.

    Attributes:
        full: The same prompts, read in full.
        weight: λ, what all of a prompt's time is worth, in nats per token.
        fill: Price of a skipped layer's keys and values, in layers.
    """

    full: Readings
    weight: float
    fill: float

    def saved_N(self, found: Readings) -> Floats:
        """Share of the layers' work that is saved, less what filling costs."""
        return (1 - self.fill) * (1 - found.calls_N)

    def rewards_N(self, found: Readings) -> Floats:
        """(loss in full − loss + λ · saved) / (1 + λ)."""
        gained_N = self.full.losses_N - found.losses_N
        return (gained_N + self.weight * self.saved_N(found)) / (1 + self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """One policy on the test prompts; intervals are 95 %, paired, over documents.

    Attributes:
        name: Policy that prompts were read with.
        saved: Share of the layers' work that is saved, less what filling costs.
        loss_more: By how much the loss of what follows grows, nats per token.
        reward: Mean of the environment's reward.
        learned_ahead: By how much the learned policy's reward is more.
        similarity_lost: Share of full depth's edit similarity that completed lines lose; None where
            no lines were completed.
        same_line: Share of the lines that are full depth's, likewise.
        time: Time to the first token over full depth's, of the processor; None where it was not
            timed.
        wall: The same by the wall clock.
    """

    name: str
    saved: float
    loss_more: Estimate
    reward: float
    learned_ahead: Estimate
    similarity_lost: Estimate | None = None
    same_line: float | None = None
    time: Estimate | None = None
    wall: Estimate | None = None


def row_of(name: str, found: Readings, learned: Readings, worth: Worth) -> PromptRow:
    """A policy's row without lines and times."""
    ahead_N = worth.rewards_N(learned) - worth.rewards_N(found)
    return PromptRow(
        name=name,
        saved=float(worth.saved_N(found).mean()),
        loss_more=mean_of(found.losses_N - worth.full.losses_N),
        reward=float(worth.rewards_N(found).mean()),
        learned_ahead=mean_of(ahead_N),
    )


def mean_of(values_N: Floats) -> Estimate:
    """A mean over documents, with its interval."""
    return bootstrap_ratio(values_N, np.ones(len(values_N)))


def lost_share(found: Completions, full: Completions) -> Estimate | None:
    """Share of full depth's edit similarity that is lost; None where there is none to lose."""
    if not full.similarities_N.any():
        return None
    return bootstrap_ratio(full.similarities_N - found.similarities_N, full.similarities_N)


def same_share(found: Completions, full: Completions) -> float:
    """Share of the lines that are full depth's."""
    return float(np.mean([a == b for a, b in zip(found.texts, full.texts, strict=True)]))
