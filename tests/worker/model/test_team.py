"""Threads that work through one task together give the bits that one gives alone.

Shape suffixes: N rows, I inputs, O outputs, B rows, T tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from offramp.worker.model.families import stack_for
from offramp.worker.model.kernels import matrix as kernel_matrix
from offramp.worker.model.kernels.matrix import KernelMatrix
from offramp.worker.model.kernels.team import share, team_of
from offramp.worker.model.precision import Precision
from offramp.worker.model.prepared import prepare
from offramp.worker.model.quantised import quantise
from support.kernels import ALL, KINDS, LEAN, matrix_of, needs_packing, numbers, run, windows
from support.models import make_model

TEAMS = (2, 3, 5)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    monkeypatch.setattr(kernel_matrix, "ALONE_BELOW", 0)
    yield
    torch.set_num_threads(before)


def on(threads: int, function: Any, *arguments: Any) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)


@pytest.mark.parametrize(
    ("count", "unit"), [(1, 32), (31, 32), (64, 32), (100, 32), (7, 1), (0, 1)]
)
def test_every_thing_is_taken_by_one_member(count: int, unit: int) -> None:
    for size in (1, 2, 3, 8):
        taken: list[int] = []
        for rank in range(size):
            first, last = share(count, unit, (rank, size, 0))
            taken += range(first, last)
            assert last - first == 0 or last - first >= min(unit, count)
        assert taken == list(range(count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outputs", [1, 40, 96, 200])
def test_a_product_has_the_bits_of_one_thread(kind: str, outputs: int) -> None:
    _, matrix = matrix_of(kind, outputs, 96)
    for dtype in (torch.float32, torch.bfloat16):
        x_NI = numbers(5, 96).to(dtype)
        alone = on(1, matrix.product, x_NI)
        for size in TEAMS:
            assert torch.equal(on(size, matrix.product, x_NI), alone)


@needs_packing
@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAN)
@torch.inference_mode()
def test_layers_have_the_bits_of_one_thread(name: str, dtype: torch.dtype, weights: str) -> None:
    stack = stack_for(make_model(name, dtype, hidden_size=192, intermediate_size=416))
    if weights != "native":
        stack = quantise(stack, Precision(weights=weights))  # type: ignore[arg-type]
    stack = prepare(stack)
    for x_BTD, window in windows(stack, dtype):
        alone, mine = on(1, run, stack, x_BTD, window, ALL)
        for size in TEAMS:
            together, theirs = on(size, run, stack, x_BTD, window, ALL)
            assert torch.equal(together, alone)
            assert torch.equal(theirs.keys_LSGCH, mine.keys_LSGCH)
            assert torch.equal(theirs.values_LSGCH, mine.values_LSGCH)


def test_callers_at_the_same_time_do_not_mix() -> None:
    matrix = KernelMatrix(numbers(400, 96, seed=1))
    x_KNI = [numbers(3, 96, seed=seed) for seed in range(40)]
    alone = [on(1, matrix.product, x_NI) for x_NI in x_KNI]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x_NI: on(2, matrix.product, x_NI), x_KNI))
    assert all(map(torch.equal, together, alone))


def test_a_forked_process_has_a_team_of_its_own() -> None:
    matrix, x_NI = KernelMatrix(numbers(400, 96, seed=1)), numbers(3, 96)
    alone = on(1, matrix.product, x_NI)
    assert torch.equal(on(2, matrix.product, x_NI), alone)
    child = os.fork()
    if child == 0:
        same = torch.equal(matrix.product(x_NI), alone)
        os._exit(0 if same and team_of(2)._process == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(on(2, matrix.product, x_NI), alone)
