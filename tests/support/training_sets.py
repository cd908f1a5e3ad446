"""Synthetic training data in which the features tell, imperfectly, whether an exit is right."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from offramp.agents.learning.actor import JumpActor
from offramp.agents.learning.jump_ppo import JumpAgent, JumpConfig, new_agent, problem_of
from offramp.agents.learning.phat import PhatConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.learning.stopping_problem import StateObservations, StoppingProblem
from offramp.agents.learning.warm import log_chances
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.staged import StagedRun
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.costs.table import CostTable
from offramp.controller.features import CANDIDATES_V1, FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.controller.traces import TraceHeader
from offramp.envs import TokenTraces
from offramp.worker.spec import ModelFacts

EXITS = (2, 4, 6)
LAYERS = 8


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A real one of two cores, for the tests of one file."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


def make_traces(tokens: int, seed: int) -> TokenTraces:
    rng = np.random.default_rng(seed)
    shape = (tokens, len(EXITS))
    ease = rng.normal(size=(tokens, 1)) + np.asarray([-0.5, 0.3, 1.0])
    agree = (ease + 0.5 * rng.normal(size=shape) > 0).astype(np.float32)
    features = rng.normal(size=(*shape, CANDIDATES_V1.width)).astype(np.float32)
    features[:, :, 0] = ease
    features[:, :, 1] = 1 / (1 + np.exp(-2 * ease))
    # Rows of one document are contiguous and in order, as a recording leaves them.
    documents = 8
    document_N = (np.arange(tokens) * documents // tokens).astype(np.int32)
    softmax_NES = np.stack([features[:, :, 0], features[:, :, 1], 1 - features[:, :, 1]], axis=-1)
    return TokenTraces(
        header=TraceHeader(model="ab", schema=CANDIDATES_V1.digest, exits=EXITS, layers=LAYERS),
        features_NEF=features,
        softmax_NES=softmax_NES,
        exit_token_NE=np.where(agree > 0, 0, 1).astype(np.int32),
        agree_NE=agree,
        gap_NE=np.where(agree > 0, 0, -rng.exponential(2, size=shape)).astype(np.float32),
        right_NE=agree,
        full_right_N=np.ones(tokens, np.float32),
        position_N=np.arange(tokens, dtype=np.int32) - np.searchsorted(document_N, document_N),
        document_N=document_N,
        documents=tuple(f"{n:064x}" for n in range(documents)),
    )


@pytest.fixture(scope="session")
def data() -> TrainingData:
    return TrainingData(
        train=make_traces(4000, seed=0),
        validation=make_traces(1500, seed=1),
        costs=CostTable(
            layer_s=1.0,
            head_s=0.5,
            probe_s=0.1,
            policy_s=0.02,
            fill_s=0.02,
            step_s=0.1,
            layers=LAYERS,
            machine="invented",
        ),
        candidates_VK=np.tile(np.arange(4, dtype=np.int32), (20, 1)),
        facts=ModelFacts(model="ab", tokenizer="cd", layers=LAYERS, vocab=20, context=64, width=4),
    )


def with_depth(traces: TokenTraces) -> TokenTraces:
    """The invented features, with the columns that jumping agents rest on as a probe has them."""
    features_NEF = traces.features_NEF.copy()
    depth = CANDIDATES_V1.index("depth")
    features_NEF[:, :, depth] = np.asarray(traces.header.exits) / traces.header.layers
    features_NEF[:, :, CANDIDATES_V1.index("run_length")] = 0
    return replace(traces, features_NEF=features_NEF)


@pytest.fixture(scope="session")
def deep_data(data: TrainingData) -> TrainingData:
    """The same data with real depths."""
    return replace(data, train=with_depth(data.train), validation=with_depth(data.validation))


JUMP_CONFIG = JumpConfig(ppo=PPOConfig(envs=8, rollout=8, batch=64, lambda_range=(0.05, 2.0)))
"""Of an agent for the reference model's exits 3, 6 and 9, untrained."""


@pytest.fixture(scope="session")
def agent(data: TrainingData) -> JumpAgent:
    torch.set_num_threads(1)
    header = replace(data.train.header, exits=(3, 6, 9), layers=12)
    traces = with_depth(replace(data.train, header=header))
    return new_agent(traces, replace(data.costs, layers=12), JUMP_CONFIG)


@pytest.fixture(scope="session")
def problem(agent: JumpAgent, data: TrainingData) -> StoppingProblem:
    return problem_of(agent, replace(data.costs, layers=12), JUMP_CONFIG)


def trained_jumps(data: TrainingData, config: JumpConfig, out: Path) -> JumpAgent:
    """A jumping agent that went through its stages; checkpoints lie in ``out``."""
    settings = TrainConfig(
        traces="unread", tensorboard=False, phat=PhatConfig(epochs=1), jump=config
    )
    return StagedRun(settings, data, out).train()


@torch.no_grad()
def exact_return(
    actor: JumpActor,
    problem: StoppingProblem,
    traces: TokenTraces,
    quality: str,
    preference: float,
    rows_N: IndexArray | None = None,
) -> FloatArray:
    """Expected return of each token under the actor's random choices, [N].

    Args:
        actor, problem, traces, quality: See ``WarmStart``.
        preference: λ, the quality that a full-depth token's time is worth.
        rows_N: Tokens; None takes all.
    """
    rows_N = np.arange(len(traces)) if rows_N is None else rows_N
    observations = StateObservations(traces, problem.states)
    quality_NE1 = torch.from_numpy(traces.quality(quality))
    returns = []
    for part_N in np.array_split(rows_N, -(-len(rows_N) // 2048)):
        log_lambda_N = np.full(len(part_N), math.log(preference), np.float32)
        obs = torch.from_numpy(observations.of(part_N, log_lambda_N))
        lambda_N = torch.full((len(part_N),), preference)
        log_pi = log_chances(actor, obs)
        returns.append(problem.values(log_pi, quality_NE1[part_N], lambda_N)[:, 0])
    return np.asarray(torch.cat(returns).numpy())
