"""Rollouts of a real engine against what the engine says it did, and the learner's arithmetic.

Shape suffixes: K decisions, T tokens, N rows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import configure

from offramp.agents.learning.jump_ppo import JumpAgent
from offramp.agents.learning.stopping_problem import StoppingProblem
from offramp.agents.onpolicy.collector import (
    Collector,
    CollectSpec,
    PolicyVersion,
    Task,
    fixed_preference,
)
from offramp.agents.onpolicy.learner import (
    Learner,
    LearnerConfig,
    advantages_of,
    judged_part,
    rewards_of,
    token_costs,
)
from offramp.agents.onpolicy.onpolicy import OnPolicyConfig, make_tasks
from offramp.agents.onpolicy.rollout import UNKNOWN, DecodedRollout
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1
from offramp.worker.decoding.request import KVMode
from offramp.worker.probes.candidates.successors import successor_table
from offramp.worker.spec import WorkerSpec

REFERENCE = Path(__file__).parents[3] / "models" / "reference"
EXITS = (3, 6, 9)
DOCUMENTS = [(f"{n:064x}", tuple(range(100 + n, 160 + n))) for n in range(3)]
TOKENS = 24
PROMPT = 8


def make_learner(agent: JumpAgent, problem: StoppingProblem, **options: float) -> Learner:
    return Learner(agent, problem, LearnerConfig(batch=128, **options), configure(None, []))  # type: ignore[arg-type]  # mixed numbers


@pytest.fixture(scope="module")
def collectors() -> dict[KVMode, Collector]:
    candidates = successor_table([list(tokens) for _, tokens in DOCUMENTS], 4096, 16)
    modes: tuple[KVMode, ...] = ("project", "defer")
    return {mode: Collector(spec(mode), candidates) for mode in modes}


def spec(mode: KVMode) -> CollectSpec:
    return CollectSpec(
        worker=WorkerSpec(model=str(REFERENCE), slots=3),
        exits=EXITS,
        schema=CANDIDATES_V1,
        kv_mode=mode,
        prompt_tokens=PROMPT,
    )


def task(number: int = 0) -> Task:
    length = PROMPT + TOKENS + 1
    parts = tuple((name, tokens[:length], 0.3) for name, tokens in DOCUMENTS)
    return Task(number=number, documents=parts)


@pytest.mark.parametrize("mode", ["project", "defer"])
def test_a_rollout_says_what_the_engine_did(
    collectors: dict[KVMode, Collector], agent: JumpAgent, problem: StoppingProblem, mode: KVMode
) -> None:
    collector = collectors[mode]
    rows = []
    decode = collector._decode

    def spying(*arguments: object) -> object:
        rows.extend(decode(*arguments))  # type: ignore[arg-type]  # passed on as they come
        return rows

    collector._decode = spying  # type: ignore[assignment, method-assign]  # sees the engine's rows
    policy = make_learner(agent, problem).policy()
    try:
        rollouts = collector.collect(policy, task())
    finally:
        collector._decode = decode  # type: ignore[method-assign]
    layers = [*EXITS, 12]
    for rollout, row, (name, _) in zip(rollouts, rows, DOCUMENTS, strict=True):
        assert (rollout.version, rollout.document) == (1, name)
        said = [layers[exit_] for exit_ in rollout.taken_T]
        if mode == "project":  # every token but the prompt's own is asked
            assert said == row.exit_layers[1:]
        else:  # at times a row must go deep, unasked
            assert sorted(said + [12] * (len(row.exit_layers) - 1 - len(said))) == sorted(
                row.exit_layers[1:]
            )
        early = rollout.taken_T < len(EXITS)
        assert early.any()
        judged = rollout.agreed_T[early]
        assert (judged != UNKNOWN).sum() >= len(judged) - 8
        assert 0 < judged[judged != UNKNOWN].mean() < 1 or mode == "defer"
        if mode == "defer":
            assert (rollout.agreed_T[~early] == 1).all()
        else:  # full depth over a cache that exits filled is not full depth
            fed = torch.tensor([[*row.request.prompt, *row.request.forced[:-1]]])
            full = collector.engine.model(fed).logits[0, PROMPT:].argmax(-1).numpy()
            expected = np.asarray(row.emitted[1:]) == full
            np.testing.assert_array_equal(rollout.agreed_T, expected)
        decisions = np.bincount(rollout.token_K)
        assert (decisions[early] >= 2).all()  # the start, and at least one probe
        assert rollout.obs_KD.shape == (len(rollout.action_K), 11 + OUTLOOK_V1.width + 1)


def test_recorded_log_probabilities_are_the_learners(
    collectors: dict[KVMode, Collector], agent: JumpAgent, problem: StoppingProblem
) -> None:
    """Independent: torch evaluates what numpy sampled in another process's stead."""
    learner = make_learner(agent, problem)
    for rollout in collectors["project"].collect(learner.policy(), task()):
        with torch.no_grad():
            _, log_probs, _ = learner.model.policy.evaluate_actions(
                torch.from_numpy(rollout.obs_KD), torch.from_numpy(rollout.action_K)
            )
        np.testing.assert_allclose(rollout.log_prob_K, log_probs.numpy(), atol=1e-4)


