"""Staged runs: settings, checkpoints, resuming."""

from __future__ import annotations

import errno
import os
import resource
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.agents.learning.jump_ppo import JumpConfig
from offramp.agents.learning.phat import PhatConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.learning.warm import WarmConfig
from offramp.agents.prompting.prompt_config import PromptLessonConfig
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.resuming import CHECKPOINT
from offramp.agents.training.staged import Checkpoint, StagedRun
from offramp.agents.training.train import open_run
from offramp.agents.training.train_config import TrainConfig, load_config, options_of
from offramp.controller.errors import ConfigError

SEGMENT = 64 * 8
CONFIG = TrainConfig(
    traces="unread",
    checkpoint_every=1,
    phat=PhatConfig(epochs=1),
    jump=JumpConfig(
        jumps=2,
        warm=WarmConfig(steps=120, batch=64),
        ppo=PPOConfig(steps=3 * SEGMENT, envs=64, rollout=8, batch=256, learning_rate=5e-4),
    ),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class StoppedHalfway(Exception):
    """What stops a run, as Ctrl-C would."""


def weights_of(run: StagedRun) -> list[np.ndarray]:
    router = run.agent.router(0.3)
    return [array for pair in [*router.weights, *run.phat] for array in pair]


def finish(data: TrainingData, out: Path, config: TrainConfig = CONFIG) -> list[np.ndarray]:
    run = StagedRun(config, data, out)
    run.train()
    return weights_of(run)


def stop_at(data: TrainingData, out: Path, stage: str, step: int) -> None:
    """A run of its own that is cut off before the segment's checkpoint is written."""

    def interrupt(now: str, done: int, total: int) -> None:
        if (now, done) == (stage, step):
            raise StoppedHalfway

    with pytest.raises(StoppedHalfway):
        StagedRun(CONFIG, data, out, interrupt).train()


def resumed(data: TrainingData, out: Path) -> list[np.ndarray]:
    run = StagedRun(CONFIG, data, out)
    run.restore(Checkpoint.load(out))
    torch.manual_seed(99)  # another process has other generators
    np.random.seed(99)
    run.train()
    return weights_of(run)


@pytest.mark.parametrize(("stage", "step"), [("warm", 120), ("ppo", 2 * SEGMENT)])
def test_a_resumed_run_is_the_uninterrupted_one(
    data: TrainingData, tmp_path: Path, stage: str, step: int
) -> None:
    straight = finish(data, tmp_path / "straight")
    stop_at(data, tmp_path / "cut", stage, step)
    again = resumed(data, tmp_path / "cut")
    for left, right in zip(straight, again, strict=True):
        np.testing.assert_array_equal(left, right)
    other = finish(data, tmp_path / "other", replace(CONFIG, seed=1))
    assert any(not np.array_equal(a, b) for a, b in zip(straight, other, strict=True))


def test_scalars_and_callbacks_come_from_sb3s_own_hooks(data: TrainingData, tmp_path: Path) -> None:
    class Counting(BaseCallback):  # type: ignore[misc]  # mypy skips stable_baselines3
        steps = 0

        def _on_step(self) -> bool:
            self.steps += 1
            return True

    counting = Counting()
    StagedRun(CONFIG, data, tmp_path, callback=counting).train()
    assert counting.steps == 3 * 8
    events = list((tmp_path / "tensorboard").glob("events.*"))
    assert events
    assert sum(file.stat().st_size for file in events) > 500


def test_other_settings_do_not_go_on_from_a_checkpoint(data: TrainingData, tmp_path: Path) -> None:
    stop_at(data, tmp_path, "ppo", SEGMENT)
    other = StagedRun(replace(CONFIG, seed=5), data, tmp_path)
    with pytest.raises(ConfigError, match="seed: is 5, and 0 in the checkpoint"):
        other.restore(Checkpoint.load(tmp_path))
    (tmp_path / CHECKPOINT).write_bytes(b"half")
    with pytest.raises(ConfigError, match="resume"):
        Checkpoint.load(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint_whole(data: TrainingData, tmp_path: Path) -> None:
    stop_at(data, tmp_path, "ppo", 2 * SEGMENT)
    before = (tmp_path / CHECKPOINT).read_bytes()
    run = StagedRun(CONFIG, data, tmp_path)
    run.restore(Checkpoint.load(tmp_path))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))  # no file may grow beyond
    try:
        with pytest.raises(ConfigError, match="File too large") as caught:
            run._save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert caught.value.field == "out"
    assert str(tmp_path / CHECKPOINT) in caught.value.problem
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert resumed(data, tmp_path)


