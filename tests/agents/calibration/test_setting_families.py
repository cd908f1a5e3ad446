from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offramp.agents.calibration.setting_families import SettingFamily, family_of, load_points
from offramp.agents.learning.export import ppo_weights
from offramp.agents.learning.ppo import PPOConfig, train_ppo
from offramp.agents.recording.training_data import TrainingData
from offramp.controller.errors import ConfigError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, SOFTMAX_V2
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy, ThresholdPolicy
from offramp.controller.policies.router import MlpRouter
from offramp.controller.release.bundle import PolicyBundle

EXITS = (2, 4, 6)
Save = Callable[[Sequence[tuple[str, Any, Any, Policy]]], Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes (family, setting, offline agreement, policy) as ``offramp train`` does."""

    def save(entries: Sequence[tuple[str, Any, Any, Policy]]) -> Path:
        index = []
        for number, (family, setting, offline, policy) in enumerate(entries):
            width = 0 if policy.schema is None else policy.schema.width
            canned = np.random.default_rng(0).random((8, width), np.float32)
            bundle = PolicyBundle.draft(
                pack_policy(policy, canned),
                model="aa",
                tokenizer="bb",
                training={"family": family},
                metrics={},
                created_at=1.0,
            )
            bundle.save(tmp_path / f"{number:02d}")
            named = {"family": family, "setting": setting, "offline_agreement": offline}
            index.append({"folder": f"{number:02d}", **named})
        (tmp_path / "contenders.json").write_text(json.dumps(index))
        return tmp_path

    return save


def net(seed: int = 0, shift: float = 0.0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = pairwise([CANDIDATES_V1.width, 6, 1])
    weights = [
        (rng.normal(size=pair).astype(np.float32), rng.normal(size=pair[1]).astype(np.float32))
        for pair in sizes
    ]
    weights[0] = (weights[0][0], weights[0][1] + np.float32(shift))
    return weights


def mlp(threshold: float, shift: float = 0.0, seed: int = 0) -> MlpPolicy:
    return MlpPolicy(EXITS, CANDIDATES_V1, net(seed, shift), threshold)


def margin(threshold: float) -> ThresholdPolicy:
    return ThresholdPolicy(EXITS, SOFTMAX_V2, "margin", threshold)


def falling(family: SettingFamily) -> bool:
    return all(a > b for a, b in pairwise(family.settings))


def test_a_threshold_walks_from_nearly_sure_to_the_most_eager_point(save: Save) -> None:
    points = load_points(
        save(
            [
                ("full depth", None, None, NeverExit()),
                ("CALM", 0.5, 0.9, margin(0.5)),
                ("CALM", 0.2, 0.8, margin(0.2)),
            ]
        )
    )
    family = family_of(points, "CALM", 9)
    assert family.parameter == "threshold of margin"
    assert falling(family)
    assert len(family.settings) == 9
    assert family.settings[0] == pytest.approx(0.999)
    assert family.settings[-1] == pytest.approx(0.2)
    assert family.build(0.7) == margin(0.7)
    assert family_of(points, "CALM", 9, last=0.5).settings[-1] == pytest.approx(0.5)


def test_a_classifier_walks_along_its_logit(save: Save) -> None:
    points = load_points(save([("p̂", 0.9, 0.97, mlp(2.2)), ("p̂", 0.7, 0.9, mlp(0.85))]))
    family = family_of(points, "p̂", 5)
    assert family.parameter == "threshold, logits"
    assert falling(family)
    assert family.settings[0] == pytest.approx(math.log(999))
    assert family.settings[-1] == pytest.approx(0.85)
    built = family.build(1.5)
    assert isinstance(built, MlpPolicy)
    assert built.threshold == 1.5
    rows = np.random.default_rng(1).random((5, CANDIDATES_V1.width), np.float32)
    assert np.array_equal(built.logits(rows), mlp(0.0).logits(rows))


def test_two_saved_preferences_give_every_other_one(data: TrainingData, save: Save) -> None:
    torch.set_num_threads(1)
    config = PPOConfig(steps=512, envs=8, batch=64, lambda_range=(0.05, 2.0))
    agent = train_ppo(data.train, data.costs, config)

    def actor(preference: float) -> MlpPolicy:
        weights = ppo_weights(agent.model, agent.normaliser, preference)
        return MlpPolicy(EXITS, CANDIDATES_V1, weights, 0.0)

    points = load_points(save([("PPO", 1.0, 0.8, actor(1.0)), ("PPO", 0.2, 0.9, actor(0.2))]))
    family = family_of(points, "PPO", 6)
    assert family.parameter == "preference λ"
    assert family.settings[0] == pytest.approx(0.02)
    assert family.settings[-1] == pytest.approx(1.0)
    rows = np.random.default_rng(1).random((32, CANDIDATES_V1.width), np.float32)
    for preference in (0.02, 0.2, 0.37, 1.0):
        blended = family.build(preference)
        assert isinstance(blended, MlpPolicy)
        expected = actor(preference).logits(rows)
        assert np.allclose(blended.logits(rows), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(actor(0.02).logits(rows), actor(1.0).logits(rows), atol=1e-2)


def router(preference: float, start: int | None = None) -> MlpRouter:
    """A net whose first bias is linear in log λ, as export makes it."""
    rng = np.random.default_rng(3)
    sizes = [(CANDIDATES_V1.width + OUTLOOK_V1.width, 6), (6, 3)]
    routing = [
        (rng.normal(size=size).astype(np.float32), rng.normal(size=size[1]).astype(np.float32))
        for size in sizes
    ]
    starting = [
        (rng.normal(size=size).astype(np.float32), rng.normal(size=size[1]).astype(np.float32))
        for size in ((OUTLOOK_V1.width, 6), (6, 4))
    ]
    slope = rng.normal(size=6).astype(np.float32) * np.float32(math.log(preference))
    for weights in (routing, starting):
        weights[0] = (weights[0][0], weights[0][1] + slope)
    first = starting if start is None else start
    return MlpRouter(EXITS, CANDIDATES_V1, routing, first=first)


@pytest.mark.parametrize("start", [None, 1])
def test_a_router_is_blended_where_it_starts_and_where_it_goes(
    start: int | None, save: Save
) -> None:
    ends = [("jumps", λ, 1 - λ, router(λ, start)) for λ in (0.2, 0.8)]
    family = family_of(load_points(save(ends)), "jumps", 5)
    rng = np.random.default_rng(1)
    features = rng.normal(size=(64, CANDIDATES_V1.width)).astype(np.float32)
    outlook = rng.random((64, OUTLOOK_V1.width), np.float32)
    for preference in (0.1, 0.4, 0.8):
        mine, theirs = family.build(preference), router(preference, start)
        assert isinstance(mine, MlpRouter)
        assert np.array_equal(mine.start(outlook), theirs.start(outlook))
        for here in range(len(EXITS)):
            found = mine.logits(here, features, outlook)
            assert np.allclose(found, theirs.logits(here, features, outlook), atol=1e-4)


def test_routers_that_start_elsewhere_go_from_point_to_point(save: Save) -> None:
    ends = [("jumps", 0.2, 0.9, router(0.2, 0)), ("jumps", 0.8, 0.8, router(0.8, 1))]
    assert family_of(load_points(save(ends)), "jumps", 5).settings == (0.2, 0.8)


def test_any_other_kind_goes_from_point_to_point(save: Save) -> None:
    fixed = [("fixed exit", float(e), e / 10, FixedExit(e)) for e in EXITS]
    strangers = [("nets", 1.0, 0.9, mlp(0.5, seed=1)), ("nets", 2.0, 0.8, mlp(0.4, seed=2))]
    points = load_points(save([*fixed, *strangers]))
    family = family_of(points, "fixed exit", 4)
    assert family.settings == (6.0, 4.0, 2.0)
    assert family.build(4.0) == FixedExit(4)
    assert family_of(points, "fixed exit", 4, last=4.0).settings == (6.0, 4.0)
    assert family_of(points, "nets", 4).settings == (1.0, 2.0)


def test_what_cannot_be_walked_is_named(save: Save) -> None:
    points = load_points(save([("p̂", 0.9, 0.97, mlp(2.2)), ("p̂", 0.7, 0.9, mlp(0.85))]))
    with pytest.raises(ConfigError, match=r"family: 'PPO' was not trained. Trained: p̂"):
        family_of(points, "PPO", 4)
    with pytest.raises(ConfigError, match=r"setting: 0\.8 was not saved. Saved: 0\.9, 0\.7"):
        family_of(points, "p̂", 4, last=0.8)
    with pytest.raises(ConfigError, match="steps: 1 is below 2"):
        family_of(points, "p̂", 1)


class Bandit(ThresholdPolicy):
    def learn(self, verdicts: Any) -> None:
        raise AssertionError("nobody asked")


def test_a_policy_that_goes_on_learning_has_no_certificate(save: Save) -> None:
    [point] = load_points(save([("bandit", 0.5, 0.9, margin(0.5))]))
    learner = Bandit(EXITS, SOFTMAX_V2, "margin", 0.5)
    learning = type(point)(
        family="bandit", setting=0.5, offline=0.9, policy=learner, bundle=point.bundle
    )
    with pytest.raises(ConfigError, match="goes on learning while it serves"):
        family_of([learning], "bandit", 4)
