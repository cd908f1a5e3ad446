"""Everybody who takes part: every rule, and what is trained from each seed.

A field is trained and saved once per seed, in the folder layout of ``offramp train``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from offramp.agents.learning.export import ppo_weights
from offramp.agents.learning.jump_ppo import JumpConfig, train_jumps
from offramp.agents.learning.phat import train_phat
from offramp.agents.learning.ppo import train_ppo
from offramp.agents.placing.placing import GRID, Contender, placed
from offramp.agents.recording.training_data import TrainingData, load_training_data
from offramp.agents.training.train import TrainConfig, save_contenders
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import Policy
from offramp.research.fitting.greencode import GreenCodeConfig
from offramp.research.rulebook import rulebook

SEEDED = ("p̂", "p̂ on best exits", "SpecEE predictor", "GREEN-CODE", "PPO", "PPO with jumps")
"""Families whose training draws random numbers: one run per seed, and a mean over them."""


def train_field(
    config: TrainConfig,
    traces: Path,
    folder: Path,
    on_steps: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Contender]:
    """Fit and train everything once, place it at the offline agreements asked for, and save it.

    Args:
        config: How to train; the seed is that of ``config.ppo``.
        traces: A folder that ``record_traces`` wrote. GREEN-CODE takes part if they hold hidden
            states.
        folder: Where each contender's bundle is written, with an index.
        on_steps: Told (whose steps, steps done, steps in all).

    Raises:
        TraceError: the traces are missing or damaged.
    """
    torch.set_num_threads(config.threads)
    data = load_training_data(traces)
    phat = train_phat(data.train, config.phat)
    seed = config.ppo.seed
    greencode = None if data.train.state_NED is None else GreenCodeConfig(seed=seed)
    contenders = rulebook(data, config.targets, seed=seed, phat=phat, greencode=greencode)
    contenders += _agents(data, config, on_steps)
    save_contenders(folder, contenders, data, asdict(config))
    return contenders


def _agents(
    data: TrainingData, config: TrainConfig, on_steps: Callable[[str, int, int], None]
) -> list[Contender]:
    """PPO at the gate, and PPO with jumps, each along its preferences."""
    ppo, table = config.ppo, data.candidates_VK
    low, high = ppo.lambda_range
    preferences: Sequence[float] = np.geomspace(low, high, GRID).tolist()
    exits = data.train.header.exits
    gate = train_ppo(data.train, data.costs, ppo, lambda *n: on_steps("PPO", *n))
    jumping = JumpConfig()
    jumping = replace(jumping, ppo=replace(jumping.ppo, steps=ppo.steps, seed=ppo.seed))
    jumps = train_jumps(data.train, data.costs, jumping, lambda *n: on_steps("PPO with jumps", *n))

    def stays_or_leaves(preference: float) -> Policy:
        weights = ppo_weights(gate.model, gate.normaliser, preference)
        return MlpPolicy(exits, CANDIDATES_V1, weights, 0.0, table)

    def jumping_at(preference: float) -> Policy:
        return jumps.router(preference, table)

    return [
        *placed("PPO", stays_or_leaves, preferences, config.targets, data),
        *placed("PPO with jumps", jumping_at, preferences, config.targets, data),
    ]
