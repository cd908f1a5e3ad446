"""Adapter layers in the decode loop: cache entries of their own, and full depth as it was.

Shape suffixes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.worker import AdaptiveEngine, EngineConfig, SamplingParams
from offramp.worker.decoding.schedule import Schedule
from support.models import LAYERS, make_model, save_adapters
from support.rows import RandomExit, decode

PROMPTS = [[5, 17, 33, 2, 41], [9, 8, 7], [61, 3, 3, 12, 80, 4, 44, 23]]
SAMPLING = SamplingParams(max_tokens=24, ignore_eos=True)
EXITS = (1, 3)
FAMILIES = ("llama", "qwen3", "gpt2")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    return save_adapters(family, tmp_path / "adapters", EXITS)


def adapted(family: str, folder: Path, **config: Any) -> AdaptiveEngine:
    return AdaptiveEngine(
        make_model(family), slots=3, config=EngineConfig(translators=folder, **config)
    )


@torch.inference_mode()
def read_TD(engine: AdaptiveEngine, tokens: list[int], layer: int) -> Tensor:
    """What an exit is read from, by one causal pass without a cache."""
    states = engine.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return engine.decoder.translators.apply(layer, states[layer][0])


@pytest.mark.parametrize("chunk", [2, 256])
@pytest.mark.parametrize("layer", EXITS)
def test_early_tokens_are_those_of_a_pass_without_a_cache(
    family: str, folder: Path, layer: int, chunk: int
) -> None:
    engine = adapted(family, folder, prefill_tokens=chunk)
    early = 0
    for row in decode(engine, PROMPTS, SAMPLING, FixedExit(layer), "defer"):
        fed = [*row.request.prompt, *row.emitted]
        logits_TV = engine.stack.logits(read_TD(engine, fed, layer))
        for n, (token, depth) in enumerate(zip(row.emitted, row.exit_layers, strict=True)):
            if depth == layer:
                early += 1
                at = len(row.request.prompt) + n - 1
                assert logits_TV[at].max() - logits_TV[at, token] < 1e-3
    assert early > len(PROMPTS) * 10


@pytest.mark.parametrize("holds", [(), (2,)])
def test_verified_tokens_are_full_depths_in_batches_and_cohorts(
    family: str, folder: Path, holds: tuple[int, ...]
) -> None:
    plain = [c.token_ids for c in AdaptiveEngine(make_model(family)).generate(PROMPTS, SAMPLING)]
    engine = adapted(family, folder, schedule=Schedule(holds=holds))
    for seed in range(3):
        rows = decode(engine, PROMPTS, SAMPLING, RandomExit(0.5, seed, EXITS), "verify")
        assert [row.emitted for row in rows] == plain
        assert sum(row.drafts_made for row in rows) > 0


def test_verifying_leaves_the_entries_of_one_pass(family: str, folder: Path) -> None:
    drafting, reading = (adapted(family, folder) for _ in range(2))
    drafting.submit(PROMPTS[0], SAMPLING, RandomExit(0.5, 1, EXITS), kv_mode="verify")
    emitted: list[int] = []
    while len(emitted) < 16:
        emitted += [event.token for event in drafting.step()]
    text = [*PROMPTS[0], *emitted[:-1]]
    reading.submit(text, SamplingParams(max_tokens=2), RandomExit(0.5, 1, EXITS), kv_mode="verify")
    reading.step()
    for found, expected in (
        (drafting.kv.keys_LSGCH, reading.kv.keys_LSGCH),
        (drafting.kv.values_LSGCH, reading.kv.values_LSGCH),
    ):
        assert len(found) == LAYERS + len(EXITS)
        where = (slice(None), 0, slice(None), slice(len(text)))
        torch.testing.assert_close(found[where], expected[where], atol=1e-4, rtol=1e-4)


def test_full_depth_is_untouched_and_pays_nothing(family: str, folder: Path) -> None:
    plain, engine = AdaptiveEngine(make_model(family)), adapted(family, folder)
    rows = [decode(each, PROMPTS, SAMPLING, NeverExit())[0] for each in (plain, engine)]
    assert rows[0].emitted == rows[1].emitted
    assert rows[0].layer_calls == rows[1].layer_calls


def test_an_adapter_is_counted_as_a_layer(family: str, folder: Path) -> None:
    engine = adapted(family, folder)
    [row] = decode(engine, PROMPTS[:1], SAMPLING, FixedExit(3), "defer")
    tokens = len(row.emitted) - 1  # the first comes with the prompt
    finished = tokens - len(row.open)
    assert row.layer_calls == tokens * (3 + 1) + finished * (LAYERS - 3)


def test_project_is_refused_where_entries_would_be_missing(tmp_path: Path) -> None:
    engine = adapted("llama", save_adapters("llama", tmp_path / "adapters", EXITS))
    with pytest.raises(RequestError, match="adapter layer after 3"):
        engine.submit(PROMPTS[0], SAMPLING, RandomExit(0.5, 0, EXITS), kv_mode="project")
    [row] = decode(engine, PROMPTS[:1], SAMPLING, FixedExit(3), "project")
    assert set(row.exit_layers[1:]) == {3}


def test_adapters_of_another_model_or_shape_are_refused(tmp_path: Path) -> None:
    folder = save_adapters("llama", tmp_path / "adapters", EXITS)
    with pytest.raises(ConfigError, match="fitted to the model"):
        adapted("qwen2", folder)
    (folder / "translators.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="no readable"):
        adapted("llama", folder)
