"""Whole runs, cut off and resumed: on-policy rounds, finished runs, sweeps. Ray is real."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from offramp.agents.learning.jump_ppo import JumpConfig
from offramp.agents.learning.phat import PhatConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.learning.warm import WarmConfig
from offramp.agents.onpolicy.learner import Learner, LearnerConfig
from offramp.agents.onpolicy.onpolicy import OnPolicyConfig
from offramp.agents.onpolicy.rollout import DecodedRollout
from offramp.agents.placing.contenders import INDEX, Contender, load_contenders
from offramp.agents.training.staged import Checkpoint
from offramp.agents.training.sweep import sweep
from offramp.agents.training.train import open_run, train
from offramp.agents.training.train_config import TrainConfig
from offramp.controller.errors import ConfigError
from support.models import REFERENCE
from support.recordings import make_corpus, make_recording

pytestmark = pytest.mark.usefixtures("ray_cluster")


class CutOff(Exception):
    """What stops a run, as Ctrl-C would."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Seconds of training on traces; the rounds are each test's own."""
    folder = tmp_path_factory.mktemp("resuming")
    corpus = make_corpus(folder / "corpus")
    return TrainConfig(
        traces=str(make_recording(folder / "traces", corpus)),
        targets=(0.9, 0.95),
        checkpoint_every=1,
        phat=PhatConfig(epochs=1),
        jump=JumpConfig(
            jumps=2,
            warm=WarmConfig(steps=20, batch=64),
            ppo=PPOConfig(steps=256, envs=32, rollout=8, batch=64, lambda_range=(0.05, 2.0)),
        ),
        onpolicy=OnPolicyConfig(
            documents=6,
            together=2,
            tokens=16,
            prompt_tokens=8,
            model=str(REFERENCE),
            corpus=str(corpus),
            learner=LearnerConfig(batch=64, learning_rate=3e-3),
        ),
    )


def with_rounds(config: TrainConfig, rounds: int, *, collectors: int, max_lag: int) -> TrainConfig:
    onpolicy = replace(config.onpolicy, rounds=rounds, collectors=collectors, max_lag=max_lag)
    return replace(config, onpolicy=onpolicy)


def run(config: TrainConfig, out: Path, *, resume: bool = False) -> list[Contender]:
    torch.manual_seed(99)  # another process has other generators
    np.random.seed(99)
    return train(config, out, resume=resume)


def cut_in_round(config: TrainConfig, out: Path, number: int, patch: pytest.MonkeyPatch) -> None:
    """A run that ends when a round's rollouts are there, before they are learned from."""
    learn = Learner.learn

    def interrupted(self: Learner, rollouts: list[DecodedRollout]) -> dict[str, float]:
        if self.version == number:
            raise CutOff
        return learn(self, rollouts)

    with patch.context() as context:
        context.setattr(Learner, "learn", interrupted)
        with pytest.raises(CutOff):
            run(config, out)


def blobs(out: Path) -> list[bytes]:
    """The weights of the policies that a run left, in their order."""
    return [
        (out / f"{number:02d}" / "weights.safetensors").read_bytes()
        for number in range(len(load_contenders(out)))
    ]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time of change and content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def refused(config: TrainConfig, out: Path, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(config, out, resume=True)
    assert complaint in str(error.value)


def test_a_resumed_on_policy_run_is_the_uninterrupted_one(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By any number of collectors, as long as nobody works ahead; the number of rounds is free."""
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run(with_rounds(config, 2, collectors=2, max_lag=0), straight)
    none, two, three = (with_rounds(config, n, collectors=1, max_lag=1) for n in (0, 2, 3))
    cut_in_round(three, cut, 2, monkeypatch)
    assert Checkpoint.load(cut).step == 1
    before = snapshot(cut)
    refused(none, cut, "onpolicy.rounds: is 0, and 1 are done")
    refused(with_rounds(config, 2, collectors=1, max_lag=0), cut, "onpolicy.max_lag: is 0, and 1")
    assert snapshot(cut) == before
    rounds: list[int] = []
    train(
        two,
        cut,
        resume=True,
        on_progress=lambda stage, n, _: rounds.append(n) if stage == "on-policy" else None,
    )
    assert rounds == [2]
    assert blobs(cut) == blobs(straight)
    left, right = (Checkpoint.load(folder).learner["actor"] for folder in (straight, cut))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert open_run(two, cut, resume=True).is_finished
    assert not open_run(three, cut, resume=True).is_finished


def test_a_finished_run_is_not_trained_again(config: TrainConfig, tmp_path: Path) -> None:
    first = run(config, tmp_path)
    before = snapshot(tmp_path)
    again = run(config, tmp_path, resume=True)
    assert snapshot(tmp_path) == before
    described = [(each.family, each.setting, each.offline_agreement) for each in first]
    assert [(each.family, each.setting, each.offline_agreement) for each in again] == described
    refused(replace(config, seed=1), tmp_path, "seed: is 1, and 0 in the checkpoint")
    (tmp_path / INDEX).unlink()  # cut off while the policies were written
    run(config, tmp_path, resume=True)
    weights = {name: content for name, (_, content) in before.items() if name.endswith("tensors")}
    assert {name: snapshot(tmp_path)[name][1] for name in weights} == weights


def test_a_run_cut_off_before_its_first_weights_is_resumed(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, tmp_path / "straight")

    def interrupted(*_: object) -> None:
        raise CutOff

    with monkeypatch.context() as context:
        context.setattr("offramp.agents.training.staged.train_phat", interrupted)
        with pytest.raises(CutOff):
            run(config, tmp_path / "cut")
    run(config, tmp_path / "cut", resume=True)
    assert blobs(tmp_path / "cut") == blobs(tmp_path / "straight")


def test_a_sweep_trains_each_seed_once(config: TrainConfig, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = sweep(config, (0, 1), tmp_path, lambda done, total: told.append((done, total)))
    assert told == [(1, 2), (2, 2)]
    assert list(found) == [0, 1]
    alone = run(config, tmp_path / "alone")
    assert [each["offline_agreement"] for each in found[0]] == [
        each.offline_agreement for each in alone
    ]
    assert blobs(tmp_path / "seed-0") == blobs(tmp_path / "alone")
    assert blobs(tmp_path / "seed-1") != blobs(tmp_path / "seed-0")
    before = snapshot(tmp_path / "seed-0")
    shutil.rmtree(tmp_path / "seed-1")  # as if the sweep had been cut off before it began
    assert sweep(config, (0, 1), tmp_path) == found
    assert snapshot(tmp_path / "seed-0") == before
