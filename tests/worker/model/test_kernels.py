"""Compiled kernels compute what they claim, to the bit where they claim it, and row by row alone.

Shape suffixes: N rows, I inputs, O outputs, B rows, T tokens, D width.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.model.attention import decode_window
from offramp.worker.model.families import stack_for
from offramp.worker.model.kernels import matrix as kernel_matrix
from offramp.worker.model.kernels.floats import (
    coarse_exponential,
    exponential,
    read,
    rounded_bits,
    write,
)
from offramp.worker.model.kernels.matrix import KernelMatrix, is_readable, product_into, weighted
from offramp.worker.model.kernels.multiply import BITS
from offramp.worker.model.kernels.tiles import has_tiles
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.lean import LeanLayer
from offramp.worker.model.precision import Precision
from offramp.worker.model.prepared import prepare
from offramp.worker.model.quantised import quantise
from support.kernels import (
    ALL,
    KINDS,
    LEAN,
    cache,
    matrix_of,
    needs_packing,
    numbers,
    run,
    states,
    taken,
    windows,
)
from support.models import make_model

ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (7, 96), (70, 160), (5, 1056)])
def test_a_product_is_exact_whatever_its_sizes(kind: str, outputs: int, inputs: int) -> None:
    whole_OI, matrix = matrix_of(kind, outputs, inputs)
    for rows in ROWS:
        x_NI = numbers(rows, inputs)
        truth = taken(kind, x_NI).double() @ whole_OI.T + numbers(outputs, seed=2).double()
        # int4's sums lose five bits to the ones that its kernel adds and takes away again.
        atol = 2e-3 if kind == "int4" else 2e-4
        torch.testing.assert_close(matrix.product(x_NI).double(), truth, rtol=1e-5, atol=atol)


@pytest.mark.skipif(not has_tiles(), reason="this processor has no tiles of bfloat16")
@pytest.mark.parametrize("outputs", [16, 31, 32, 47, 70])
@pytest.mark.parametrize("inputs", [32, 96, 1056])
def test_tiles_sum_exactly_whatever_their_sizes(outputs: int, inputs: int) -> None:
    weight_OI = numbers(outputs, inputs, seed=1).bfloat16()
    matrix = KernelMatrix(weight_OI).described
    for rows in (1, 2, 7, 16, 17, 33):
        x_NI = numbers(rows, inputs).bfloat16()
        y_NO = np.full((rows, outputs), np.nan, np.float32)
        x_and_packed = weighted(matrix, x_NI.float().numpy())
        product_into(matrix, *x_and_packed, y_NO)
        truth = x_NI.double() @ weight_OI.double().T
        torch.testing.assert_close(torch.from_numpy(y_NO).double(), truth, rtol=1e-5, atol=2e-4)


def test_vectors_and_tiles_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines without tiles run the same layers: to the rounding of a sum, the same numbers."""
    weight_OI, x_NI = numbers(96, 320, seed=1).bfloat16(), numbers(5, 320).bfloat16()
    first = KernelMatrix(weight_OI).product(x_NI)
    monkeypatch.setattr(kernel_matrix, "has_tiles", lambda: False)
    vectors = KernelMatrix(weight_OI)
    assert vectors.described[kernel_matrix.KIND] == BITS
    torch.testing.assert_close(vectors.product(x_NI), first, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("kind", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("inputs", [1, 15, 17, 31, 33, 79])
def test_inputs_that_fill_no_vector_count_too(kind: str, inputs: int) -> None:
    whole_OI, matrix = matrix_of(kind, 6, inputs)
    for rows in (3, 7):
        x_NI = numbers(rows, inputs)
        truth = x_NI.double() @ whole_OI.T + numbers(6, seed=2).double()
        torch.testing.assert_close(matrix.product(x_NI).double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_depend_on_that_row_alone(kind: str, dtype: torch.dtype) -> None:
    _, matrix = matrix_of(kind, 70, 160)
    if dtype is torch.bfloat16 and kind != "bfloat16":
        matrix.described[-1] = 0  # these biases are float32
    x_NI = numbers(max(ROWS), 160).to(dtype)
    alone = torch.cat([matrix.product(row_I[None]) for row_I in x_NI])
    for rows in ROWS:
        assert torch.equal(matrix.product(x_NI[:rows]), alone[:rows])


def test_a_view_whose_rows_lie_apart_is_read_where_it_lies() -> None:
    whole_OI = numbers(12, 64)
    part_OI = whole_OI[::2, 16:48]
    x_NI = numbers(2, 32)
    torch.testing.assert_close(KernelMatrix(part_OI).product(x_NI), x_NI @ part_OI.T)
    assert is_readable(part_OI)
    assert not is_readable(whole_OI.T)
    assert not is_readable(whole_OI.half())


def test_rounding_is_pytorchs_for_every_kind_of_number() -> None:
    special = [0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan"), 3.3895e38, 1e-40, -1e-45]
    ties = torch.arange(0x3F800000, 0x3F800000 + (1 << 18), 0x4000, dtype=torch.int32)
    values = torch.cat([torch.tensor(special), ties.view(torch.float32), numbers(4096) * 1e3])
    ours = torch.tensor([int(rounded_bits(value)) for value in values.numpy()], dtype=torch.int32)
    theirs = values.to(torch.bfloat16)
    assert torch.equal(ours[:5], theirs.view(torch.int16).int()[:5] & 0xFFFF)
    back = (ours << 16).view(torch.float32)
    torch.testing.assert_close(back, theirs.float(), rtol=0, atol=0, equal_nan=True)
    kept = np.zeros(len(values), np.uint16)
    write(values.numpy(), True, kept.ctypes.data)
    assert np.array_equal(kept, ours.numpy().astype(np.uint16))
    again = np.zeros(len(values), np.float32)
    read(kept.ctypes.data, True, again)
    assert np.array_equal(again, back.numpy(), equal_nan=True)


def test_exponentials_are_as_near_as_they_say() -> None:
    x = np.linspace(-86, 86, 20_001, dtype=np.float32)
    ours = np.array([exponential(value) for value in x])
    assert np.abs(ours / np.exp(x.astype(np.float64)) - 1).max() < 2 * 2**-23
    below = x[x <= 0]
    coarse = np.array([coarse_exponential(value) for value in below])
    assert np.abs(coarse / np.exp(below.astype(np.float64)) - 1).max() < 2**-10
    for function in (exponential, coarse_exponential):
        assert np.isnan(function(np.float32(np.nan)))
        assert function(np.float32(-np.inf)) < 1e-37


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAN)
@torch.inference_mode()
def test_a_compiled_layer_computes_its_layer(name: str, dtype: torch.dtype) -> None:
    """In bfloat16 to the bit, but where a sum of float32 lies at the edge between two numbers.

    Behind a mask PyTorch's attention rounds some weights by the longest row, and ours by each own.
    """
    stack = prepare(stack_for(make_model(name, dtype)))
    assert all(isinstance(layer, LeanLayer) and layer.form for layer in stack.blocks)
    for x_BTD, window in windows(stack, dtype):
        (ours, mine), (theirs, others) = (run(stack, x_BTD, window, rows) for rows in (ALL, 0))
        share = 1e-5 if dtype is torch.float32 else 0.03
        for one, other in (
            (ours, theirs),
            (mine.keys_LSGCH, others.keys_LSGCH),
            (mine.values_LSGCH, others.values_LSGCH),
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=share * float(other.abs().max()))
        if dtype is torch.bfloat16 and all(r.later is None and not r.causal for r in window.runs):
            assert float((ours == theirs).float().mean()) > 0.99


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_tokens_bits_depend_on_its_row_alone(dtype: torch.dtype) -> None:
    stack = prepare(stack_for(make_model("qwen3", dtype)))
    slots, positions = [0, 1, 3], [40, 6, 18]
    x_BTD = states(stack, 3, 1, dtype)
    together, _ = run(stack, x_BTD, decode_window(slots, positions, 2, x_BTD), ALL)
    for n, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        one_1TD = x_BTD[n : n + 1]
        window = decode_window([slot], [position], 2, one_1TD)
        assert torch.equal(run(stack, one_1TD, window, ALL)[0], together[n : n + 1])


@needs_packing
@torch.inference_mode()
def test_a_long_rows_attention_is_pytorchs() -> None:
    """Beyond what it takes at once, weights are brought to a common scale."""
    stack = prepare(stack_for(make_model("llama", torch.bfloat16, max_position_embeddings=2048)))
    kv = SlotKV(stack, 1)
    kv.reserve(1300)
    kv.keys_LSGCH.copy_(numbers(*kv.keys_LSGCH.shape, seed=3) * 4)
    kv.values_LSGCH.copy_(numbers(*kv.values_LSGCH.shape, seed=4))
    x_BTD = states(stack, 1, 1, torch.bfloat16)
    for position in (511, 512, 1100, 1299):
        window = decode_window([0], [position], stack.heads_per_key, x_BTD)
        rotary = stack.rotary(x_BTD, window.positions_BT)
        kv.open(window)
        out = []
        for rows in (ALL, 0):
            first: Any = stack.blocks[0]
            first.compiled_rows = rows
            out.append(stack.run_layer(0, x_BTD, rotary, window, kv))
        torch.testing.assert_close(out[0], out[1], rtol=0.02, atol=0.02)
        assert float((out[0] == out[1]).float().mean()) > 0.9


@needs_packing
@torch.inference_mode()
def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    stack = prepare(stack_for(make_model("llama")))
    x_BTD = states(stack, 3, 1, torch.float32)
    window = decode_window([0, 1, 2], [4, 4, 4], stack.heads_per_key, x_BTD)
    clean, _ = run(stack, x_BTD, window, ALL)
    spoilt = x_BTD.clone()
    spoilt[1] = float("nan")
    out, _ = run(stack, spoilt, window, ALL)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert out[1].isnan().all()


@needs_packing
@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        *itertools.product(("int8", "int4"), (torch.float32, torch.bfloat16)),
        ("int4/int8", torch.float32),  # a sum's last bit in bfloat16 would move whole numbers
    ],
)
@torch.inference_mode()
def test_a_compiled_layer_reads_quantised_weights(
    weights: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or a machine's load would choose whether the lean layer multiplies restored values.
    monkeypatch.setattr("offramp.worker.model.quantised.rows_up_to", lambda *_, **__: ALL)
    model = make_model("qwen2", dtype, hidden_size=64)
    stack = prepare(quantise(stack_for(model), Precision.parse(weights)))
    for x_BTD, window in windows(stack, dtype):
        ours, theirs = (run(stack, x_BTD, window, rows)[0] for rows in (ALL, 0))
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=0.03)


@needs_packing
def test_what_is_faster_is_measured_and_both_give_the_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    greedy = SamplingParams(max_tokens=12, ignore_eos=True)
    tokens = []
    for rows in (0, 16):
        monkeypatch.setattr("offramp.worker.model.prepared.rows_up_to", lambda *_, rows=rows: rows)
        engine = AdaptiveEngine(make_model("llama"))
        layers: list[Any] = list(engine.stack.blocks)
        assert {layer.compiled_rows for layer in layers} == {rows}
        tokens.append([each.token_ids for each in engine.generate([[5, 17, 33], [7]], greedy)])
    assert tokens[0] == tokens[1]


@needs_packing
def test_layers_are_compiled_together_or_not_at_all() -> None:
    model = make_model("llama")
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.T.contiguous().T, False)
    stack = prepare(stack_for(model))
    layers: list[Any] = list(stack.blocks)
    assert [layer.form is None for layer in layers] == [True] + [False] * (len(layers) - 1)
    assert stack.run_compiled is None
    assert {layer.compiled_rows for layer in layers} == {0}