def test_a_disk_that_fills_up_in_mid_run_costs_one_segment(
    data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, full = finish(data, tmp_path / "straight"), tmp_path / "full"
    real_replace = os.replace

    def replace_until_full(source: str, target: Path) -> None:
        if Checkpoint.load(full).step == SEGMENT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_replace(source, target)

    stop_at(data, full, "ppo", SEGMENT)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until_full)
        with pytest.raises(ConfigError, match="No space left on device") as caught:
            resumed(data, full)
    assert str(full / CHECKPOINT) in str(caught.value)
    assert (Checkpoint.load(full).stage, Checkpoint.load(full).step) == ("ppo", SEGMENT)
    for left, right in zip(straight, resumed(data, full), strict=True):
        np.testing.assert_array_equal(left, right)


def test_a_folder_that_cannot_be_made_is_named_before_training(
    data: TrainingData, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    told: list[str] = []
    run = StagedRun(CONFIG, data, tmp_path / "file" / "out", lambda stage, *_: told.append(stage))
    with pytest.raises(ConfigError, match=r"out: .*file/out/checkpoint\.pt cannot be written"):
        run.train()
    assert told == []
    assert run.phat == []


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'traces = "t"\nseed = 3\ntargets = [0.9]\n[jump]\njumps = 2\n[jump.ppo]\nsteps = 10\n'
        "learning_rate = 1\nlambda_range = [0.1, 1]\n[onpolicy.learner]\nepochs = 2\n"
    )
    config = load_config(path, TrainConfig)
    assert (config.seed, config.targets, config.jump.jumps) == (3, (0.9,), 2)
    assert (config.jump.ppo.steps, config.jump.ppo.learning_rate) == (10, 1.0)
    assert config.jump.ppo.lambda_range == (0.1, 1.0)
    assert config.onpolicy.learner.epochs == 2
    assert config.jump.ppo.entropy == JumpConfig().ppo.entropy  # this stage's own default
    assert asdict(config.phat) == asdict(PhatConfig())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('traces = "t"\nsed = 1\n', "sed: is no known option. Did you mean seed"),
        ('traces = "t"\n[jump.ppo]\nlearnig_rate = 1\n', "Did you mean learning_rate"),
        ("seed = 1\n", "traces: is missing"),
        ('traces = "t"\nseed = "x"\n', "seed: 'x' is no int"),
        ('traces = "t"\ntargets = ["a"]\n', "targets: "),
        ('traces = "t"\nfamilies = [1]\n', "families: [1] is no list of names"),
        ('traces = "t"\njump = 3\n', "jump: 3 is no table"),
        ('traces = "t"\n[onpolicy]\nkv_mode = "verify"\n', "onpolicy.kv_mode"),
        ("traces = \n", "config: "),
    ],
)
def test_files_with_errors_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path, TrainConfig)
    assert complaint in str(refused.value)


@pytest.mark.parametrize("kind", [TrainConfig, DraftingConfig, PromptLessonConfig])
def test_every_option_is_documented(kind: type) -> None:
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    missing = [name for name in options_of(kind) if f"`{name}`" not in page]
    assert missing == []


def test_unknown_families_and_resuming_without_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"families: 'PPO jump' is unknown\. Use fixed exit"):
        open_run(replace(CONFIG, families=("PPO jump",)), tmp_path)
    with pytest.raises(ConfigError, match="families: 'PPO drafting' is unknown"):
        open_run(replace(CONFIG, families=("PPO drafting",)), tmp_path)
    with pytest.raises(ConfigError, match="resume: is for families that are trained in stages"):
        open_run(replace(CONFIG, families=("p̂",)), tmp_path, resume=True)