def test_a_task_given_out_again_is_decoded_the_same(
    collectors: dict[KVMode, Collector], agent: JumpAgent, problem: StoppingProblem
) -> None:
    policy = make_learner(agent, problem).policy()
    first = collectors["project"].collect(policy, task(5))
    again = collectors["project"].collect(policy, task(5))
    other = collectors["project"].collect(policy, task(6))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.action_K, two.action_K)
    assert any(
        one.action_K.tolist() != two.action_K.tolist()
        for one, two in zip(first, other, strict=True)
    )


def test_the_first_version_decides_as_the_agent_did(
    agent: JumpAgent, problem: StoppingProblem
) -> None:
    learner = make_learner(agent, problem)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 11)).astype(np.float32)
    features[:, CANDIDATES_V1.index("depth")] = 0.5
    outlook = rng.random((200, OUTLOOK_V1.width)).astype(np.float32)
    old_router = agent.router(0.3)
    new_router = learner.router(0.3)
    np.testing.assert_array_equal(
        old_router.route(1, features, outlook), new_router.route(1, features, outlook)
    )
    assert old_router.start(outlook).tolist() == new_router.start(outlook).tolist()
    version = learner.policy()
    assert isinstance(version, PolicyVersion)
    assert fixed_preference(version.routing, 0.3)[0][0].shape == (11 + OUTLOOK_V1.width, 32)


def make_rollout(**changes: object) -> DecodedRollout:
    """Three tokens: leaves at exit 1 after two probes, runs to the end, leaves at 0."""
    token_K = np.array([0, 0, 0, 1, 2, 2])
    values: dict[str, object] = {
        "version": 1,
        "task": 0,
        "document": "d",
        "preference": 0.5,
        "obs_KD": np.zeros((6, 20), np.float32),
        "action_K": np.array([1, 1, 0, 4, 1, 0]),
        "log_prob_K": np.zeros(6, np.float32),
        "token_K": token_K,
        "taken_T": np.array([1, 3, 0]),
        "agreed_T": np.array([1, 1, 0], np.int8),
    }
    return DecodedRollout(**{**values, **changes})  # type: ignore[arg-type]  # of mixed types


def test_rewards_are_quality_less_the_measured_cost(problem: StoppingProblem) -> None:
    rollout = make_rollout()
    expected = [
        problem.leave_E1[1] + 2 * problem.decide + problem.build + problem.begin,
        problem.leave_E1[3] + problem.begin,
        problem.leave_E1[0] + problem.decide + problem.build + problem.begin,
    ]
    np.testing.assert_allclose(token_costs(rollout, problem), expected, rtol=1e-6)
    reward_K = rewards_of(rollout, problem)
    np.testing.assert_array_equal(np.flatnonzero(reward_K), [2, 3, 5])
    assert reward_K[2] == pytest.approx((1 - 0.5 * expected[0]) / 1.5, rel=1e-6)
    assert reward_K[5] == pytest.approx((0 - 0.5 * expected[2]) / 1.5, rel=1e-6)


