"""Training data: a recorded folder read back, with its traces by split, costs and candidates.

Shape suffixes: V vocabulary, K candidates.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from offramp.controller.costs.cost_file import load_costs
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import TraceError
from offramp.controller.features import IntArray
from offramp.envs.traces.candidate_file import load_candidates
from offramp.envs.traces.store import TraceStore, write_traces
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.spec import ModelFacts

COSTS = "costs.json"
"""Measured when all is recorded: its presence says that a recording was carried to its end."""
FACTS = "model.json"
BEGUN = "recording.json"
"""The settings a recording began with: written first, and held to when it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """One recording, as training reads it.

    Attributes:
        train: Tokens to learn from.
        validation: Tokens to choose by.
        costs: Measured on the machine that recorded.
        candidates_VK: The table whose probe was recorded.
        facts: The model that was recorded.
    """

    train: TokenTraces
    validation: TokenTraces
    costs: CostTable
    candidates_VK: IntArray
    facts: ModelFacts


def load_training_data(folder: Path, costs: Path | None = None) -> TrainingData:
    """Read a folder that ``record_traces`` wrote.

    Args:
        folder: Folder of the recording.
        costs: A table that ``offramp profile`` wrote, of another machine or with more care than
            the recording took; None takes the recording's own.

    Raises:
        TraceError: a part is missing or damaged, or the recording was cut off and no costs are
            given.
        ConfigError: the costs are, or they are of another model.
    """
    if costs is None and has_begun(folder) and not is_whole(folder):
        raise TraceError(
            str(folder),
            "holds a recording that was cut off, without costs",
            "Run the same `offramp record` again, which goes on; or give --costs to take it so",
        )
    store = TraceStore.open(folder)
    facts = _load_facts(folder / FACTS)
    prices = load_costs(costs or folder / COSTS)
    prices.require_model(facts.model)
    return TrainingData(
        train=store.read("train"),
        validation=store.read("validation"),
        costs=prices,
        candidates_VK=load_candidates(folder),
        facts=facts,
    )


def has_begun(folder: Path) -> bool:
    """Whether a recording was begun in a folder."""
    return (folder / BEGUN).exists()


def is_whole(folder: Path) -> bool:
    """Whether a recording was carried to its end."""
    return (folder / COSTS).exists()


def save_facts(folder: Path, facts: ModelFacts) -> None:
    """Write what the model says of itself beside the traces."""
    write_traces(folder / FACTS, json.dumps(asdict(facts), indent=1).encode())


def _load_facts(path: Path) -> ModelFacts:
    try:
        facts = ModelFacts(**json.loads(path.read_text(encoding="utf-8")))
        return replace(facts, adapters=tuple(facts.adapters))  # JSON has lists
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TraceError(
            str(path), f"is unreadable ({error})", "Record the traces again"
        ) from error
