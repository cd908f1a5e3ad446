"""Decoding through a map of the fill, and folders that hold one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS
from offramp.controller.adapters.adapter_index import AdapterSource
from offramp.controller.errors import ConfigError
from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import PromptExits
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.model.filling.kv_map import KVMap
from offramp.worker.model.translators import save_exits
from support.fill_maps import (
    EXIT,
    KEPT,
    PROMPTS,
    SAMPLING,
    WIDTH,
    engine_of,
    leaving,
    reading_before,
    reflections,
    save_map,
)
from support.models import LAYERS, save_adapters
from support.rows import RandomExit, ReplayedExits, decode, drain


@pytest.mark.parametrize("reads_before", [False, True])
def test_decoding_fills_through_the_map(reads_before: bool, tmp_path: Path) -> None:
    exit_map = reading_before("llama") if reads_before else reflections()
    engine = engine_of("llama", save_map(tmp_path, "llama", exit_map))
    request = engine.submit(PROMPTS[0], SAMPLING, FixedExit(EXIT), kv_mode="project")
    emitted: list[int] = []
    while len(emitted) < 20:
        emitted += [event.token for event in engine.step()]
    text, begun = [*request.prompt, *emitted], len(request.prompt)
    states = engine.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    x_ND = states[EXIT][0][begun - 1 : begun + 16]  # as many are filled at once
    x_ND = x_ND * torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + engine.stack.kv_weights(0).eps)
    unit_ND, before_ND = x_ND[1:], x_ND[:-1]
    for place, index in enumerate(range(EXIT, LAYERS)):
        weights = engine.stack.kv_weights(index)
        values_RD = weights.weight_RD[len(weights.weight_RD) // 2 :]
        if not place:
            before_NK = (before_ND * weights.scale_D) @ values_RD.T
        inputs_NI = torch.cat((unit_ND, before_NK), 1) if reads_before else unit_ND
        moved_ND = inputs_NI @ exit_map.A_rI.T @ exit_map.B_LDr[place].T + exit_map.b_LD[place]
        expected = ((unit_ND + moved_ND) * weights.scale_D) @ values_RD.T
        found = engine.kv.values_LSGCH[index, 0, :, begun : begun + 16].transpose(0, 1).flatten(1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rows_are_filled_each_through_its_own(tmp_path: Path) -> None:
    folders = [
        save_map(tmp_path / "a", "llama"),
        save_map(tmp_path / "b", "llama", reflections(1)),
        None,
    ]
    engine = engine_of("llama", kv_mode="project")
    taken = [None if folder is None else engine.take_in(folder) for folder in folders]
    requests = []
    for prompt, adapters in zip(PROMPTS, taken, strict=True):
        snapshot = PolicySnapshot(1, "", leaving(), adapters=adapters)
        requests.append(engine.submit(prompt, SAMPLING, snapshot))
    together = [row.emitted for row in drain(engine, requests)]
    alone = []
    for prompt, folder in zip(PROMPTS, folders, strict=True):
        [row] = decode(engine_of("llama", folder), [prompt], SAMPLING, leaving(), "project")
        alone.append(row.emitted)
    assert together == alone
    [row] = decode(engine_of("llama"), PROMPTS[:1], SAMPLING, leaving(), "project")
    assert row.emitted != alone[0]  # negative control


@pytest.mark.parametrize("mode", ["verify", "defer"])
def test_what_is_not_filled_is_what_it_was(mode: Any, tmp_path: Path) -> None:
    engines = engine_of("llama"), engine_of("llama", save_map(tmp_path, "llama"))
    found = [decode(each, PROMPTS, SAMPLING, RandomExit(0.5, 1), mode) for each in engines]
    assert [row.emitted for row in found[0]] == [row.emitted for row in found[1]]


def test_it_lies_beside_adapter_layers_and_travels_with_them(tmp_path: Path) -> None:
    source = save_adapters("llama", tmp_path / "layers", (EXIT,))
    facts = json.loads((source / DESCRIPTION).read_text())
    both = {**load_file(source / WEIGHTS), **KVMap({EXIT: reflections()}).tensors()}
    save_exits(tmp_path / "both", both, facts)
    sent = AdapterSource.open(tmp_path / "both").index  # what a worker puts together from parts
    save_exits(tmp_path / "fetched", both, sent.description)
    for name in ("both", "fetched"):
        adapters = engine_of("llama", tmp_path / name).decoder.translators
        assert (adapters.exits, adapters.digest) == ((EXIT,), sent.digest)
        assert list(adapters.kv_map.by_exit) == [EXIT]
        assert torch.equal(adapters.kv_map.by_exit[EXIT].A_rI, reflections().A_rI)
    late = engine_of("llama").take_in(tmp_path / "both")
    assert list(late.kv_map.by_exit) == [EXIT]


def change(name: str, value: Tensor | None) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (change(f"kv.{EXIT}.b", None), "lacks, or should not have"),
        (change("kv.3.A", torch.zeros(1, WIDTH)), "kv.3.A"),
        (change(f"kv.{EXIT}.A", torch.zeros(())), "has shapes"),
        (change(f"kv.{EXIT}.A", torch.zeros(LAYERS - EXIT, WIDTH + 1)), "has shapes"),
        (change(f"kv.{EXIT}.A", torch.zeros(LAYERS - EXIT, WIDTH, 1)), "has shapes"),
        (change(f"kv.{EXIT}.A", torch.ones(LAYERS - EXIT, WIDTH + KEPT)), "moves its first layer"),
        (change(f"kv.{EXIT}.B", torch.zeros(2, WIDTH, 3)), "has shapes"),
        (change(f"kv.{EXIT}.b", torch.full((LAYERS - EXIT, WIDTH), torch.inf)), "NaN or infinite"),
        (change(f"kv.{EXIT}.A", torch.full((LAYERS - EXIT, WIDTH), 1e38)), "norms overflow"),
        (change(f"kv.{EXIT}.b", torch.full((LAYERS - EXIT, WIDTH), 1e30)), "norms overflow"),
        (change("2.A", torch.zeros(1, WIDTH)), "2.A"),
    ],
)
def test_a_damaged_map_is_refused(
    damage: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    folder = save_map(tmp_path, "llama")
    tensors = load_file(folder / WEIGHTS)
    damage(tensors)
    save_exits(folder, tensors, json.loads((folder / DESCRIPTION).read_text()))
    with pytest.raises(ConfigError) as refused:
        engine_of("llama", folder)
    assert refused.value.field == "translators"
    assert said in refused.value.problem


def test_a_map_of_another_dtype_is_refused(tmp_path: Path) -> None:
    folder = save_map(tmp_path, "llama")
    halves = {name: each.half() for name, each in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    facts = json.loads((folder / DESCRIPTION).read_text())
    facts["digest"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="float16"):
        engine_of("llama", folder)


def test_another_models_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was fitted to the model"):
        engine_of("llama", save_map(tmp_path, "qwen2"))


class EverySecond(FixedExit):
    """Lets every second token of what it is asked about leave."""

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return np.arange(len(features_NF)) % 2 > 0


@pytest.mark.parametrize(("leaves", "together"), [(FixedExit, 5), (EverySecond, 256)])
@pytest.mark.parametrize("reads_before", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_tokens_of_a_prompt_are_filled_through_it_as_decoded_ones_are(
    family: str, reads_before: bool, leaves: type[FixedExit], together: int, tmp_path: Path
) -> None:
    exit_map = reading_before(family) if reads_before else reflections()
    folder, prompt = save_map(tmp_path, family, exit_map), [*PROMPTS[2], *PROMPTS[0]]
    leaving = PromptExits(policy=leaves(EXIT), keep_first=1, keep_last=4)
    asked = engine_of(family, folder, prefill="exits", prompts=leaving, prefill_tokens=together)
    asked.submit(prompt, SAMPLING)
    while not asked.step():
        pass
    fed = engine_of(family, folder)
    left = leaves(EXIT).leave(np.empty((len(prompt), 0), np.float32))
    left[:1], left[-4:] = False, False
    depths = np.where(left, EXIT, LAYERS).tolist()
    policy = ReplayedExits(depths, (EXIT,), asked=iter((EXIT,)))
    fed.submit(prompt[:1], policy=policy, forced=[*prompt[1:], 0, 0])
    for _ in depths:
        fed.step()
    for ours, theirs in (
        (asked.kv.keys_LSGCH, fed.kv.keys_LSGCH),
        (asked.kv.values_LSGCH, fed.kv.values_LSGCH),
    ):
        used = (slice(LAYERS), 0, slice(None), slice(len(prompt)))
        torch.testing.assert_close(ours[used], theirs[used], rtol=0, atol=1e-3)