def test_advantages_are_discounted_between_tokens_only() -> None:
    reward = np.array([0, 0, 1, 2, 0, 3], np.float32)
    ends = np.array([False, False, True, True, False, True])
    none = np.zeros(6, np.float32)
    found = advantages_of(reward, none, ends, 0.5, 1.0)
    assert found.tolist() == [2.75, 2.75, 2.75, 3.5, 3.0, 3.0]
    value = np.array([1, 2, 3, 4, 5, 6], np.float32)
    exact = advantages_of(reward, value, ends, 0.5, 1.0)
    np.testing.assert_allclose(exact, found - value)  # λ = 1: the return less the value
    blind = advantages_of(reward, value, ends, 0.0, 0.9)
    assert blind.tolist() == [0.0, -1.0, -2.0, -2.0, -2.0, -3.0]


def test_tokens_that_nobody_judged_are_left_out() -> None:
    rollout = make_rollout(agreed_T=np.array([1, 1, UNKNOWN], np.int8))
    part = judged_part(rollout)
    assert part.token_K.tolist() == [0, 0, 0, 1]
    assert part.agreed_T.tolist() == [1, 1]
    assert judged_part(make_rollout()).token_K.tolist() == [0, 0, 0, 1, 2, 2]


def test_an_update_makes_rewarded_actions_likelier(
    agent: JumpAgent, problem: StoppingProblem
) -> None:
    """Of one state, in which leaving is always right and going on always wrong."""
    learner = make_learner(agent, problem, learning_rate=3e-3, discount=0.0)
    obs = np.zeros((2, 20), np.float32)
    obs[1, CANDIDATES_V1.index("depth")] = 0.25
    obs[:, -1] = math.log(0.5)
    state = torch.from_numpy(obs[1:])

    def leaves() -> float:
        with torch.no_grad():
            return float(learner.model.policy.get_distribution(state).distribution.probs[0, 0])

    before = leaves()
    for _ in range(6):
        rollouts = []
        for _ in range(64):
            with torch.no_grad():
                actions, _, log_probs = learner.model.policy.forward(torch.from_numpy(obs))
            left = int(actions[1]) == 0
            rollouts.append(
                make_rollout(
                    obs_KD=obs,
                    action_K=actions.numpy(),
                    log_prob_K=log_probs.numpy(),
                    token_K=np.array([0, 0]),
                    taken_T=np.array([0 if left else 3]),
                    agreed_T=np.array([1 if left else 0], np.int8),
                )
            )
        learner.learn(rollouts)
    assert learner.version == 7
    assert leaves() > before + 0.2


def test_tasks_come_without_end_and_alike() -> None:
    config = OnPolicyConfig(tokens=TOKENS, prompt_tokens=PROMPT, together=2)
    first = make_tasks(DOCUMENTS, (0.1, 1.0), config)
    again = make_tasks(DOCUMENTS, (0.1, 1.0), config)
    taken = [next(first) for _ in range(9)]
    assert taken == [next(again) for _ in range(9)]
    names = [name for each in taken for name, _, _ in each.documents]
    assert {names.count(name) for name, _ in DOCUMENTS} == {6}
    assert all(0.1 <= preference <= 1 for each in taken for _, _, preference in each.documents)
    with pytest.raises(TraceError, match="none has 1009 tokens"):
        make_tasks(DOCUMENTS, (0.1, 1.0), replace(config, tokens=1000))


@pytest.mark.parametrize(
    "changes", [{"kv_mode": "verify"}, {"documents": 0}, {"rounds": -1}, {"max_lag": -1}]
)
def test_settings_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="onpolicy"):
        OnPolicyConfig(**changes)  # type: ignore[arg-type]  # of mixed types
