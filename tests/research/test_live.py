"""The live environment over the reference model: its checker, its numbers, its end.

Shape suffixes: V vocabulary, K candidates, F features, C outlook.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, FloatArray, IntArray
from offramp.controller.policies.protocols import IndexArray, NeverExit
from offramp.envs import LIVE_ENV_ID, LiveExitEnv
from offramp.envs.charges.token_costs import TokenCosts
from offramp.research.live_engine import EngineSession
from offramp.worker import AdaptiveEngine
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.engine.follow import follow
from offramp.worker.probes.candidates.successors import successor_table
from support.models import REFERENCE, make_model, save_adapters

EXITS = (3, 6, 9)
PROMPT = 16
COSTS = CostTable(
    layer_s=1.0, head_s=2.0, probe_s=0.3, policy_s=0.1, fill_s=0.05, step_s=0.4, layers=12,
    machine="invented",
)  # fmt: skip

Open = Callable[..., EngineSession]


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    return AdaptiveEngine.from_pretrained(REFERENCE, slots=1)


@pytest.fixture(scope="module")
def documents(engine: AdaptiveEngine) -> list[list[int]]:
    text = (Path(__file__).parents[2] / "controller" / "durable.py").read_text(encoding="utf-8")
    ids = engine.tokenizer(text)["input_ids"]
    return [ids[:48], ids[48:80], ids[80:120]]


@pytest.fixture(scope="module")
def table_VK(engine: AdaptiveEngine, documents: list[list[int]]) -> IntArray:
    return successor_table(documents, engine.stack.vocab, 16)


@pytest.fixture
def open_session(engine: AdaptiveEngine, documents: list[list[int]], table_VK: IntArray) -> Open:
    def open_it(**options: Any) -> EngineSession:
        options = {
            "prompt_tokens": PROMPT, "exits": EXITS, "schema": CANDIDATES_V1,
            "candidates_VK": table_VK, **options,
        }  # fmt: skip
        return EngineSession(engine, options.pop("documents", documents), **options)

    return open_it


def play(env: LiveExitEnv, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    out: list[Any] = [obs]
    ended = False
    while not ended:
        action = rng.choice(np.flatnonzero(info["action_mask"]))
        obs, reward, ended, _, info = env.step(action)
        out += [obs, reward, info["reward_vector"]]
    del info["reward_vector"]
    return [*out, info]


@pytest.mark.parametrize(
    ("session", "options"),
    [
        ({}, {}),
        ({"kv_mode": "defer", "asks_first": True}, {"pending_share": 0.2, "ends": True}),
        ({}, {"actions": "gate"}),
    ],
    ids=["project", "defer", "gate"],
)
def test_the_checker_finds_nothing_not_even_a_warning(
    open_session: Open, session: dict[str, Any], options: dict[str, Any]
) -> None:
    env = gym.make(
        LIVE_ENV_ID, open_session=lambda: open_session(**session), costs=COSTS, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()
    assert not [each for each in threading.enumerate() if each.name == "offramp-live"]


@pytest.mark.parametrize("mode", ["project", "defer"])
def test_a_seed_fixes_everything(open_session: Open, mode: str) -> None:
    env = LiveExitEnv(
        open_session=lambda: open_session(kv_mode=mode, asks_first=True),
        costs=COSTS,
        pending_share=0.2,
    )
    first, again, other = play(env, 5), play(env, 5), play(env, 6)
    env.close()
    assert len(first) == len(again)
    for a, b in zip(first[:-1], again[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[-1] == again[-1] != other[-1]


class Steady:
    """Goes to one exit and leaves there; keeps what it was shown."""

    candidates_VK: IntArray | None

    def __init__(self, table_VK: IntArray, place: int) -> None:
        self.exits, self.schema, self.candidates_VK = EXITS, CANDIDATES_V1, table_VK
        self.place = place
        self.seen: list[FloatArray] = []

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        return np.zeros(1, np.int64)

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        self.seen.append(np.concatenate([features_NF[0], outlook_NC[0]]))
        return np.array([self.place])


@pytest.mark.parametrize("place", [1, 2])
def test_an_episode_is_what_the_engine_does_under_the_same_policy(
    engine: AdaptiveEngine,
    open_session: Open,
    documents: list[list[int]],
    table_VK: IntArray,
    place: int,
) -> None:
    document = documents[0]
    policy = Steady(table_VK, place)
    [theirs], _ = follow(engine, [document], PROMPT, policy)
    [full], _ = follow(engine, [document], PROMPT, NeverExit())
    env = LiveExitEnv(
        open_session=lambda: open_session(documents=[document]), costs=COSTS,
        lambda_range=(0.5, 0.5), ends=True,
    )  # fmt: skip
    obs, _ = env.reset(seed=0)
    seen, total, ended, here = [obs], 0.0, False, 0
    while not ended:
        action = place - here
        here = place if here == 0 else 0
        obs, reward, ended, _, info = env.step(action)
        seen.append(obs)
        total += reward
    agreed = [a == b for a, b in zip(theirs.emitted, full.emitted, strict=True)]
    np.testing.assert_array_equal([each[:-1] for each in seen[:-1]], policy.seen)
    assert info["tokens"] == len(theirs.emitted) == len(document) - PROMPT - 1
    assert info["quality"] == info["agree"] == np.mean(agreed)
    assert info["exit_layer"] == EXITS[place]
    token_costs = TokenCosts.of(COSTS, EXITS)
    cost = token_costs.leave_OP[0, place + 1] + 2 * (
        token_costs.probe_O[0] + token_costs.policy_O[0]
    )
    assert info["cost"] == pytest.approx(cost)
    weight = info["lambda"]
    value = sum(agreed) - weight * cost * len(agreed)
    assert total == pytest.approx(value / (1 + weight))
    env.close()


def test_full_depth_always_agrees_with_itself_and_labels_are_the_documents_own(
    open_session: Open, documents: list[list[int]], engine: AdaptiveEngine
) -> None:
    [full], _ = follow(engine, documents[:1], PROMPT, NeverExit())
    right = np.mean([a == b for a, b in zip(full.emitted, full.expected, strict=True)])
    for quality, expected in (("agreement", 1.0), ("label", right)):
        env = LiveExitEnv(
            open_session=lambda: open_session(documents=documents[:1], asks_first=True),
            costs=COSTS, quality=quality, ends=True,
        )  # fmt: skip
        env.reset(seed=0)
        ended = False
        while not ended:
            _, _, ended, _, info = env.step(env.action_space.n - 1)  # type: ignore[attr-defined]
        assert info["quality"] == expected
        assert (info["probes"], info["exit_layer"]) == (0, 12)
        env.close()


def test_put_off_tokens_force_a_deep_one_and_are_billed(open_session: Open) -> None:
    env = LiveExitEnv(
        open_session=lambda: open_session(kv_mode="defer"), costs=COSTS, pending_share=0.5
    )
    env.reset(seed=1)
    ended, spent = False, []
    while not ended:
        *_, ended, _, info = env.step(0)  # always leaves after layer 3
        spent.append(-info["reward_vector"][1])
    assert info["unasked"] == info["tokens"] // 9 > 0  # eight may be pending
    early = TokenCosts.of(COSTS, EXITS, fills=False)
    one = early.leave_OP[0, 1] + early.probe_O[0] + early.policy_O[0]
    assert spent[0] == pytest.approx(one)
    deep = 1 + 8 * 9 * 0.5 * COSTS.layer_s / COSTS.full_s  # eight tokens, nine layers each
    assert spent[7] == pytest.approx(one + deep)
    env.close()


def test_an_adapter_layer_is_billed_as_a_layer(tmp_path: Path) -> None:
    config = EngineConfig(translators=save_adapters("llama", tmp_path / "adapters", (1,)))
    small = AdaptiveEngine(make_model("llama"), slots=1, config=config)
    table_VK = np.tile(np.arange(8, dtype=np.int32), (small.stack.vocab, 1))
    session = EngineSession(
        small, [[*range(2, 12)]], prompt_tokens=4, exits=(1, 3), schema=CANDIDATES_V1,
        candidates_VK=table_VK, kv_mode="defer",
    )  # fmt: skip
    costs = dataclasses.replace(COSTS, layers=small.stack.layers)
    env = LiveExitEnv(open_session=lambda: session, costs=costs, pending_share=0.0)
    env.reset(seed=0)
    paid = -env.step(0)[4]["reward_vector"][1]
    parts = costs.step_s + costs.head_s + costs.build_s + costs.probe_s + costs.policy_s
    assert paid == pytest.approx((parts + 2 * costs.layer_s) / costs.full_s)
    env.close()


def test_an_episode_can_be_given_up_and_the_engine_is_idle_then(
    open_session: Open, engine: AdaptiveEngine
) -> None:
    env = LiveExitEnv(open_session=open_session, costs=COSTS)
    env.reset(seed=0)
    env.step(1)
    env.reset(seed=1)
    env.step(0)
    env.close()
    env.close()
    assert not [each for each in threading.enumerate() if each.name == "offramp-live"]
    assert engine.load == (0, 0)
    with pytest.raises(ResetNeeded):
        env.step(0)


def test_what_stops_the_engine_is_raised_where_it_was_asked(
    open_session: Open, engine: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = LiveExitEnv(open_session=open_session, costs=COSTS)
    env.reset(seed=0)
    env.step(0)

    def broken(*_: Any) -> None:
        raise MemoryError("the machine gave out")

    with monkeypatch.context() as patch:
        patch.setattr(engine.stack, "logits", broken)
        with pytest.raises(MemoryError, match="gave out"):
            env.step(0)
    with pytest.raises(ResetNeeded):
        env.step(0)
    assert play(env, 3)[-1]["tokens"] > 10  # and it can begin anew
    env.close()


def test_unusable_sessions_are_named(
    open_session: Open, engine: AdaptiveEngine, documents: list[list[int]]
) -> None:
    with pytest.raises(ConfigError, match="documents: have 17 tokens at the shortest"):
        open_session(documents=[documents[0][:17]])
    with pytest.raises(ConfigError, match="documents: have 0 tokens"):
        open_session(documents=[])
    shallow = dataclasses.replace(COSTS, layers=8)
    with pytest.raises(ConfigError, match="costs: are of a model with 8 layers"):
        LiveExitEnv(open_session=open_session, costs=shallow)
    with pytest.raises(RequestError):
        open_session(exits=(3, 40)).begin(np.random.default_rng(0))
    busy = engine.submit(documents[0])
    with pytest.raises(ConfigError, match="engine: is busy"):
        open_session().begin(np.random.default_rng(0))
    engine.cancel(busy.id)
    with pytest.raises(ConfigError, match="'logprob_gap' is unknown here"):
        LiveExitEnv(open_session=open_session, costs=COSTS, quality="logprob_gap")
    with pytest.raises(ConfigError, match="session: waits for no answer"):
        open_session().answer(0)


def test_observations_are_features_outlook_and_weight(open_session: Open) -> None:
    env = LiveExitEnv(open_session=open_session, costs=COSTS)
    obs, _ = env.reset(seed=0, options={"lambda": 0.25})
    assert obs.shape == (CANDIDATES_V1.width + OUTLOOK_V1.width + 1,)
    assert obs[-1] == np.float32(np.log(0.25))
    assert obs[CANDIDATES_V1.index("depth")] == 0.25
    outlook_C = obs[CANDIDATES_V1.width : -1]
    assert outlook_C[OUTLOOK_V1.index("step")] == np.float32(1 / 256)
    env.close()
