"""The environment of prompts over a small engine: its checker, its numbers, its end."""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env

from offramp.agents.prompting.prompt_session import PromptReadingSession
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.features import PROMPT_V1
from offramp.controller.policies.protocols import ExitPolicy, FixedExit, ThresholdPolicy
from offramp.envs import PREFILL_ENV_ID, PrefillExitEnv
from offramp.worker import AdaptiveEngine, EngineConfig, PromptExits, SamplingParams
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.engine.follow import Witness
from support.models import LAYERS, VOCAB, make_model
from support.rows import drain

PROMPT, FOLLOWING, CHUNK = 40, 6, 16
EXITS = (1, 3)
KEPT = {"keep_first": 2, "keep_last": 5}
ASKED = PROMPT - 2 - 5
COSTS = CostTable(
    layer_s=1.0, head_s=2.0, probe_s=0.3, policy_s=0.1, fill_s=0.05, step_s=0.4, layers=LAYERS,
    machine="invented",
)  # fmt: skip
DOCUMENTS = [[(5 * n * n + k * n + k) % VOCAB for n in range(PROMPT + FOLLOWING)] for k in range(3)]
CONFIG = EngineConfig(prefill_tokens=CHUNK)

Open = Callable[..., PromptReadingSession]


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture
def open_session(model: Any) -> Open:
    def open_it(documents: Sequence[Sequence[int]] = DOCUMENTS, **options: Any) -> Any:
        settings: dict[str, Any] = {
            "prompt_tokens": PROMPT, "following": FOLLOWING, "exits": EXITS, "config": CONFIG,
        } | KEPT  # fmt: skip
        return PromptReadingSession(model, documents, **(settings | options))

    return open_it


def play(env: PrefillExitEnv, seed: int) -> list[Any]:
    """Each observation, reward and vector of an episode of random actions, and its last info."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    out: list[Any] = [obs]
    ended = False
    while not ended:
        obs, reward, ended, _, info = env.step(rng.integers(2))
        out += [obs, reward, info["reward_vector"]]
    del info["reward_vector"]
    return [*out, info]


def read_by_hand(model: Any, document: Sequence[int], policy: ExitPolicy, way: Prefill) -> Any:
    """A document's row in an engine that nobody interrupts, and the loss of what follows."""
    prompts = PromptExits(policy=policy, keep_first=2, keep_last=5)
    config = dataclasses.replace(CONFIG, prompts=prompts, prefill=way)
    engine = AdaptiveEngine(model, slots=1, config=config)
    prompt, rest = document[:PROMPT], document[PROMPT:]
    request = engine.submit(prompt, forced=rest, sampler=Witness(rest, VOCAB))
    [row] = drain(engine, [request])
    return row, -sum(each for each in row.logprobs if each is not None) / FOLLOWING


