"""The map of the fill: what it computes, and where that is written.

Shape suffixes: L layers filled, N rows, D width, K values of one layer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offramp.worker import AdaptiveEngine
from offramp.worker.model.filling import exit_fill
from offramp.worker.model.filling.cache_filler import CacheFiller, ExitedToken
from offramp.worker.model.filling.kv_map import KVMap
from offramp.worker.model.kv import SlotKV
from support.exactness import check_fill
from support.fill_maps import EXIT, WIDTH, moved, reading_before, reflections
from support.models import LAYERS, make_model

ROUNDS = 96
"""Inputs in whole blocks are multiplied in 8 bits."""


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


def test_the_token_before_is_read_from_the_cache(family: str) -> None:
    engine, exit_map = AdaptiveEngine(make_model(family), slots=3), reading_before(family)
    projector, kv, stack = engine.decoder.projector, engine.kv, engine.stack
    kv.reserve(10)
    kv.values_LSGCH[EXIT] = torch.randn(kv.values_LSGCH[EXIT].shape)
    x_ND, places_2N = torch.randn(3, WIDTH), np.array([[2, 0, 1], [4, 0, 9]])
    before_NK = torch.stack(
        [kv.values_LSGCH[EXIT, slot, :, at - 1].flatten() for slot, at in places_2N.T]
    )
    before_NK[1] = 0  # of the first token of a row there is none
    assert projector is not None
    projector.fill(x_ND, EXIT, places_2N, kv, KVMap({EXIT: exit_map}))
    rotary = stack.rotary(x_ND[:, None], torch.tensor([[4], [0], [9]]))
    entries = projector.project(x_ND, EXIT, rotary, KVMap({EXIT: exit_map}), before_NK)
    weights = stack.kv_weights(EXIT)
    u_ND = x_ND - x_ND.mean(-1, keepdim=True) if weights.norm == "layer" else x_ND
    u_ND = u_ND * torch.rsqrt(u_ND.pow(2).mean(-1, keepdim=True) + weights.eps)
    for place, index in enumerate(range(EXIT, LAYERS)):
        weights = stack.kv_weights(index)
        added_ND = torch.cat((u_ND, before_NK), 1) @ exit_map.A_rI.T @ exit_map.B_LDr[place].T
        read_ND = (u_ND + added_ND + exit_map.b_LD[place]) * weights.scale_D
        read_ND = read_ND if weights.shift_D is None else read_ND + weights.shift_D
        bias_R = 0 if weights.bias_R is None else weights.bias_R
        made_NR = read_ND @ weights.weight_RD.T + bias_R
        expected_NK, found_NK = made_NR.chunk(2, 1)[1], entries[1][:, place].flatten(1)
        within = 0.03 if ROUNDS in exit_map.A_rI.shape else 1e-5
        assert (found_NK - expected_NK).norm() < within * expected_NK.norm()
        for n, (slot, at) in enumerate(places_2N.T):
            for part, ours in zip((kv.keys_LSGCH, kv.values_LSGCH), entries, strict=True):
                torch.testing.assert_close(part[index, slot, :, at], ours[n, place])


def test_neighbours_read_each_other_whatever_is_filled_together() -> None:
    engine, kv_map = (
        AdaptiveEngine(make_model("llama"), slots=1),
        KVMap({EXIT: reading_before("llama")}),
    )
    x_ND, depths = torch.randn(6, WIDTH), [EXIT, EXIT - 1, EXIT, EXIT, EXIT - 1, EXIT]
    tokens = [ExitedToken(0, n, depths[n], x_ND[n], kv_map) for n in range(6)]
    caches = []
    for groups in ([tokens], [[token] for token in tokens]):
        kv = SlotKV(engine.stack, 1)
        for group in groups:
            CacheFiller(kv, engine.decoder.projector).fill(group)
        caches.append(kv)
    assert caches[0].values_LSGCH[EXIT + 1, 0, :, :6].abs().amax((0, 2)).min() > 0
    torch.testing.assert_close(caches[0].keys_LSGCH, caches[1].keys_LSGCH)
    torch.testing.assert_close(caches[0].values_LSGCH, caches[1].values_LSGCH)


@pytest.mark.parametrize("reads_before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_that_moves_nothing_gives_the_same_bits(
    family: str, dtype: torch.dtype, reads_before: bool
) -> None:
    engine = AdaptiveEngine(make_model(family, dtype))
    exit_map = reading_before(family) if reads_before else reflections()
    projector, still = (
        engine.decoder.projector,
        exit_map._replace(
            B_LDr=torch.zeros_like(exit_map.B_LDr), b_LD=torch.zeros_like(exit_map.b_LD)
        ),
    )
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


@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("place", [[3, 4], [0, 128], [0, -1], [-1, 0]])
def test_a_place_outside_the_cache_is_refused(
    place: list[int], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exit_fill, "few_rows_of", lambda each: (each.matrix, few))
    engine = AdaptiveEngine(make_model("llama"), slots=3)
    projector = engine.decoder.projector
    assert projector is not None
    with pytest.raises(ValueError, match="3 slots of 128"):
        projector.fill(torch.randn(1, WIDTH), EXIT, np.array(place)[:, None], engine.kv)
    with pytest.raises(ValueError, match="bfloat16"):
        projector.fill(torch.randn(1, WIDTH).bfloat16(), EXIT, np.zeros((2, 1), int), engine.kv)
