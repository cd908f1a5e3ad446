"""Quantised weights on a device: int4 as PyTorch's kernel reads it, all else restored.

Without a GPU the kernel's two operations are written out as PyTorch defines them, with what its
int4mm.cu checks; with one (``OFFRAMP_TEST_DEVICE``) they are the device's.

Shape suffixes: N rows, O outputs, I inputs, G groups, J = I / 2 bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.controller.policies.protocols import FixedExit
from offramp.worker import AdaptiveEngine, KVMode, SamplingParams
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.gpu import device_products
from offramp.worker.model.gpu.device_products import KERNEL_ROWS, Int4Kernel, int4_product
from offramp.worker.model.precision import Precision
from offramp.worker.model.quantised import Int4Weight
from support.models import DEVICE, FAMILIES, make_model
from support.pretended import Crossings, pretend
from support.rows import RAGGED, decode

INT4 = Precision(weights="int4")
INT8 = Precision(weights="int8")


def pack(pairs_OJ: Tensor, tiles: int) -> Tensor:
    torch.ops.aten._convert_weight_to_int4pack(pairs_OJ.to("meta"), tiles)  # checks its type
    assert pairs_OJ.is_contiguous()
    assert pairs_OJ.shape[1] % (8 * tiles) == 0
    return pairs_OJ


def multiply(x_NI: Tensor, pairs_OJ: Tensor, group_size: int, scales_GO2: Tensor) -> Tensor:
    """v = (q - 8) · scale + zero, sums in float32."""
    assert x_NI.dtype == scales_GO2.dtype == torch.bfloat16
    assert x_NI.is_contiguous()
    assert scales_GO2.is_contiguous()
    assert scales_GO2.shape == (x_NI.shape[1] // group_size, len(pairs_OJ), 2)
    q_OI = torch.stack((pairs_OJ >> 4, pairs_OJ & 15), dim=-1).flatten(1).float()
    scale_OI, zero_OI = (
        part_GO.T.repeat_interleave(group_size, 1).float() for part_GO in scales_GO2.unbind(-1)
    )
    weight_OI = (q_OI - 8) * scale_OI + zero_OI
    return (x_NI.float() @ weight_OI.T).to(torch.bfloat16)


@pytest.fixture
def kernel_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch, "_convert_weight_to_int4pack", pack)
        monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    monkeypatch.setattr(device_products, "fits_kernel", lambda _: True)
    device_products._say_once.cache_clear()


def weight_of(inputs: int, group_size: int) -> Int4Weight:
    torch.manual_seed(inputs)
    weight_OI = torch.randn(48, inputs).mul(0.3).to(DEVICE, torch.bfloat16)
    return Int4Weight(weight_OI, group_size)


def numbers_of(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor]:
    return weight._numbers_OI(), weight._scale_OG, weight._zero_OG


def rows_of(count: int, inputs: int) -> Tensor:
    torch.manual_seed(count)
    return torch.randn(count, inputs).to(DEVICE, torch.bfloat16)


@pytest.mark.usefixtures("kernel_ops")
@pytest.mark.parametrize(("inputs", "group_size"), [(96, 32), (64, 64), (256, 32), (768, 256)])
def test_the_kernel_is_given_what_restored_weights_are(inputs: int, group_size: int) -> None:
    weight = weight_of(inputs, group_size)
    kernel = Int4Kernel(*numbers_of(weight))
    for rows in (1, 3, 40):
        x_NI, bias_O = rows_of(rows, inputs), rows_of(1, 48)[0]
        truth = x_NI.float() @ weight.restored().float().T + bias_O.float()
        torch.testing.assert_close(kernel(x_NI, bias_O).float(), truth, rtol=0.03, atol=0.05)
    x_NTI = rows_of(6, inputs).view(2, 3, inputs)
    assert torch.equal(kernel(x_NTI, None).view(6, 48), kernel(x_NTI.view(6, inputs), None))


@pytest.mark.usefixtures("kernel_ops")
def test_few_rows_take_the_kernel_and_many_restored_weights() -> None:
    weight = weight_of(96, 32)
    restored: list[Tensor] = []

    def restore() -> Tensor:
        restored.append(weight.restored())
        return restored[-1]

    product = int4_product(lambda: numbers_of(weight), restore)
    restored.clear()
    few, many = (rows_of(rows, 96) for rows in (KERNEL_ROWS, KERNEL_ROWS + 1))
    product(few, None)
    assert not restored
    torch.testing.assert_close(product(many, None), many @ restored[0].T)
    assert len(restored) == 1


def swap_neighbours(pairs_OJ: Tensor, _: int) -> Tensor:
    return (pairs_OJ << 4) | (pairs_OJ >> 4)


def raise_at_once(*_: object) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.usefixtures("kernel_ops")
@pytest.mark.parametrize(
    ("wrong", "said"), [(swap_neighbours, "errs by"), (raise_at_once, "no kernel image")]
)
def test_a_kernel_that_errs_is_not_used_and_that_is_said_once(
    wrong: Callable[..., Tensor],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", wrong)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", multiply)
    weight, x_NI = weight_of(96, 32), rows_of(3, 96)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            product = int4_product(lambda: numbers_of(weight), weight.restored)
    assert torch.equal(product(x_NI, None), x_NI @ weight.restored().T)
    [record] = caplog.records
    assert said in record.getMessage()


QUANTISED = EngineConfig(precision=INT4)
DRAFTING = EngineConfig(draft_precision=INT4)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU need not pretend")
@pytest.mark.parametrize(
    ("family", "config", "kv_mode"),
    # gpt2 keeps its matrices the other way round.
    [(family, QUANTISED, "project") for family in FAMILIES]
    + [
        (family, *each)
        for family in ("llama", "gpt2")
        for each in ((EngineConfig(precision=INT8), "project"), (DRAFTING, "verify"))
    ],
)
def test_quantised_models_decode_on_a_device_as_on_the_host(
    family: str, config: EngineConfig, kv_mode: KVMode
) -> None:
    def decoded(model: Any) -> tuple[AdaptiveEngine, list[list[int]]]:
        engine = AdaptiveEngine(model, slots=4, config=config)
        sampling = SamplingParams(max_tokens=8, ignore_eos=True)
        rows = decode(engine, RAGGED, sampling, FixedExit(2), kv_mode)
        return engine, [row.emitted for row in rows]

    def wide_model() -> Any:
        return make_model(family, hidden_size=64)

    _, expected = decoded(wide_model())
    with torch.inference_mode(), Crossings() as crossings:
        model = pretend(wide_model())
        engine, found = decoded(model)
        assert found == expected
        with crossings.watched():
            sampling = SamplingParams(max_tokens=4, ignore_eos=True)
            decode(engine, RAGGED, sampling, FixedExit(2), kv_mode)
