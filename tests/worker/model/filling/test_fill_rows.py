"""The compiled call that fills: the bits of one thread, and what the products give one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from offramp.worker import AdaptiveEngine
from offramp.worker.model.families import adapter
from offramp.worker.model.filling import exit_fill
from offramp.worker.model.filling.kv_map import UNMAPPED, KVMap
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.model.kernels import fill_rows
from offramp.worker.model.kernels.fill_rows import FillJob
from offramp.worker.model.kernels.matrix import KernelMatrix
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.prepared import PackedWeight
from offramp.worker.model.products import Product
from offramp.worker.model.quantised import QuantisedLinear
from support.fill_maps import EXIT, reading_before
from support.kernels import LEAN, needs_packing, numbers
from support.models import make_model

WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 416}
"""Whole blocks of inputs, so that a map's product is in 8 bits."""

PLACES_2N = np.array([[2, 0, 1, 1], [4, 0, 9, 10]])


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def filled(projector: KVProjector, engine: AdaptiveEngine, kv_map: KVMap) -> SlotKV:
    kv = SlotKV(engine.stack, 3)
    kv.values_LSGCH.copy_(numbers(*kv.values_LSGCH.shape, seed=3))
    x_ND = numbers(4, engine.stack.width).to(engine.stack.dtype)
    projector.fill(x_ND, EXIT, PLACES_2N, kv, kv_map)
    return kv


def assert_same(ours: SlotKV, theirs: SlotKV, within: float = 0.0) -> None:
    for part in ("keys_LSGCH", "values_LSGCH"):
        found, expected = getattr(ours, part), getattr(theirs, part)
        torch.testing.assert_close(found, expected, atol=within, rtol=within)


@needs_packing
@pytest.mark.parametrize("reads_before", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*LEAN, "phi3", "gpt2"])
@torch.inference_mode()
def test_one_call_fills_as_the_products_do_one_by_one(
    family: str, dtype: torch.dtype, reads_before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WIDE if family in LEAN else {}
    engine = AdaptiveEngine(make_model(family, dtype, **config))
    kv_map = KVMap({EXIT: reading_before(family, **config)}) if reads_before else UNMAPPED
    monkeypatch.setattr(fill_rows, "ALONE_BELOW", 0)
    monkeypatch.setattr(exit_fill, "few_rows_of", always)
    jobs = noted(monkeypatch)
    caches = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        caches.append(filled(KVProjector(engine.stack), engine, kv_map))
    assert len(jobs) == 3
    assert_same(caches[1], caches[0])
    assert_same(caches[2], caches[0])
    monkeypatch.setattr(exit_fill, "few_rows_of", lambda _: (None, 0))
    many = filled(KVProjector(engine.stack), engine, kv_map)
    assert len(jobs) == 3
    assert_same(caches[0], many, 1e-4 if dtype is torch.float32 else 0.05)


def noted(monkeypatch: pytest.MonkeyPatch) -> list[FillJob]:
    """The jobs that are run from here on."""
    jobs: list[FillJob] = []
    run = FillJob.run

    def note(job: FillJob, *given: Any) -> None:
        jobs.append(job)
        run(job, *given)

    monkeypatch.setattr(FillJob, "run", note)
    return jobs


def always(product: Product) -> tuple[KernelMatrix | None, int]:
    assert isinstance(product, PackedWeight | QuantisedLinear)
    return product.matrix, 64


@needs_packing
@torch.inference_mode()
def test_angles_that_no_table_holds_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = noted(monkeypatch)
    monkeypatch.setattr(exit_fill, "few_rows_of", always)
    kv_map, caches = KVMap({EXIT: reading_before("llama", **WIDE)}), []
    for most in (adapter.TABLE_BYTES, 0):
        monkeypatch.setattr(adapter, "TABLE_BYTES", most)
        engine = AdaptiveEngine(make_model("llama", **WIDE))
        caches.append(filled(KVProjector(engine.stack), engine, kv_map))
    assert len(jobs) == 1
    assert_same(caches[0], caches[1], 1e-4)


@needs_packing
@torch.inference_mode()
def test_a_cache_that_has_grown_is_written_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_fill, "few_rows_of", always)
    engine = AdaptiveEngine(make_model("llama", **WIDE), slots=3)
    projector, kv_map = KVProjector(engine.stack), KVMap({EXIT: reading_before("llama", **WIDE)})
    x_ND, kv = numbers(4, engine.stack.width), SlotKV(engine.stack, 3)
    projector.fill(x_ND, EXIT, PLACES_2N, kv, kv_map)
    kv.reserve(200)
    kv.make_room(engine.stack.layers + 2)
    again = SlotKV(engine.stack, 3)
    again.reserve(200)
    again.make_room(engine.stack.layers + 2)
    later_2N = PLACES_2N + np.array([[0], [150]])
    for each in (kv, again):
        projector.fill(x_ND, EXIT, later_2N, each, kv_map)
    for part in ("keys_LSGCH", "values_LSGCH"):
        found, expected = (getattr(each, part)[..., 140:, :] for each in (kv, again))
        assert torch.equal(found, expected)
        assert found.any()


@needs_packing
@torch.inference_mode()
def test_what_there_is_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_fill, "few_rows_of", lambda each: (always(each)[0], 2))
    engine = AdaptiveEngine(make_model("llama", **WIDE), slots=3)
    jobs = noted(monkeypatch)
    projector, x_ND = KVProjector(engine.stack), numbers(3, engine.stack.width)
    projector.fill(x_ND[:2], EXIT, PLACES_2N[:, :2], engine.kv, UNMAPPED)
    beyond_2N = PLACES_2N[:, :2] + np.array([[0], [engine.stack.context]])
    engine.kv.reserve(engine.stack.context + 20)
    with pytest.raises(ValueError, match="3 slots"):
        projector.fill(x_ND[:2], EXIT, beyond_2N, engine.kv, UNMAPPED)
    with pytest.raises(ValueError, match="places"):
        jobs[0].run(x_ND, np.ascontiguousarray(PLACES_2N[:, :3]))
