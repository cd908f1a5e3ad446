"""Continuous learning on invented traffic: each step, each refusal, and a kill at each step."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.agents.calibration import setting_families
from offramp.agents.calibration.calibrate import Promise
from offramp.agents.recording.training_data import COSTS, load_training_data, save_facts
from offramp.agents.retraining.learning_state import STATE, LearningState
from offramp.agents.retraining.retrain_config import RetrainConfig
from offramp.agents.retraining.retrainer import Retrainer
from offramp.controller.costs.cost_file import save_costs
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1
from offramp.controller.keys.key_files import load_or_create_key
from offramp.controller.keys.root import Role, Root
from offramp.controller.release.ledger import FolderLedger
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import InMemoryRegistry
from offramp.controller.traces import TraceChunk, TraceHeader
from offramp.envs.traces.candidate_file import save_candidates
from offramp.envs.traces.store import TraceStore
from offramp.envs.traces.traffic_folder import TrafficFolder
from offramp.worker.recording.live_recorder import LIVE
from offramp.worker.spec import ModelFacts
from support.cost_tables import measured

EXITS, LAYERS, TOKENS = (3, 6, 9), 12, 24
MODEL, TOKENIZER = "aa11", "bb22"
HEADER = TraceHeader(model=MODEL, schema=CANDIDATES_V1.digest, exits=EXITS, layers=LAYERS)
TABLE_VK = np.random.default_rng(0).integers(0, 7, size=(7, 3), dtype=np.int32)


def chunk_of(name: str, seed: int, ease: float) -> TraceChunk:
    """A document whose first feature tells, imperfectly, which exits are right."""
    rng = np.random.default_rng(seed)
    shape = (TOKENS, len(EXITS))
    ease_TE = rng.normal(ease, 1.0, size=(TOKENS, 1)) + np.asarray([-0.5, 0.3, 1.0])
    agree_TE = ease_TE + 0.1 * rng.normal(size=shape) > 0
    features_TEF = rng.normal(size=(*shape, CANDIDATES_V1.width)).astype(np.float32)
    features_TEF[:, :, 0] = ease_TE
    return TraceChunk(
        document=name,
        position_T=np.arange(TOKENS, dtype=np.int32),
        features_TEF=features_TEF,
        softmax_TES=rng.random((*shape, 3), dtype=np.float32),
        exit_token_TE=np.where(agree_TE, 0, 1).astype(np.int32),
        full_token_T=np.zeros(TOKENS, np.int32),
        next_token_T=np.zeros(TOKENS, np.int32),
        gap_TE=np.where(agree_TE, 0, -1).astype(np.float32),
    )


def write_traces_of(folder: Path, documents: int) -> Path:
    """Traces as `offramp record` leaves them."""
    store = TraceStore.create(folder, HEADER)
    for number in range(documents):
        split = "validation" if number % 5 == 0 else "train"
        store.append(chunk_of(f"base-{number}", number, 0.5), split)
    save_candidates(folder, TABLE_VK)
    facts = ModelFacts(
        model=MODEL, tokenizer=TOKENIZER, layers=LAYERS, vocab=7, context=64, width=16
    )
    save_facts(folder, facts)
    save_costs(folder / COSTS, measured(model=MODEL))
    return folder


class LearningChannel:
    """A publisher on a registry in memory, training traces, and workers that keep traffic."""

    def __init__(self, folder: Path) -> None:
        self.registry = InMemoryRegistry()
        key = load_or_create_key(folder / "key.pem")
        self.publisher = Publisher(self.registry, FolderLedger(folder / "ledger"), key, "demo")
        self.config = RetrainConfig(
            traces=write_traces_of(folder / "traces", 40),
            traffic=folder / "traffic",
            out=folder / "learning",
            window=20,
            requests=120,
            promise=Promise(delta=0.1, epsilon=0.05),
            steps=1,
        )
        self._told = 0

    def serve(self, requests: int, ease: float, header: TraceHeader = HEADER) -> None:
        """Let two workers keep so many requests of traffic that is so easy."""
        live = replace(header, text=LIVE)
        for start in range(0, requests, 50):  # fewer than may wait for the disk
            folder = TrafficFolder(self.config.traffic / f"worker-{start // 50 % 2}", 64)
            for _ in range(min(50, requests - start)):
                self._told += 1
                chunk = chunk_of(f"live-{self._told}", 1000 + self._told, ease)
                folder.keep(live, TABLE_VK, chunk)
            folder.close()
            assert folder.lost == 0

    def retrainer(self, **changes: Any) -> Retrainer:
        """As a process that has just begun."""
        self.config = replace(self.config, **changes)
        return Retrainer(self.config, self.publisher, self.registry)

    @property
    def state(self) -> LearningState:
        return LearningState.load(self.config.out, self.config.traces)


@pytest.fixture
def channel(tmp_path: Path) -> LearningChannel:
    return LearningChannel(tmp_path)


def test_traffic_as_it_was_is_tested_once_and_begins_nothing(channel: LearningChannel) -> None:
    retrainer = channel.retrainer()
    assert "waiting for 20 requests" in retrainer.look()
    assert retrainer.look() == ""  # said already
    channel.serve(20, ease=0.5)
    assert retrainer.look().startswith("no drift: p = ")
    assert "waiting for 20 requests" in retrainer.look()
    assert len(channel.state.tested) == 20
    assert channel.publisher.promoted == 0


def test_drift_leads_to_a_certified_canary_and_waits_there(channel: LearningChannel) -> None:
    channel.serve(30, ease=-0.5)
    first = channel.retrainer()
    assert "drifted from the training traces: p = 0.001" in first.look()
    assert first.look() == "waiting for 120 requests to learn from"
    channel.serve(100, ease=-0.5)
    stories = [channel.retrainer().look() for _ in range(4)]  # a process each
    assert "130 requests, 3,120 tokens of live traffic, are learned from" in stories[0]
    assert "policies were trained on" in stories[1]
    assert "is certified: disagreement ≤ 0.1" in stories[2]
    assert re.search(r"; it saves \d+\.\d% of full depth's cost \[[1-9]", stories[2])
    assert "serves 5% of the requests, as a canary" in stories[3]
    data = load_training_data(channel.config.out / "round-0001" / "traces")
    live = [each for each in data.train.documents if each.startswith("live")]
    assert 40 < len(live) < 75
    assert len(data.train.documents) == len(live) + 32  # all that the base has
    assert all(each.startswith("live") for each in data.validation.documents)
    # It stops there: nobody promotes what nobody looked at.
    waiting = channel.retrainer()
    assert "promoted by an operator" in waiting.look()
    assert waiting.look() == ""
    assert channel.publisher.rollout.percent == 5
    channel.publisher.roll_out(100)
    assert "serves everybody: the round is over" in waiting.look()
    assert channel.state.base.endswith("round-0001/traces")
    # What was learned is the traffic that the next is compared with.
    assert "waiting for 20 requests" in channel.retrainer().look()
    channel.serve(30, ease=-0.5)
    assert channel.retrainer().look().startswith("no drift")


def test_a_canary_that_was_rolled_back_ends_the_round(channel: LearningChannel) -> None:
    channel.serve(130, ease=-0.5)
    for _ in range(5):
        channel.retrainer().look()
    assert channel.state.stage == "published"
    channel.publisher.rollback()
    assert "the round was in vain" in channel.retrainer().look()
    assert channel.state.base.endswith("/traces")
    assert "round" not in channel.state.base.rsplit("/", 2)[1]


def test_killed_at_any_step_it_goes_on_to_the_same_canary(
    channel: LearningChannel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel.serve(130, ease=-0.5)
    save: Callable[..., None] = LearningState.save
    kills = 0
    for _ in range(5):  # each step is done, and lost before it is written down; then done again

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(LearningState, "save", die)
        with pytest.raises(KeyboardInterrupt):
            channel.retrainer().look()
        kills += 1
        monkeypatch.setattr(LearningState, "save", save)
        channel.retrainer().look()
    assert (kills, channel.state.stage) == (5, "published")
    assert channel.publisher.rollout.percent == 5
    # Signed once: the canary that had begun was found, and not begun again.
    assert channel.publisher.promoted == 3  # full depth beside it, the policy, its first step
    undisturbed = LearningChannel(tmp_path / "again")
    undisturbed.serve(130, ease=-0.5)
    for _ in range(5):
        undisturbed.retrainer().look()
    assert undisturbed.state.policy == channel.state.policy


def test_so_many_tokens_are_reason_enough(channel: LearningChannel) -> None:
    channel.serve(130, ease=0.5)
    story = channel.retrainer(tokens=3000).look()
    assert story == "3,120 tokens of live traffic were not learned from yet; round 1 begins"
    assert "130 requests" in channel.retrainer().look()


def test_what_cannot_be_certified_is_not_published(
    channel: LearningChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A walk that begins where nothing leaves passes there; this one begins where much does.
    monkeypatch.setattr(setting_families, "SAFEST", 0.6)
    channel.serve(200, ease=0.5)
    channel.retrainer(promise=Promise(delta=0.05, epsilon=0.05), requests=150, tokens=1000)
    for _ in range(3):
        channel.retrainer().look()
    states = channel.config.out / "round-0001" / "traces"
    held = TraceStore.open(states)
    assert {entry.split for entry in held.chunks} == {"train", "validation", "test"}
    # Were the held requests sure and wrong at every exit, nothing could be promised of them.
    spoil(states)
    assert "nothing is certified" in channel.retrainer().look()
    assert channel.publisher.promoted == 0
    assert channel.state.stage == "watching"


def test_what_is_certified_and_saves_nothing_is_not_published(channel: LearningChannel) -> None:
    channel.serve(130, ease=-4.0)  # no exit is ever right, so the certified policy never leaves
    stories = [channel.retrainer().look() for _ in range(4)]
    assert re.search(
        r"is certified: .* it saves -\d+\.\d% of full depth's cost \[-.*\], "
        r"which is not above zero: it is not published, what is served stays",
        stories[3],
    )
    assert channel.publisher.promoted == 0
    assert (channel.state.stage, channel.state.policy) == ("watching", "")
    # The next round waits for traffic that it has not learned from.
    assert "waiting for 20 requests" in channel.retrainer().look()


def spoil(folder: Path) -> None:
    """Have every exit of the calibration split look sure, and full depth disagree with it."""
    store = TraceStore.open(folder)
    chunks = [(store.load(entry), entry.split) for entry in store.chunks]
    store.drop(len(chunks))
    for chunk, split in chunks:
        wrong = replace(
            chunk,
            exit_token_TE=np.ones_like(chunk.exit_token_TE),
            features_TEF=np.where(np.arange(CANDIDATES_V1.width) == 0, 5, chunk.features_TEF),
        )
        store.append(wrong if split == "test" else chunk, split)


def test_what_it_cannot_do_is_refused_by_name(channel: LearningChannel, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="does not exist"):
        channel.retrainer(traces=tmp_path / "nowhere")
    channel.retrainer(traces=tmp_path / "traces")
    channel.serve(20, ease=0.5, header=replace(HEADER, translators="ab"))
    with pytest.raises(TraceError, match=r"no traffic that can be compared .* has translators ab"):
        channel.retrainer().look()
    channel.serve(20, ease=0.5)  # beside it, what can be compared is enough
    assert "no drift" in channel.retrainer().look()
    (channel.config.out / STATE).write_text("{")
    with pytest.raises(ConfigError, match=r"learning: .* unreadable"):
        channel.retrainer()


def test_a_key_that_does_not_suffice_is_refused(channel: LearningChannel, tmp_path: Path) -> None:
    keys = [load_or_create_key(tmp_path / name) for name in ("key.pem", "other.pem")]
    both = Role.of([key.public_bytes for key in keys], threshold=2)
    root = Root(root=both, release=both, timestamp=both)
    channel.publisher = Publisher(
        channel.registry, FolderLedger(tmp_path / "ledger"), keys[0], "demo", trusted=root
    )
    with pytest.raises(ConfigError, match="signatures: a release of this channel takes more"):
        channel.retrainer()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"false_alarms": 0.0}, "false_alarms"),
        ({"window": 3}, "window"),
        ({"requests": 10}, "requests"),
    ],
)
def test_settings_out_of_range_are_named(
    channel: LearningChannel, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: "):
        channel.retrainer(**changes)
