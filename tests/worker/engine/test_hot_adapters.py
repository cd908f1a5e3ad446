"""Adapters that join a running engine: each request is read through its own, and none is torn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.policies.protocols import FixedExit, NeverExit, Policy
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.decoding.request import KVMode, PolicySnapshot
from offramp.worker.model.adapter_layers import ExitAdapters
from offramp.worker.model.translators import ExitTranslators, Translator
from support.models import LAYERS, SHAPE, make_model, save_adapters

PROMPTS = [[5, 17, 33, 2, 41], [9, 8, 7], [61, 3, 3, 12, 80, 4, 44, 23]]
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2)
EXITS = (1, 3)


def under(policy: Policy, adapters: ExitAdapters | None) -> PolicySnapshot:
    return PolicySnapshot(1, "", policy, adapters=adapters)


def engine_of(family: str, folder: Path | None = None) -> AdaptiveEngine:
    config = EngineConfig(kv_mode="defer", translators=folder)
    return AdaptiveEngine(make_model(family), slots=3, config=config)


def alone(family: str, folder: Path | None, prompt: list[int], policy: Policy) -> list[int]:
    """The tokens of a request on an engine that was started with the adapters."""
    return engine_of(family, folder).generate(prompt, SAMPLING, policy)[0].token_ids


@dataclass
class Running:
    """An engine under way, and the tokens of each of its requests."""

    engine: AdaptiveEngine
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def begin(self, prompt: list[int], snapshot: PolicySnapshot, mode: KVMode = "defer") -> str:
        request = self.engine.submit(prompt, SAMPLING, snapshot, kv_mode=mode)
        self.tokens[request.id] = []
        return request.id

    def step(self, times: int) -> None:
        for _ in range(times):
            for event in self.engine.step():
                self.tokens[event.request_id].append(event.token)

    def end(self) -> None:
        while self.engine.load != (0, 0):
            self.step(1)
        assert not self.engine.failed


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["defer", "verify"])
def test_a_swap_in_mid_run_changes_no_token_of_any_request(
    family: str, mode: KVMode, tmp_path: Path
) -> None:
    old, new = (save_adapters(family, tmp_path / str(n), EXITS, seed=n) for n in (3, 4))
    running = Running(engine_of(family))
    engine = running.engine
    first = running.begin(PROMPTS[0], under(FixedExit(3), engine.take_in(old)), mode)
    running.step(6)
    second = running.begin(PROMPTS[1], under(FixedExit(3), engine.take_in(new)), mode)
    third = running.begin(PROMPTS[2], under(FixedExit(3), None), mode)
    running.end()
    asked = FixedExit(3) if mode == "defer" else NeverExit()
    for request, folder, prompt in zip(
        (first, second, third), (old, new, None), PROMPTS, strict=True
    ):
        assert running.tokens[request] == alone(family, folder, prompt, asked)
    assert running.tokens[first] != alone(family, new, PROMPTS[0], asked) or mode == "verify"
    assert len(engine.kv.keys_LSGCH) == LAYERS + 2 * len(EXITS)


def test_full_depth_is_the_same_bits_after_a_swap(tmp_path: Path) -> None:
    engine = engine_of("llama")
    before = engine.generate(PROMPTS, SAMPLING)
    adapters = engine.take_in(save_adapters("llama", tmp_path / "new", EXITS))
    engine.generate(PROMPTS, SAMPLING, under(FixedExit(1), adapters))
    after = engine.generate(PROMPTS, SAMPLING)
    assert [each.token_ids for each in before] == [each.token_ids for each in after]
    assert [each.logprobs for each in before] == [each.logprobs for each in after]
    assert [each.stats.layer_calls for each in before] == [each.stats.layer_calls for each in after]


def test_translators_and_layers_are_read_side_by_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    width = SHAPE["hidden_size"]
    parts = torch.randn(4, width), torch.randn(width, 4), torch.randn(width)
    running = Running(engine_of("llama"))
    engine = running.engine
    facts = {"model": engine.model_fingerprint}
    ExitTranslators({1: Translator(*parts)}).save(tmp_path / "low rank", facts)
    folders = (tmp_path / "low rank", save_adapters("llama", tmp_path / "layers", (1,)), None)
    begun = [
        running.begin(prompt, under(FixedExit(1), engine.take_in(folder) if folder else None))
        for prompt, folder in zip(PROMPTS, folders, strict=True)
    ]
    running.end()
    found = [running.tokens[request] for request in begun]
    assert found == [
        alone("llama", folder, prompt, FixedExit(1))
        for prompt, folder in zip(PROMPTS, folders, strict=True)
    ]


def test_a_set_that_nobody_names_any_more_leaves_its_places(tmp_path: Path) -> None:
    folders = [save_adapters("llama", tmp_path / str(seed), EXITS, seed) for seed in (3, 4, 5)]
    engine = engine_of("llama", folders[0])
    assert engine.take_in(folders[0]) is engine.decoder.translators
    for folder in (*folders[1:], folders[1]):
        adapters: ExitAdapters | None = engine.take_in(folder)
        assert engine.take_in(folder) is adapters
        [found] = engine.generate(PROMPTS[0], SAMPLING, under(FixedExit(3), adapters))
        assert found.token_ids == alone("llama", folder, PROMPTS[0], FixedExit(3))
        adapters = None
    assert len(engine.stack.blocks) == LAYERS + 2 * len(EXITS)


def test_what_cannot_join_leaves_the_engine_as_it_was(tmp_path: Path) -> None:
    engine = engine_of("llama")
    foreign = save_adapters("qwen3", tmp_path / "foreign", EXITS)
    with pytest.raises(ConfigError, match="was fitted to the model"):
        engine.take_in(foreign)
    right = save_adapters("llama", tmp_path / "right", EXITS)
    (right / "translators.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="no readable"):
        engine.take_in(right)
    least = engine.kv.bytes_per_token * engine.kv.capacity / 2**20
    config = EngineConfig(kv_mode="defer", kv_budget_mb=1.1 * least)
    tight = AdaptiveEngine(make_model("llama"), slots=3, config=config)
    with pytest.raises(ConfigError, match="kv_budget_mb"):
        tight.take_in(save_adapters("llama", tmp_path / "right", EXITS))
    assert len(engine.stack.blocks) == len(tight.stack.blocks) == LAYERS


def test_a_policy_that_does_not_go_with_the_cache_mode_is_refused_at_the_swap(
    tmp_path: Path,
) -> None:
    engine = AdaptiveEngine(make_model("llama"))  # project
    adapters = engine.take_in(save_adapters("llama", tmp_path / "new", (3,)))
    engine.prepare(FixedExit(3), adapters)

    class Two(FixedExit):
        exits = (1, 3)

    with pytest.raises(RequestError, match="project leaves the adapter layer"):
        engine.prepare(Two(3), adapters)
