"""Exits in the prompt: who leaves, what stands in the cache then, and what nothing may change.

Shape suffixes: N tokens, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import CANDIDATES_V1, PROMPT_V1, BoolArray, FloatArray
from offramp.controller.policies.exits import Exit
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import FixedExit, NeverExit, ThresholdPolicy
from offramp.controller.policies.rules.position import PositionSchedule
from offramp.controller.policies.rules.prompt_rules import RandomShare
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker import AdaptiveEngine, EngineConfig, PromptExits, SamplingParams
from offramp.worker.decoding.prompting.prompt_exits import Prefill
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.model.kv import EXACT, PROJECTED
from support.models import LAYERS, VOCAB, make_model, save_adapters
from support.rows import CLOSE, ReplayedExits, counted_tokens, drain

PROMPT = [(7 * n * n + 3 * n + 5) % VOCAB for n in range(45)]
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True)
NOBODY = ThresholdPolicy((1, 3), PROMPT_V1, "cosine", 2.0)
PREFILLS: tuple[Prefill | None, ...] = ("exits", "full", None)
PLACE, DEPTH = PROMPT_V1.index("place"), PROMPT_V1.index("depth")


@dataclass
class ChosenDepths:
    """Each token leaves after as many layers as it is told."""

    depths: Sequence[int]
    exits: tuple[int, ...] = tuple(range(1, LAYERS))
    schema: Any = PROMPT_V1
    candidates_VK: None = None

    def leave(self, features_NF: FloatArray) -> BoolArray:
        places_N = (256 * features_NF[:, PLACE]).astype(int)
        layers_N = np.rint(LAYERS * features_NF[:, DEPTH])
        return np.asarray(np.array(self.depths)[places_N] == layers_N)


@dataclass
class BrokenForPrompts:
    """Raises whenever it is asked."""

    exits: tuple[int, ...] = (1, 2, 3)
    schema: None = None
    candidates_VK: None = None

    def leave(self, features_NF: FloatArray) -> BoolArray:
        raise ArithmeticError("broken")


def engine_of(
    model: Any, policy: Any, first: int = 2, last: int = 3, **config: Any
) -> AdaptiveEngine:
    prompts = PromptExits(policy=policy, keep_first=first, keep_last=last)
    settings = {"prefill": "exits"} | config
    return AdaptiveEngine(model, slots=3, config=EngineConfig(prompts=prompts, **settings))


def read(engine: AdaptiveEngine, prompt: Sequence[int] = PROMPT) -> tuple[Tensor, Tensor]:
    """Keys and values of a prompt that alone is in the cache."""
    engine.submit(prompt, SAMPLING)
    while not engine.step():
        pass
    at = (slice(LAYERS), 0, slice(None), slice(len(prompt)))
    return engine.kv.keys_LSGCH[at].clone(), engine.kv.values_LSGCH[at].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_nobody_leaves_not_a_bit_changes(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype)
    for tokens in (256, 7):
        asked = engine_of(model, NOBODY, prefill_tokens=tokens)
        plain = AdaptiveEngine(model, slots=3, config=EngineConfig(prefill_tokens=tokens))
        for ours, theirs in zip(read(asked), read(plain), strict=True):
            assert torch.equal(ours, theirs)
        assert [asked.kv.exact_share(0, 45), plain.kv.exact_share(0, 45)] == [1.0, 1.0]
        found, expected = (each.generate(PROMPT, SAMPLING) for each in (asked, plain))
        assert found == expected
        assert found[0].stats.prompt_calls == 45 * LAYERS


def test_a_prompt_with_exits_is_one_that_was_fed_token_by_token_and_left_there(family: str) -> None:
    """By the decode loop, a path of its own: each token alone, filled as a decoded one is."""
    model = make_model(family)
    rng = np.random.default_rng(3)
    depths = [LAYERS, LAYERS, *rng.integers(1, LAYERS + 1, 40).tolist(), *[LAYERS] * 3]
    fed = AdaptiveEngine(model, slots=1)
    request = fed.submit(PROMPT[:1], policy=ReplayedExits(depths), forced=[*PROMPT[1:], 0])
    [row] = drain(fed, [request])
    assert row.exit_layers == depths
    # Its slot was wiped at its end: the cache as it was before the last token was emitted.
    fed = AdaptiveEngine(model, slots=1)
    fed.submit(PROMPT[:1], policy=ReplayedExits(depths), forced=[*PROMPT[1:], 0, 0])
    for _ in depths:
        fed.step()
    for tokens in (256, 7):
        engine = engine_of(model, ChosenDepths(depths), prefill_tokens=tokens)
        keys, values = read(engine)
        for ours, theirs in ((keys, fed.kv.keys_LSGCH), (values, fed.kv.values_LSGCH)):
            torch.testing.assert_close(ours, theirs[:, 0, :, :45], rtol=0, atol=10 * CLOSE)
        marks = [EXACT if depth == LAYERS else PROJECTED for depth in depths]
        assert engine.kv.provenance_SC[0, :45].tolist() == marks
    unfilled, values = read(engine_of(model, ChosenDepths([2 if d < 2 else d for d in depths])))
    with pytest.raises(AssertionError):  # negative control
        torch.testing.assert_close(unfilled, fed.kv.keys_LSGCH[:, 0, :, :45], rtol=0, atol=CLOSE)


def test_layers_run_over_the_tokens_that_stay_and_are_counted_so() -> None:
    engine = engine_of(make_model("llama"), FixedExit(2), first=4, last=5, prefill_tokens=16)
    with counted_tokens(engine) as counts:
        [row] = drain(engine, [engine.submit(PROMPT, SamplingParams(max_tokens=1))])
    assert [counts[index] for index in range(LAYERS)] == [45, 45, 9, 9, 9]
    assert row.prompt_calls == 2 * 45 + 3 * 9
    assert row.layer_calls == 0
    short = engine.generate(PROMPT[:9], SAMPLING)
    assert short[0].stats.prompt_calls == 9 * LAYERS


def test_a_neighbour_changes_no_token_whichever_way_it_is_read() -> None:
    model = make_model("llama")
    policy = RandomShare(exits=(1, 3), share=0.4, seed=5)
    prompts, ways = [PROMPT, PROMPT[5:], PROMPT[::-1]], PREFILLS
    alone, together = [], engine_of(model, policy, prefill_tokens=8, prefill="exits")
    for prompt, way in zip(prompts, ways, strict=True):
        engine = engine_of(model, policy, prefill_tokens=8, prefill="exits")
        alone += [drain(engine, [engine.submit(prompt, SAMPLING, FixedExit(3), prefill=way)])[0]]
    asked = zip(prompts, ways, strict=True)
    rows = drain(
        together, [together.submit(p, SAMPLING, FixedExit(3), prefill=way) for p, way in asked]
    )
    assert [row.emitted for row in rows] == [row.emitted for row in alone]
    assert [row.prompt_calls for row in rows] == [row.prompt_calls for row in alone]
    assert rows[1].prompt_calls == 40 * LAYERS > rows[0].prompt_calls


def test_what_was_read_with_exits_is_neither_kept_nor_recalled() -> None:
    model = make_model("llama")
    engine = engine_of(model, FixedExit(2), prefix_cache_mib=4.0, prefill_tokens=8)
    first = engine.generate(PROMPT, SAMPLING)
    full = engine.generate(PROMPT, SAMPLING, prefill="full")
    again = engine.generate(PROMPT, SAMPLING, prefill="full")
    assert [each[0].stats.cached_tokens for each in (first, full, again)] == [None, 0, 40]
    plain = AdaptiveEngine(
        model, config=EngineConfig(prefix_cache_mib=4.0, prefill_tokens=8)
    ).generate(PROMPT, SAMPLING)
    assert full == again == plain
    assert engine.generate(PROMPT, SAMPLING) == first
    assert first[0].stats.exact_share < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_that_fails_leaves_the_prompt_at_full_depth(dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    engine = engine_of(model, BrokenForPrompts(), prefill_tokens=8)
    plain = AdaptiveEngine(model, config=EngineConfig(prefill_tokens=8))
    for ours, theirs in zip(read(engine), read(plain), strict=True):
        assert torch.equal(ours, theirs)
    assert engine.decoder.failures == 1


@pytest.mark.parametrize(
    ("wish", "problem"),
    [
        ({"kv_mode": "verify"}, "verify promises full depth's tokens"),
        ({"kv_mode": 0.99}, "full depth's tokens|no certificate"),
        ({"sampling": SamplingParams(prompt_logprobs=1)}, "prompt_logprobs are full depth's"),
    ],
)
def test_what_was_promised_more_is_read_in_full_and_refused_if_it_asks(
    wish: dict[str, Any], problem: str
) -> None:
    engine = engine_of(make_model("llama"), FixedExit(2))
    with pytest.raises(RequestError, match=problem) as refused:
        engine.submit(PROMPT, prefill="exits", **wish)
    assert refused.value.field == "prefill"
    [row] = drain(engine, [engine.submit(PROMPT, **wish)])
    assert row.prompt_calls == 45 * LAYERS


def test_adapter_layers_refuse_prompts_that_pass_them_by(tmp_path: Path) -> None:
    model = make_model("llama")
    folder = save_adapters("llama", tmp_path, (3,))
    for exit_, left in ((2, False), (3, True)):
        engine = engine_of(model, FixedExit(exit_), translators=folder, kv_mode="defer")
        if not left:
            with pytest.raises(RequestError, match="adapter layer after 3 without entries"):
                engine.submit(PROMPT, policy=FixedExit(3), prefill="exits")
        [row] = drain(engine, [engine.submit(PROMPT, SAMPLING, FixedExit(3))])
        adapted = 45 * (LAYERS + 1)
        assert row.prompt_calls == (adapted - 40 * (LAYERS - 3) if left else adapted)
        # Under a policy that does not name the adapter's exit it does not run.
        [row] = drain(engine, [engine.submit(PROMPT, SAMPLING, NeverExit(), prefill="exits")])
        assert row.prompt_calls == 45 * LAYERS - 40 * (LAYERS - exit_)


def test_unknown_ways_and_engines_without_a_policy_are_refused_by_name() -> None:
    engine = AdaptiveEngine(make_model("llama"))
    half: Any = "half"
    asked: Prefill
    for asked, problem in ((half, "'half' is unknown"), ("exits", "the engine has none")):
        with pytest.raises(RequestError, match=problem) as refused:
            engine.submit(PROMPT, prefill=asked)
        assert refused.value.field == "prefill"
    with pytest.raises(RequestError, match=r"EngineConfig\.prompts"):
        engine.submit(PROMPT, policy=NOBODY)
    with pytest.raises(ConfigError, match="prefill: exits needs a policy"):
        EngineConfig(prefill="exits")
    with pytest.raises(ConfigError, match="verify promises full depth's tokens"):
        EngineConfig(prefill="exits", kv_mode="verify", prompts=PromptExits(policy=NOBODY))
    with pytest.raises(ConfigError, match="'half' is unknown"):
        EngineConfig(prefill=half)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"policy": FixedExit(LAYERS + 1)}, "the model has 5 layers"),
        ({"policy": FixedExit(2), "model": "ab" * 32}, "made for model abab"),
        ({"policy": FixedExit(2), "keep_first": -1}, "keep_first"),
        ({"policy": FixedExit(2), "keep_last": 0}, "keep_last"),
        ({"policy": FixedExit(Exit(2, "int4"))}, "fewer bytes"),
        ({"policy": ThresholdPolicy((2,), CANDIDATES_V1, "top1", 0.5)}, "'candidates'"),
        ({"policy": PositionSchedule(exits=(2,), deepest=3, shallowest=1)}, "exit to exit"),
        ({"policy": None}, "no exit policy"),
        ({"policy": RandomShare(exits=(3, 2), share=0.5)}, "do not ascend"),
    ],
)
def test_policies_that_no_prompt_can_be_read_under_are_refused(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        AdaptiveEngine(make_model("llama"), config=EngineConfig(prompts=PromptExits(**options)))


def test_snapshots_keep_their_prompts_way() -> None:
    engine = engine_of(make_model("llama"), FixedExit(2))
    snapshot = PolicySnapshot(3, "", FixedExit(3))
    [completion] = engine.generate(PROMPT, SAMPLING, snapshot)
    assert completion.stats.prompt_calls == 45 * LAYERS - 40 * (LAYERS - 2)
    assert completion.stats.generation == 3


def test_a_bundle_brings_a_policy_for_prompts_for_its_own_model(tmp_path: Path) -> None:
    model = make_model("llama")
    policy = RandomShare(exits=(2,), share=0.5)
    canned_NF = np.random.default_rng(0).random((40, PROMPT_V1.width), np.float32)

    def saved(
        name: str, policy: Any, features_NF: FloatArray, fingerprint: str, **facts: Any
    ) -> Path:
        made: dict[str, Any] = {"tokenizer": "bb", "training": {}, "metrics": {}, "created_at": 0.0}
        packed = pack_policy(policy, features_NF)
        bundle = PolicyBundle.draft(packed, model=fingerprint, **(made | facts))
        bundle.save(tmp_path / name)
        return tmp_path / name

    own = AdaptiveEngine(model).model_fingerprint
    prompts = PromptExits.load(saved("own", policy, canned_NF, own), keep_first=1, keep_last=4)
    config = EngineConfig(prefill="exits", prompts=prompts)
    asked = AdaptiveEngine(model, config=config).generate(PROMPT, SAMPLING)
    same = engine_of(model, policy, first=1, last=4).generate(PROMPT, SAMPLING)
    assert asked == same
    assert asked[0].stats.exact_share < 1
    other = PromptExits.load(saved("other", policy, canned_NF, "ab" * 32))
    with pytest.raises(ConfigError, match="made for model abab"):
        AdaptiveEngine(model, config=EngineConfig(prompts=other))
    mapped = PromptExits.load(saved("mapped", policy, canned_NF, own, adapters="cd" * 32))
    with pytest.raises(ConfigError, match=r"through adapters cdcd\w+, and the engine has none"):
        AdaptiveEngine(model, config=EngineConfig(prompts=mapped))
    with pytest.raises(ConfigError, match=r"prompt_policy: .* learned on a classification"):
        PromptExits.load(saved("texts", policy, canned_NF, own, training={"task": "classify"}))
    rows_NF = np.zeros((4, CANDIDATES_V1.width), np.float32)
    reads = ThresholdPolicy((2,), CANDIDATES_V1, "top1", 0.5)
    with pytest.raises(ConfigError, match="prompt_policy"):
        PromptExits.load(saved("head", reads, rows_NF, own))
