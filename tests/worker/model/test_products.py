"""The kernel of few rows is measured once per machine and kept; more rows are not touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp.worker.model import products
from offramp.worker.model.kernels.matrix import KernelMatrix
from offramp.worker.model.prepared import PackedWeight
from offramp.worker.model.products import can_pack

WEIGHT = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.skipif(not can_pack(WEIGHT), reason="this torch has no packed kernels")


class Machine:
    """A machine on which the plain kernel is faster up to so many rows."""

    def __init__(self) -> None:
        self.faster_up_to = 0
        self.measured: list[int] = []

    def seconds(self, _: Any, __: Any, rows_NI: torch.Tensor) -> float:
        self.measured.append(len(rows_NI))
        return 0.5 if len(rows_NI) <= self.faster_up_to else 0.97


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    found = Machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_seconds", found.seconds)
    products._known.cache_clear()
    yield found
    products._known.cache_clear()


def chosen() -> list[int]:
    """Numbers of rows that are multiplied with the plain matrix; all are, rightly."""
    weight, plain = PackedWeight(WEIGHT), []
    for rows in (1, 2, 3, 4, 5, 8, 16, 64, 65):
        x = torch.randn(1, rows, 16, generator=torch.Generator().manual_seed(1))
        weight._parts = [KernelMatrix(WEIGHT)]
        torch.testing.assert_close(weight(x), x @ WEIGHT.T)
        weight._parts = [KernelMatrix(2 * WEIGHT)]
        if torch.allclose(weight(x), 2 * (x @ WEIGHT.T), atol=1e-4):
            plain.append(rows)
    return plain


@pytest.mark.parametrize(
    ("faster_up_to", "plain", "measured"),
    [(0, [], [1]), (1, [1], [1, 2]), (5, [1, 2, 3, 4], [1, 2, 4, 8]),
     (99, [1, 2, 3, 4, 5, 8, 16, 64], [1, 2, 4, 8, 16, 32, 64])],
)  # fmt: skip
def test_few_rows_take_the_faster_kernel_and_more_the_packed_one(
    machine: Machine, faster_up_to: int, plain: list[int], measured: list[int]
) -> None:
    machine.faster_up_to = faster_up_to
    assert chosen() == plain
    assert chosen() == plain
    assert machine.measured == measured  # once, and no further than the packed one's first win


def test_a_choice_outlives_the_process(machine: Machine) -> None:
    machine.faster_up_to = 1
    assert chosen() == [1]
    products._known.cache_clear()
    machine.faster_up_to = 0
    assert chosen() == [1]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert chosen() == []  # another number of threads is measured for itself
    finally:
        torch.set_num_threads(threads)
    assert chosen() == [1]


def test_of_two_processes_that_measure_at_once_the_first_is_right(machine: Machine) -> None:
    machine.faster_up_to = 1
    mine = dict(products._known())  # this process has read the empty file
    assert chosen() == [1]
    products._known().clear()
    products._known().update(mine)
    machine.faster_up_to = 0
    assert chosen() == [1]


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"a": null}'])
def test_a_spoilt_file_is_measured_anew(machine: Machine, content: str) -> None:
    products.choices_file().parent.mkdir()
    products.choices_file().write_text(content)
    machine.faster_up_to = 1
    assert chosen() == [1]
    products._known.cache_clear()
    machine.faster_up_to = 0
    assert chosen() == [1]


def test_without_a_folder_each_process_measures(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    machine.faster_up_to = 1
    assert chosen() == [1]
    products._known.cache_clear()
    machine.faster_up_to = 0
    assert chosen() == []


def test_a_matrix_that_compiled_code_cannot_read_is_packed_unmeasured(machine: Machine) -> None:
    machine.faster_up_to = 4
    assert PackedWeight(WEIGHT.T).kernel_rows == 0
    assert machine.measured == []
    assert PackedWeight(WEIGHT.T.contiguous()).kernel_rows == 4


def test_the_real_measurement_names_a_ratio() -> None:
    ratio = products._seconds(lambda x: x @ WEIGHT.T, lambda x: x @ WEIGHT.T, torch.ones(1, 16))
    assert 0 < ratio < 100
