"""The map of the fill: what it computes, what it leaves as it was, its folder, its place.

Shape suffixes: L layers filled, N rows, D width, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS
from offramp.controller.adapters.adapter_index import AdapterSource
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, EngineConfig, PromptExits, SamplingParams
from offramp.worker.decoding.request import PolicySnapshot
from offramp.worker.model.filling.kv_map import ExitMap, KVMap
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.translators import FILL, save_exits
from support.exactness import check_fill
from support.models import LAYERS, make_model, save_adapters
from support.rows import RandomExit, ReplayedExits, decode, drain

PROMPTS = [[5, 17, 33, 2, 41], [9, 8, 7], [61, 3, 3, 12, 80, 4, 44, 23]]
SAMPLING = SamplingParams(max_tokens=30, ignore_eos=True)
EXIT = 2
WIDTH = 48


def reflections(seed: int = 0, first: int = EXIT) -> ExitMap:
    """Mirror each layer's input in a plane of its own: no norm can tell that from another state."""
    normals_LD = torch.randn(LAYERS - first, WIDTH, generator=torch.Generator().manual_seed(seed))
    normals_LD -= normals_LD.mean(-1, keepdim=True)
    normals_LD /= normals_LD.norm(dim=-1, keepdim=True)
    B_LDr = torch.diag_embed(torch.ones(LAYERS - first))[:, None] * normals_LD[:, :, None]
    return ExitMap(-2 * normals_LD, B_LDr, torch.zeros(LAYERS - first, WIDTH))


def moved(exit_map: ExitMap, place: int, x_ND: Tensor) -> Tensor:
    return x_ND + x_ND @ exit_map.A_rD.T @ exit_map.B_LDr[place].T + exit_map.b_LD[place]


def save(folder: Path, family: str, exit_map: ExitMap | None = None) -> Path:
    """A folder as ``offramp tune --kv`` writes it, for ``make_model(family)``."""
    facts = {"kind": FILL, "exits": [EXIT]}
    facts["model"] = AdaptiveEngine(make_model(family)).model_fingerprint
    save_exits(folder, KVMap({EXIT: exit_map or reflections()}).tensors(), facts)
    return folder


def engine_of(family: str, folder: Path | None = None, **config: Any) -> AdaptiveEngine:
    settings = EngineConfig(translators=folder, **config)
    return AdaptiveEngine(make_model(family), slots=3, config=settings)


def leaving() -> ReplayedExits:
    depths = [LAYERS, *[EXIT, LAYERS, EXIT] * 10]
    return ReplayedExits(depths, (EXIT,), asked=iter((EXIT,)))