@needs_packing
@torch.inference_mode()
def test_neighbouring_layers_run_in_one_call_unless_somebody_watches() -> None:
    stack = prepare(stack_for(make_model("llama")))
    blocks: list[Any] = stack.blocks
    for layer in blocks:
        layer.compiled_rows = ALL
    kv, x_BTD = cache(stack), states(stack, 2, 1, torch.float32)
    window = decode_window([0, 1], [9, 9], stack.heads_per_key, x_BTD)
    rotary = stack.rotary(x_BTD, window.positions_BT)
    kv.open(window)
    one_by_one = x_BTD
    for index in range(1, 4):
        one_by_one = stack.run_layer(index, one_by_one, rotary, window, kv)
    assert stack.run_compiled is not None
    together = stack.run_compiled(1, 4, x_BTD, rotary, window, kv)
    assert together is not None
    assert torch.equal(together, one_by_one)
    watched = blocks[2].register_forward_hook(lambda *_: None)
    assert stack.run_compiled(1, 4, x_BTD, rotary, window, kv) is None
    assert stack.run_compiled(3, 4, x_BTD, rotary, window, kv) is not None
    assert torch.equal(stack.run_layers(1, 4, x_BTD, rotary, window, kv), one_by_one)
    watched.remove()
    blocks[1].compiled_rows = 1
    assert stack.run_compiled(1, 4, x_BTD, rotary, window, kv) is None
    assert stack.run_compiled(1, 4, x_BTD, rotary, window, None) is None
