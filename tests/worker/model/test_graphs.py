"""Captured layers compute, step after step, what the same layers compute when they are launched.

Without a GPU tensors pretend to lie on one, and ``support.replayed`` does what a driver would; with
one (``OFFRAMP_TEST_DEVICE``, as benchmarks/gpu/gpu.sh sets it) its own driver captures.

Shape suffixes: N rows, T columns, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from offramp.worker.model.attention import Window, decode_window, ragged_window
from offramp.worker.model.families import stack_for
from offramp.worker.model.gpu import graphs
from offramp.worker.model.gpu.graphs import GraphedLayers, Record, cuda_recorder
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.prepared import prepare
from offramp.worker.model.stack import Rotary
from offramp.worker.model.transfers import upload
from support.models import DEVICE, FAMILIES, LAYERS, make_model
from support.pretended import Crossings, bare, pretend
from support.replayed import DriverStandIn

SLOTS = 6
SEGMENTS = ((0, 2), (2, 3), (3, LAYERS))


@dataclass
class SlotStep:
    """Rows by slot: position of the newest token, and how many tokens come."""

    rows: dict[int, tuple[int, int]]


STEPS = (
    SlotStep({0: (4, 1)}),
    SlotStep({0: (5, 1), 1: (9, 1), 2: (9, 1)}),
    SlotStep({1: (10, 1), 5: (3, 1)}),
    SlotStep({0: (6, 1), 4: (127, 1)}),  # the last entry of a span
    SlotStep({0: (7, 1), 4: (128, 1)}),  # and the first of the next
    SlotStep({0: (9, 2), 1: (13, 3), 3: (20, 1)}),
    SlotStep({2: (12, 3)}),
    SlotStep({2: (13, 1), 3: (200, 9)}),
    SlotStep({1: (10, 1), 5: (3, 1)}),  # as before: nothing is captured
)


def launched(action: Callable[[], None]) -> Callable[[], None]:
    """A recorder that captures nothing: the same function over the same buffers each time."""
    return action


def recorder() -> Record:
    return cuda_recorder(DEVICE) if DEVICE.type == "cuda" else DriverStandIn()


def same(x: Tensor, y: Tensor) -> bool:
    """On a GPU a library may choose another kernel for a capture."""
    return torch.allclose(x, y, rtol=2e-2, atol=2e-2) if x.is_cuda else torch.equal(x, y)


@contextmanager
def ready_layers(
    family: str, dtype: torch.dtype, make_recorder: Callable[[], Record] | None
) -> Iterator[tuple[Any, SlotKV, GraphedLayers | None]]:
    """A stack with a random cache; by the same seed always the same."""
    is_pretended = DEVICE.type == "cpu"
    with torch.inference_mode(), Crossings() if is_pretended else nullcontext() as crossings:
        model = make_model(family, dtype)
        stack = prepare(stack_for(pretend(model) if is_pretended else model))
        found = None if make_recorder is None else GraphedLayers(stack, make_recorder)
        stack.run_compiled = found
        kv = SlotKV(stack, SLOTS)
        kv.reserve(256)
        torch.manual_seed(0)
        for part in (kv.keys_LSGCH, kv.values_LSGCH):
            bare(part).normal_()
        with nullcontext() if crossings is None else crossings.watched():
            yield stack, kv, found


def window_of(step: SlotStep, stack: Any, like: Tensor) -> Window:
    slots = list(step.rows)
    positions, lengths = zip(*step.rows.values(), strict=True)
    if max(lengths) == 1:
        return decode_window(slots, positions, stack.heads_per_key, like)
    return ragged_window(slots, positions, lengths, stack.heads_per_key, like)


def run(stack: Any, kv: SlotKV, step: SlotStep, seed: int) -> Tensor:
    """All segments of a step, and what of the result belongs to tokens, [M, D]."""
    columns = max(length for _, length in step.rows.values())
    torch.manual_seed(seed)
    numbers_NTD = torch.randn(len(step.rows), columns, stack.width).to(stack.dtype)
    x_NTD = upload(numbers_NTD.float().numpy(), stack.device, stack.dtype)
    window = window_of(step, stack, x_NTD)
    rotary: Rotary = stack.rotary(x_NTD, window.positions_BT)
    kv.open(window)
    given = x_NTD
    for first, last in SEGMENTS:
        x_NTD = stack.run_layers(first, last, x_NTD, rotary, window, kv)
    for each in (given, *rotary):  # nobody may read them later
        bare(each).fill_(float("nan"))
    is_token_NT = torch.from_numpy(window.cells_M3[:, 2] == 1).view(len(step.rows), columns)
    rows_ND: Tensor = bare(x_NTD)[is_token_NT].clone()
    return rows_ND


def decoded(
    family: str, dtype: torch.dtype, make_recorder: Callable[[], Record] | None
) -> tuple[list[Tensor], Tensor]:
    """What the steps give, and the cache after them."""
    with ready_layers(family, dtype, make_recorder) as (stack, kv, _):
        outs = [run(stack, kv, step, seed) for seed, step in enumerate(STEPS)]
        return outs, bare(kv.keys_LSGCH)[:, :SLOTS].clone()


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.float32) for family in FAMILIES]
    + [("llama", torch.bfloat16), ("gpt2", torch.bfloat16)],
    ids=str,
)
def test_replayed_layers_have_the_bits_of_launched_ones(family: str, dtype: torch.dtype) -> None:
    outs, cache = decoded(family, dtype, recorder)
    expected, expected_cache = decoded(family, dtype, lambda: launched)
    for out, other in zip(outs, expected, strict=True):
        assert same(out, other)
    assert same(cache, expected_cache)


def test_padding_changes_no_row_and_no_entry_of_the_cache(family: str) -> None:
    outs, cache = decoded(family, torch.float32, recorder)
    expected, expected_cache = decoded(family, torch.float32, None)
    for out, other in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache, expected_cache, rtol=1e-4, atol=1e-4)


def test_a_graph_serves_all_steps_of_its_size() -> None:
    recorders: list[Record] = []

    def make_recorder() -> Record:
        recorders.append(recorder())
        return recorders[-1]

    with ready_layers("llama", torch.float32, make_recorder) as (stack, kv, layers):
        assert layers is not None
        for position in range(20, 100):
            run(stack, kv, SlotStep({0: (position, 1), 2: (position + 20, 1)}), position)
        assert len(layers) == len(SEGMENTS)
        run(stack, kv, SlotStep({3: (5, 1)}), 0)  # as many rows, rounded up
        assert len(layers) == len(SEGMENTS)
        run(stack, kv, SlotStep({3: (130, 1)}), 0)
        assert len(layers) == 2 * len(SEGMENTS)
        kv.reserve(300)
        run(stack, kv, SlotStep({3: (130, 1)}), 0)
        assert len(layers) == len(SEGMENTS)  # those over the old cache are gone
        assert len(recorders) == 2


def test_a_cache_that_grows_moves_and_is_followed() -> None:
    outs = []
    for make_recorder in (recorder, lambda: launched):
        with ready_layers("llama", torch.float32, make_recorder) as (stack, kv, _):
            found = []
            for seed, tokens in enumerate((256, 300, 700, 700)):
                kv.reserve(tokens)
                found.append(run(stack, kv, SlotStep({0: (30, 1), 1: (40, 1)}), seed))
            outs.append(torch.cat(found))
    assert same(*outs)


def test_no_more_graphs_are_kept_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 4)
    expected, _ = decoded("llama", torch.float32, lambda: launched)
    with ready_layers("llama", torch.float32, recorder) as (stack, kv, layers):
        assert layers is not None
        for seed, step in enumerate(STEPS):
            assert same(run(stack, kv, step, seed), expected[seed])
            assert len(layers) <= 4


def test_what_a_capture_refuses_is_launched_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    expected, expected_cache = decoded("llama", torch.float32, None)
    with caplog.at_level(logging.WARNING):
        outs, cache = decoded("llama", torch.float32, lambda: refuse)
    for out, other in zip(outs, expected, strict=True):
        assert same(out, other)
    assert same(cache, expected_cache)
    assert [record.name for record in caplog.records] == [graphs.log.name]


def test_a_layer_with_a_hook_is_called(family: str) -> None:
    with ready_layers(family, torch.float32, recorder) as (stack, kv, _):
        step = SlotStep({0: (4, 1), 1: (9, 1)})
        run(stack, kv, step, 0)
        called: list[Any] = []
        part = next(module for module in stack.blocks[2].modules() if not list(module.children()))
        part.register_forward_hook(lambda *_: called.append(part))
        run(stack, kv, step, 0)
        assert called


def test_prompts_and_what_is_no_inference_are_left_to_plain_launches() -> None:
    with ready_layers("llama", torch.float32, recorder) as (stack, kv, layers):
        assert layers is not None
        run(stack, kv, SlotStep({0: (8, 9)}), 0)  # a prompt in one chunk
        run(stack, kv, SlotStep({0: (60, 20)}), 0)
        run(stack, kv, SlotStep({slot: (60, 15) for slot in range(SLOTS)}), 0)
        assert len(layers) == 3  # of 6 rows and 16 columns
        x_NTD = upload([[[0.5] * stack.width]], stack.device, stack.dtype)
        with torch.inference_mode(False):
            assert layers(0, 2, x_NTD, (), decode_window([0], [3], 2, x_NTD), kv) is None


def test_a_layer_that_reads_beside_the_buffers_is_found_out() -> None:
    """Negative control: a state that a graph cannot see changing."""
    expected, _ = decoded("llama", torch.float32, lambda: launched)
    with ready_layers("llama", torch.float32, recorder) as (stack, kv, _):
        plain, outer = stack.run_layer, {"x": upload([0.0], stack.device, stack.dtype)}

        def run_layer(index: int, x_NTD: Tensor, *rest: Any) -> Tensor:
            x_NTD = x_NTD + outer["x"]
            return plain(index, x_NTD, *rest)  # type: ignore[no-any-return]

        stack.run_layer = run_layer
        assert same(run(stack, kv, STEPS[0], 0), expected[0])
        outer["x"] = upload([1.0], stack.device, stack.dtype)
        launched_x = run(stack, kv, STEPS[0], 0)
        assert same(launched_x, expected[0])  # what was captured, not what is asked for