def test_the_fill_is_each_layers_own_projections_of_the_mapped_state(family: str) -> None:
    engine, exit_map = AdaptiveEngine(make_model(family)), reflections()
    check_fill(engine, EXIT, KVMap({EXIT: exit_map}), lambda *of: moved(exit_map, *of))
    with pytest.raises(AssertionError):  # negative control
        check_fill(engine, EXIT, KVMap({EXIT: exit_map}))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_shift_goes_through_norm_weight_and_matrix(family: str) -> None:
    engine, plain = AdaptiveEngine(make_model(family)), reflections()
    b_LD = torch.randn(LAYERS - EXIT, WIDTH, generator=torch.Generator().manual_seed(1))
    x_ND, projector = torch.randn(3, WIDTH), engine.decoder.projector
    rotary = engine.stack.rotary(x_ND[:, None], torch.tensor([[4], [0], [9]]))
    assert projector is not None
    maps = (KVMap({EXIT: plain}), KVMap({EXIT: plain._replace(b_LD=b_LD)}))
    before, after = (projector.project(x_ND, EXIT, rotary, each)[1] for each in maps)
    for place in range(LAYERS - EXIT):
        weights = engine.stack.kv_weights(EXIT + place)
        values_RD = weights.weight_RD[len(weights.weight_RD) // 2 :]
        added = (values_RD @ (weights.scale_D * b_LD[place])).view(before.shape[2:])
        torch.testing.assert_close(after[:, place], before[:, place] + added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_that_moves_nothing_gives_the_same_bits(family: str, dtype: torch.dtype) -> None:
    engine = AdaptiveEngine(make_model(family, dtype))
    projector, still = engine.decoder.projector, ExitMap(*map(torch.zeros_like, reflections()))
    assert projector is not None
    for rows in (1, 3):
        x_ND = torch.randn(rows, WIDTH, dtype=dtype)
        rotary = engine.stack.rotary(x_ND[:, None], torch.arange(rows)[:, None])
        for layer, mapped in ((EXIT, KVMap({EXIT: still})), (EXIT + 1, KVMap({EXIT: still}))):
            found = projector.project(x_ND, layer, rotary, mapped)
            assert all(map(torch.equal, found, projector.project(x_ND, layer, rotary)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_what_is_projected(family: str, dtype: torch.dtype) -> None:
    """All of a cache that has grown: what is not to be written stays as it was, too."""
    engine = AdaptiveEngine(make_model(family, dtype), slots=3)
    projector, kv_map = engine.decoder.projector, KVMap({EXIT: reflections()})
    assert projector is not None
    for rows in (1, 3, 64):
        x_ND = torch.randn(rows, WIDTH, dtype=dtype)
        places_2N = np.array([np.arange(rows) % 3, 150 - np.arange(rows)])
        slots_N, positions_N = torch.tensor(places_2N)
        rotary = engine.stack.rotary(x_ND[:, None], positions_N[:, None])
        written, expected = SlotKV(engine.stack, 3), SlotKV(engine.stack, 3)
        for kv in (written, expected):
            kv.reserve(200)
            kv.make_room(LAYERS + 1)
        projector.fill(x_ND, EXIT, places_2N, written, kv_map)
        entries = projector.project(x_ND, EXIT, rotary, kv_map)
        expected.fill(EXIT, slots_N, positions_N, *entries)
        torch.testing.assert_close(written.keys_LSGCH, expected.keys_LSGCH)
        assert torch.equal(written.values_LSGCH, expected.values_LSGCH)


@pytest.mark.parametrize("place", [[3, 4], [0, 128], [0, -1], [-1, 0]])
def test_a_place_outside_the_cache_is_refused(place: list[int]) -> None:
    engine = AdaptiveEngine(make_model("llama"), slots=3)
    projector = engine.decoder.projector
    assert projector is not None
    with pytest.raises(ValueError, match="3 slots of 128"):
        projector.fill(torch.randn(1, WIDTH), EXIT, np.array(place)[:, None], engine.kv)
    with pytest.raises(ValueError, match="bfloat16"):
        projector.fill(torch.randn(1, WIDTH).bfloat16(), EXIT, np.zeros((2, 1), int), engine.kv)


def test_decoding_fills_through_the_map(tmp_path: Path) -> None:
    exit_map = reflections()
    engine = engine_of("llama", save(tmp_path, "llama"))
    request = engine.submit(PROMPTS[0], SAMPLING, FixedExit(EXIT), kv_mode="project")
    emitted: list[int] = []
    while len(emitted) < 20:
        emitted += [event.token for event in engine.step()]
    text, begun = [*request.prompt, *emitted], len(request.prompt)
    states = engine.model(torch.tensor([text]), output_hidden_states=True).hidden_states
    x_ND = states[EXIT][0][begun : begun + 16]  # as many are filled at once
    for place, index in enumerate(range(EXIT, LAYERS)):
        weights = engine.stack.kv_weights(index)
        unit_ND = x_ND * torch.rsqrt(x_ND.pow(2).mean(-1, keepdim=True) + weights.eps)
        values_RD = weights.weight_RD[len(weights.weight_RD) // 2 :]
        expected = (moved(exit_map, place, unit_ND) * weights.scale_D) @ values_RD.T
        found = engine.kv.values_LSGCH[index, 0, :, begun : begun + 16].transpose(0, 1).flatten(1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_rows_are_filled_each_through_its_own(tmp_path: Path) -> None:
    folders = [save(tmp_path / "a", "llama"), save(tmp_path / "b", "llama", reflections(1)), None]
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
    engines = engine_of("llama"), engine_of("llama", save(tmp_path, "llama"))
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
        assert torch.equal(adapters.kv_map.by_exit[EXIT].A_rD, reflections().A_rD)
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
        (change(f"kv.{EXIT}.B", torch.zeros(2, WIDTH, 3)), "has shapes"),
        (change(f"kv.{EXIT}.b", torch.full((LAYERS - EXIT, WIDTH), torch.inf)), "NaN or infinite"),
        (change("2.A", torch.zeros(1, WIDTH)), "2.A"),
    ],
)
def test_a_damaged_map_is_refused(
    damage: Callable[[dict[str, Tensor]], object], said: str, tmp_path: Path
) -> None:
    folder = save(tmp_path, "llama")
    tensors = load_file(folder / WEIGHTS)
    damage(tensors)
    save_exits(folder, tensors, json.loads((folder / DESCRIPTION).read_text()))
    with pytest.raises(ConfigError) as refused:
        engine_of("llama", folder)
    assert refused.value.field == "translators"
    assert said in refused.value.problem


def test_another_models_map_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was fitted to the model"):
        engine_of("llama", save(tmp_path, "qwen2"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_tokens_of_a_prompt_are_filled_through_it_as_decoded_ones_are(
    family: str, tmp_path: Path
) -> None:
    folder, prompt = save(tmp_path, family), [*PROMPTS[2], *PROMPTS[0]]
    leaving = PromptExits(policy=FixedExit(EXIT), keep_first=1, keep_last=4)
    asked = engine_of(family, folder, prefill="exits", prompts=leaving)
    asked.submit(prompt, SAMPLING)
    while not asked.step():
        pass
    fed = engine_of(family, folder)
    depths = [LAYERS, *[EXIT] * (len(prompt) - 5), *[LAYERS] * 4]
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