def test_the_checker_finds_nothing_not_even_a_warning(open_session: Open) -> None:
    env = gym.make(PREFILL_ENV_ID, open_session=open_session, costs=COSTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    env.close()
    assert not [each for each in threading.enumerate() if each.name == "offramp-live"]


def test_a_seed_fixes_everything(open_session: Open) -> None:
    env = PrefillExitEnv(open_session=open_session, costs=COSTS)
    first, again, other = play(env, 5), play(env, 5), play(env, 6)
    env.close()
    assert len(first) == len(again)
    for a, b in zip(first[:-1], again[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[-1] == again[-1] != other[-1]


@pytest.mark.parametrize(
    "policy",
    [
        FixedExit(1),
        FixedExit(3),
        ThresholdPolicy(EXITS, PROMPT_V1, "cosine", 0.6),
        ThresholdPolicy(EXITS, PROMPT_V1, "seen", 2.0),
    ],
    ids=["exit 1", "exit 3", "some", "nobody"],
)
def test_a_reward_is_that_of_the_engines_own_runs(
    model: Any, open_session: Open, policy: ExitPolicy
) -> None:
    document = DOCUMENTS[1]
    env = PrefillExitEnv(
        open_session=lambda: open_session([document]), costs=COSTS, lambda_range=(0.5, 0.5)
    )
    obs, _ = env.reset(seed=0)
    total, ended, asked = 0.0, False, 0
    while not ended:
        here = EXITS.index(round(LAYERS * float(obs[PROMPT_V1.index("depth")])))
        wants = EXITS[here] in policy.exits and policy.leave(obs[None, :-1])[0]
        obs, reward, ended, _, info = env.step(int(wants))
        total += reward
        asked += 1
    env.close()
    row, loss = read_by_hand(model, document, policy, "exits")
    full, full_loss = read_by_hand(model, document, policy, "full")
    assert (info["loss"], info["full_loss"]) == pytest.approx((loss, full_loss), rel=1e-12)
    assert (info["calls"], info["full_calls"]) == (row.prompt_calls, PROMPT * LAYERS)
    assert full.prompt_calls == PROMPT * LAYERS
    assert info["asked"] == asked
    saved = (1 - 0.05) * (1 - row.prompt_calls / (PROMPT * LAYERS))
    assert info["saved"] == pytest.approx(saved)
    assert info["quality"] == pytest.approx(full_loss - loss)
    assert total == pytest.approx((full_loss - loss + 0.5 * saved) / 1.5)
    if policy == FixedExit(1):
        assert asked == info["left"] == ASKED
        assert info["quality"] != 0
    elif row.prompt_calls == full.prompt_calls:
        assert (info["left"], info["quality"], info["saved"]) == (0, 0, 0)


def test_calls_are_those_that_a_served_request_is_told_of(model: Any, open_session: Open) -> None:
    env = PrefillExitEnv(open_session=lambda: open_session(DOCUMENTS[:1]), costs=COSTS)
    env.reset(seed=0)
    ended = False
    while not ended:
        *_, ended, _, info = env.step(1)
    prompts = PromptExits(policy=FixedExit(1), keep_first=2, keep_last=5)
    config = dataclasses.replace(CONFIG, prompts=prompts, prefill="exits")
    engine = AdaptiveEngine(model, slots=1, config=config)
    [done] = engine.generate(DOCUMENTS[0][:PROMPT], SamplingParams(max_tokens=1))
    assert info["calls"] == done.stats.prompt_calls == ASKED + 7 * LAYERS
    env.close()


def test_time_is_credited_when_a_token_leaves_and_quality_at_the_end(open_session: Open) -> None:
    env = PrefillExitEnv(open_session=open_session, costs=COSTS)
    env.reset(seed=2)
    vectors: list[Any] = []
    ended = False
    while not ended:
        *_, ended, _, info = env.step(len(vectors) % 2)
        vectors.append(info["reward_vector"])
    shares = {0.95 * (LAYERS - exit_) / (PROMPT * LAYERS) for exit_ in EXITS}
    assert {float(vector[1]) for vector in vectors[:-1]} == {0.0, *shares}
    assert not any(vector[0] for vector in vectors[:-1])
    assert np.sum(vectors, axis=0) == pytest.approx([info["quality"], info["saved"]])
    assert info["quality"] == vectors[-1][0] != 0
    env.close()


def test_stable_baselines_steps_several_engines_on_the_same_weights(open_session: Open) -> None:
    many = make_vec_env(
        PrefillExitEnv, 2, seed=0, env_kwargs={"open_session": open_session, "costs": COSTS}
    )
    obs_BD = many.reset()
    infos: list[dict[str, Any]] = []
    while len(infos) < 3:
        assert obs_BD.shape == (2, PROMPT_V1.width + 1)
        obs_BD, _, done_B, step_infos = many.step(np.array([0, 1]))
        infos += [info for info, done in zip(step_infos, done_B, strict=True) if done]
    many.close()
    assert {info["left"] for info in infos} == {0, ASKED}
    assert not [each for each in threading.enumerate() if each.name == "offramp-live"]


def test_an_episode_can_be_given_up(open_session: Open) -> None:
    env = PrefillExitEnv(open_session=open_session, costs=COSTS)
    env.reset(seed=0)
    env.step(1)
    env.reset(seed=1)
    env.step(0)
    env.close()
    env.close()
    assert not [each for each in threading.enumerate() if each.name == "offramp-live"]
    with pytest.raises(ResetNeeded):
        env.step(0)
    assert play(env, 3)[-1]["asked"] >= ASKED
    env.close()


def test_unusable_sessions_and_costs_are_named(open_session: Open) -> None:
    with pytest.raises(ConfigError, match="documents: have 45 tokens at the shortest"):
        open_session([DOCUMENTS[0][:-1]])
    with pytest.raises(ConfigError, match="documents: have 0 tokens"):
        open_session([])
    with pytest.raises(ConfigError, match="prompt_tokens: 7 is below 8"):
        open_session(prompt_tokens=7)
    with pytest.raises(ConfigError, match="following: 0 is below 1"):
        open_session(following=0)
    with pytest.raises(ConfigError, match=r"exits: \(1, 5\) are not layers from 1 to 4"):
        open_session(exits=(1, LAYERS))
    with pytest.raises(ConfigError, match="do not ascend"):
        open_session(exits=(3, 1))
    with pytest.raises(ConfigError, match="keep_last: 0"):
        open_session(keep_last=0)
    with pytest.raises(ConfigError, match="session: waits for no answer"):
        open_session().answer(0)
    shallow = dataclasses.replace(COSTS, layers=8)
    with pytest.raises(ConfigError, match="costs: are of a model with 8 layers"):
        PrefillExitEnv(open_session=open_session, costs=shallow)
    env = PrefillExitEnv(open_session=open_session, costs=COSTS)
    with pytest.raises(ConfigError, match="options: 'mu' is unknown"):
        env.reset(seed=0, options={"mu": 1.0})
    env.reset(seed=0, options={"lambda": 0.25})
    with pytest.raises(ConfigError, match="action: is 2"):
        env.step(2)
    env.close()
