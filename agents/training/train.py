"""Learn exit policies from recorded traces: the whole way, top to bottom."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp.agents.learning.phat import PhatConfig, train_phat
from offramp.agents.learning.ppo import PPOConfig, train_ppo
from offramp.agents.placing.contenders import Contender, assemble
from offramp.agents.placing.view import RecordedFeatures
from offramp.agents.recording.training_data import TrainingData, load_training_data
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.weights import pack_policy
from offramp.controller.release.bundle import PolicyBundle

INDEX = "contenders.json"
CANNED_ROWS = 64
"""Recorded inputs that travel with a policy, for workers to reproduce its decisions on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        phat: The classifier's settings.
        ppo: The agent's settings.
        targets: Offline agreements with full depth at which every family gets a point.
        threads: Torch threads; part of what makes a run reproducible.
    """

    phat: PhatConfig = field(default_factory=PhatConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    targets: tuple[float, ...] = (0.92, 0.95, 0.97, 0.985)
    threads: int = 1

    def __post_init__(self) -> None:
        if not self.targets or not all(0 < target < 1 for target in self.targets):
            raise ConfigError("targets", f"{self.targets} are not all in (0, 1)")


def train(
    config: TrainConfig,
    traces: Path,
    folder: Path,
    on_steps: Callable[[int, int], None] = lambda *_: None,
    costs: Path | None = None,
) -> list[Contender]:
    """Train the classifier and the agent, place them and the baselines, save them all.

    The same traces, config and machine give the same policies, byte for byte.

    Args:
        config: How to train.
        traces: A folder that ``record_traces`` wrote.
        folder: Where each contender's bundle is written, with an index.
        on_steps: Told (PPO steps done, steps in all).
        costs: A cost table to charge in place of the recording's own.

    Raises:
        TraceError: the traces are missing or damaged.
        ConfigError: the costs are, or they are of another model.
    """
    torch.set_num_threads(config.threads)
    data = load_training_data(traces, costs)
    phat = train_phat(data.train, config.phat)
    agent = train_ppo(data.train, data.costs, config.ppo, on_steps)
    contenders = assemble(data, phat, agent, config.targets, config.ppo.lambda_range)
    settings = {"phat": asdict(config.phat), "ppo": asdict(config.ppo)}
    save_contenders(folder, contenders, data, settings)
    return contenders


def save_contenders(
    folder: Path, contenders: list[Contender], data: TrainingData, settings: Mapping[str, Any]
) -> None:
    """Write one unsigned bundle per contender, with its settings, then the index of them all."""
    training = {
        "tokens": len(data.train),
        "documents": len(data.train.documents),
        **settings,
    }
    index = []
    for number, contender in enumerate(contenders):
        name = f"{number:02d}"
        bundle = PolicyBundle.draft(
            pack_policy(contender.policy, _canned(contender.policy, data)),
            model=data.facts.model,
            tokenizer=data.facts.tokenizer,
            training={**training, "family": contender.family, "setting": contender.setting},
            metrics={"offline_agreement": contender.offline_agreement},
            created_at=time.time(),
        )
        bundle.save(folder / name)
        index.append(
            {
                "folder": name,
                "family": contender.family,
                "setting": contender.setting,
                "offline_agreement": contender.offline_agreement,
            }
        )
    write_durably(folder / INDEX, json.dumps(index, indent=1).encode())


def load_contenders(folder: Path) -> list[Contender]:
    """Read back what ``train`` saved.

    Raises:
        ConfigError: the folder holds no index.
        PolicyRefusedError: a bundle is damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [_load_contender(folder, entry) for entry in index]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "policies", f"{folder} holds no readable {INDEX}", "Run `offramp train` first"
        ) from error


def _load_contender(folder: Path, entry: dict[str, Any]) -> Contender:
    return Contender(
        family=entry["family"],
        setting=entry["setting"],
        offline_agreement=entry["offline_agreement"],
        policy=PolicyBundle.load(folder / entry["folder"]).policy(),
    )


def _canned(policy: Policy, data: TrainingData) -> FloatArray:
    """Evenly spaced validation rows, of the columns that the policy reads."""
    if policy.schema is None:
        return np.empty((CANNED_ROWS, 0), np.float32)
    tokens = len(data.validation)
    rows = np.arange(0, tokens, max(1, tokens * len(policy.exits) // CANNED_ROWS))
    view = RecordedFeatures(policy, data.validation)
    seen = [view.features(here, rows) for here in range(len(policy.exits))]
    # Columns that were not recorded are NaN there; as canned inputs any number serves.
    return np.nan_to_num(np.concatenate(seen)[:CANNED_ROWS])
