"""Tokens taken offline, against the environment and a loop of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.agents.learning.jump_ppo import JumpConfig
from offramp.agents.learning.phat import PhatConfig, fit_state_phat, logit
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.learning.stopping_problem import START, State
from offramp.agents.learning.warm import WarmConfig
from offramp.agents.placing.state_replay import StateTable, SubsetGrid, subsets
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.families import BEST_EXITS, JUMPS, place_all
from offramp.agents.training.train_config import TrainConfig
from offramp.agents.training.trained_parts import TrainedParts
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.router import MlpRouter
from offramp.envs.cores.token_core import TokenExitCore
from support.training_sets import trained_jumps


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random_router(seed: int) -> MlpRouter:
    rng = np.random.default_rng(seed)
    inputs = CANDIDATES_V1.width + OUTLOOK_V1.width
    weights = [
        (rng.normal(size=(inputs, 8)).astype(np.float32), np.zeros(8, np.float32)),
        (rng.normal(size=(8, 4)).astype(np.float32), np.zeros(4, np.float32)),
    ]
    weights[0][0][CANDIDATES_V1.index("run_length")] = 0  # as of every jumping agent
    return MlpRouter((2, 4, 6), CANDIDATES_V1, weights, first=seed % 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_chased_router_goes_where_the_environment_takes_it(
    deep_data: TrainingData, seed: int
) -> None:
    """The environment is stepped with the router's own decisions."""
    router = random_router(seed)
    table = StateTable(deep_data.validation, deep_data.costs)
    taken = table.replay_router(router)
    rows = np.arange(len(deep_data.validation))
    core = TokenExitCore(
        deep_data.validation,
        deep_data.costs,
        num_envs=len(rows),
        actions="jump",
        quality="agreement",
        asks_first=True,
        autoreset=False,
    )
    core.reset(0, tokens=rows, lambdas=0.3)
    nothing = np.zeros((1, OUTLOOK_V1.width), np.float32)
    batch = core.step(np.full(len(rows), 1 + seed % 2))
    here = np.full(len(rows), seed % 2)
    ended: dict[int, tuple[int, int, float]] = {}
    for _ in range(4):
        actions = np.ones(len(rows), np.int64)
        for row in rows[[row not in ended for row in rows]]:
            features = np.ascontiguousarray(batch.obs_BD[row : row + 1, :-1])
            target = int(router.route(here[row], features, nothing)[0])
            actions[row] = target - here[row]
            here[row] = target
        batch = core.step(actions)
        info = batch.finals.info
        for place, layer, probes, cost in zip(
            batch.finals.place_K, info["exit_layer"], info["probes"], info["cost"], strict=True
        ):
            ended.setdefault(int(place), (int(layer), int(probes), float(cost)))
    layers = np.asarray([2, 4, 6, 8])[taken.taken_N]
    ends = [ended[int(row)] for row in rows]
    assert [end[0] for end in ends] == layers.tolist()
    assert [end[1] for end in ends] == taken.probes_N.tolist()
    cost_N = np.array([end[2] for end in ends]) - table.problem.begin
    np.testing.assert_allclose(cost_N, taken.cost_N(table.problem.costs), atol=1e-6)
    assert len(set(layers.tolist())) > 2


def test_p̂_on_a_subset_leaves_at_the_first_exit_that_is_sure(deep_data: TrainingData) -> None:
    phat = fit_state_phat(deep_data.train, PhatConfig(epochs=24))
    table = StateTable(deep_data.validation, deep_data.costs)
    taken = table.replay_subset(table.logits(phat), (0, 2), logit(0.8))
    policy = MlpPolicy((2, 6), CANDIDATES_V1, phat, logit(0.8))
    for row in range(150):
        expected = (3, 2)
        for asked, (before, here) in enumerate(((START, 0), (0, 2)), start=1):
            rows = np.asarray([row])
            if policy.leave(table._observations.at(State(before, here), rows))[0]:
                expected = (here, asked)
                break
        assert (taken.taken_N[row], taken.probes_N[row]) == expected
    assert len(set(taken.taken_N.tolist())) == 3


def test_the_grid_finds_the_cheapest_and_the_best(deep_data: TrainingData) -> None:
    phat = fit_state_phat(deep_data.train, PhatConfig(epochs=24))
    table = StateTable(deep_data.validation, deep_data.costs)
    thresholds = [logit(each) for each in (0.5, 0.8, 0.95)]
    grid = SubsetGrid.of(table, phat, thresholds)
    assert len(grid.subsets) == len(list(subsets(3))) == 7
    subset, threshold = grid.cheapest(0.9)
    q, z = grid.subsets.index(subset), thresholds.index(threshold)
    assert grid.agreement_QZ[q, z] >= 0.9
    cheaper = grid.cost_QZ < grid.cost_QZ[q, z]
    assert (grid.agreement_QZ[cheaper] < 0.9).all()
    subset, threshold = grid.best(0.3)
    q, z = grid.subsets.index(subset), thresholds.index(threshold)
    worth = grid.agreement_QZ - 0.3 * grid.cost_QZ
    assert worth[q, z] == worth.max()


def test_contenders_are_placed_near_their_targets(deep_data: TrainingData, tmp_path: Path) -> None:
    config = JumpConfig(
        warm=WarmConfig(steps=250), ppo=PPOConfig(steps=0, envs=2, lambda_range=(0.05, 2.0))
    )
    settings = TrainConfig(traces="unread", targets=(0.85, 0.95))
    parts = TrainedParts(settings, deep_data, Path("unused"))
    parts.jumps = trained_jumps(deep_data, config, tmp_path)
    parts.state_phat = fit_state_phat(deep_data.train, PhatConfig(epochs=24))
    found = place_all([JUMPS, BEST_EXITS], parts)[1:]
    assert [each.family for each in found] == [JUMPS, JUMPS, BEST_EXITS, BEST_EXITS]
    for contender, target in zip(found, (0.85, 0.95) * 2, strict=True):
        assert contender.offline_agreement == pytest.approx(target, abs=0.04)
