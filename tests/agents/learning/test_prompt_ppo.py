"""A policy for prompts that PPO trained with a small engine, and what the engine makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.learning.prompt_ppo import PairedReturns, PromptPPOConfig, train_prompt_policy
from offramp.agents.prompting.prompt_session import PromptReadingSession
from offramp.controller.costs.table import CostTable
from offramp.controller.features import PROMPT_V1
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import ExitPolicy, ThresholdPolicy
from offramp.controller.policies.rules.prompt_rules import RandomShare
from offramp.controller.release.bundle import PolicyBundle
from offramp.envs import PrefillExitEnv
from offramp.worker import AdaptiveEngine, EngineConfig, PromptExits, SamplingParams
from support.models import LAYERS, VOCAB, make_model

PROMPT, FOLLOWING, EXITS = 40, 4, (1, 3)
KEPT: dict[str, Any] = {"keep_first": 2, "keep_last": 5}
COSTS = CostTable(
    layer_s=1.0, head_s=2.0, probe_s=0.0, policy_s=0.0, fill_s=0.05, step_s=0.0, layers=LAYERS,
    machine="invented",
)  # fmt: skip
DOCUMENTS = [[(5 * n * n + k * n + 1) % VOCAB for n in range(PROMPT + FOLLOWING)] for k in range(3)]
HALF = ThresholdPolicy(EXITS, PROMPT_V1, "ahead", 20 / 256)
"""Who stands in the first half leaves at the first exit, and nobody else."""


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


def session_on(model: Any) -> PromptReadingSession:
    return PromptReadingSession(
        model, DOCUMENTS, prompt_tokens=PROMPT, following=FOLLOWING, exits=EXITS, **KEPT
    )


def policy_of(
    model: Any, start: ExitPolicy, weight: float, steps: int, learning_rate: float
) -> MlpPolicy:
    ppo = PPOConfig(
        steps=steps, envs=2, rollout=128, batch=128, learning_rate=learning_rate,
        lambda_range=(weight, weight), seed=1,
    )  # fmt: skip
    config = PromptPPOConfig(ppo=ppo, shown=400)
    agent = train_prompt_policy(lambda: session_on(model), COSTS, start, config)
    return MlpPolicy(EXITS, PROMPT_V1, agent.weights(weight))


def calls(model: Any, prompts: PromptExits) -> int:
    config = EngineConfig(prefill="exits", prompts=prompts)
    engine = AdaptiveEngine(model, slots=1, config=config)
    done = engine.generate([each[:PROMPT] for each in DOCUMENTS], SamplingParams(max_tokens=1))
    return sum(each.stats.prompt_calls for each in done)


def test_training_begins_with_the_rule_and_its_bundle_serves(model: Any, tmp_path: Path) -> None:
    policy = policy_of(model, HALF, 1.0, 256, learning_rate=1e-9)  # which learns nothing
    engine = AdaptiveEngine(model)
    canned_NF = np.random.default_rng(0).random((16, PROMPT_V1.width), np.float32)
    PolicyBundle.draft(
        pack_policy(policy, canned_NF), model=engine.model_fingerprint, tokenizer="bb", training={},
        metrics={}, created_at=0.0,
    ).save(tmp_path / "learned")  # fmt: skip
    loaded = calls(model, PromptExits.load(tmp_path / "learned", **KEPT))
    shown = calls(model, PromptExits(policy=HALF, **KEPT))
    assert loaded == calls(model, PromptExits(policy=policy, **KEPT))
    # Tokens next to the rule's edge may fall on either side.
    assert abs(loaded - shown) <= 3 * 2 * (LAYERS - EXITS[0])


def test_where_time_is_all_that_counts_nearly_everybody_learns_to_leave_at_once(model: Any) -> None:
    anybody = RandomShare(exits=EXITS, share=0.5)
    policy = policy_of(model, anybody, 1e5, 6144, learning_rate=1e-2)
    asked = PROMPT - sum(KEPT.values())
    everybody = 3 * (PROMPT * LAYERS - asked * (LAYERS - EXITS[0]))
    shown = calls(model, PromptExits(policy=anybody, **KEPT))
    found = calls(model, PromptExits(policy=policy, **KEPT))
    assert everybody <= found < everybody + 0.5 * (shown - everybody)


def test_a_prompts_last_reward_is_told_against_its_earlier_readings(model: Any) -> None:
    def open_env() -> PrefillExitEnv:
        return PrefillExitEnv(
            open_session=lambda: session_on(model), costs=COSTS, lambda_range=(1.0, 1.0)
        )

    plain, paired = DummyVecEnv([open_env]), PairedReturns(DummyVecEnv([open_env]))
    for many in (plain, paired):
        many.seed(0)
        many.reset()
    rng, known = np.random.default_rng(0), dict[int, list[float]]()
    for _ in range(6):
        done = [False]
        while not done[0]:
            action = rng.integers(2, size=1)
            _, theirs, done, [info] = plain.step(action)
            _, ours, *_ = paired.step(action)
            if not done[0]:
                assert ours == theirs
        earlier = known.get(info["prompt"]) or [x for each in known.values() for x in each]
        expected = theirs[0] - (np.mean(earlier) / 2 if earlier else 0)
        assert ours[0] == pytest.approx(expected, abs=1e-6)
        known.setdefault(info["prompt"], []).append(info["quality"])
    assert max(map(len, known.values())) > 1
    plain.close()
    paired.close()
