"""Who takes part in a comparison of families: everything that is trained from one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from offramp.agents.placing.contenders import Contender
from offramp.agents.training.train import train
from offramp.agents.training.train_config import TrainConfig
from offramp.envs.traces.store import TraceStore
from offramp.research.rulebook import GREEN_CODE, PUBLISHED


def train_lineup(
    config: TrainConfig,
    folder: Path,
    on_steps: Callable[[str, int, int], None] = lambda *_: None,
    families: Sequence[str] | None = None,
) -> list[Contender]:
    """Train, place and save families.

    Args:
        config: Settings of the run, as for ``train``; its families are replaced.
        folder: Where each contender's bundle is written, with an index.
        on_steps: Told (stage, steps done, steps in all).
        families: Those that take part; None takes every published one, GREEN-CODE if the traces
            hold hidden states.

    Raises:
        ConfigError: a family is unknown.
        TraceError: the traces are missing or damaged.
    """
    if families is None:
        has_states = TraceStore.open(config.traces).header.width > 0
        families = (*PUBLISHED, GREEN_CODE) if has_states else PUBLISHED
    return train(replace(config, families=tuple(families)), folder, on_progress=on_steps)
