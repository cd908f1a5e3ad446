"""The kernel of one row is measured once per machine and kept; the others are not touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offramp.worker.model import products
from offramp.worker.model.prepared import PackedWeight, can_pack

WEIGHT = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.skipif(not can_pack(WEIGHT), reason="this torch has no packed kernels")


@pytest.fixture
def ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Ratios that the next measurements find."""
    found: list[float] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_seconds", lambda *_: found.pop())
    products._known.cache_clear()
    yield found
    products._known.cache_clear()


def chosen(rows: int) -> bool:
    """Whether that many rows are multiplied with the plain matrix; whoever does, rightly."""
    weight = PackedWeight(WEIGHT, measures=True)
    x = torch.randn(1, rows, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(weight(x, None), x @ WEIGHT.T)
    if not weight.is_plain:
        return False
    weight._plain = 2 * WEIGHT
    return bool((weight(x, None) / (x @ WEIGHT.T)).mean() > 1.5)


@pytest.mark.parametrize(("ratio", "plain"), [(0.5, True), (0.97, False), (1.6, False)])
def test_one_row_takes_the_faster_kernel_and_more_rows_the_packed_one(
    ratios: list[float], ratio: float, plain: bool
) -> None:
    ratios.append(ratio)
    assert chosen(1) == plain
    assert not chosen(2)
    assert ratios == []  # and it was measured once


def test_a_choice_outlives_the_process(ratios: list[float]) -> None:
    ratios.append(0.5)
    assert chosen(1)
    products._known.cache_clear()
    assert chosen(1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        ratios.append(2.0)
        assert not chosen(1)  # another number of threads is measured for itself
    finally:
        torch.set_num_threads(threads)
    assert chosen(1)


def test_of_two_processes_that_measure_at_once_the_first_is_right(ratios: list[float]) -> None:
    ratios.append(0.5)
    products._known()  # this process has read the empty file
    mine = dict(products._known())
    assert chosen(1)
    products._known().clear()
    products._known().update(mine)
    ratios.append(2.0)
    assert chosen(1)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00"])
def test_a_spoilt_file_is_measured_anew(ratios: list[float], content: str) -> None:
    products.choices_file().parent.mkdir()
    products.choices_file().write_text(content)
    ratios.append(0.5)
    assert chosen(1)
    products._known.cache_clear()
    assert chosen(1)


def test_without_a_folder_each_process_measures(
    ratios: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ratios += [2.0, 0.5]
    assert chosen(1)
    products._known.cache_clear()
    assert not chosen(1)


def test_bfloat16_and_fills_are_packed_unmeasured(ratios: list[float]) -> None:
    assert not PackedWeight(WEIGHT).is_plain
    if can_pack(WEIGHT.bfloat16()):
        assert not PackedWeight(WEIGHT.bfloat16(), measures=True).is_plain


def test_the_real_measurement_names_a_ratio() -> None:
    ratio = products._seconds(lambda x: x @ WEIGHT.T, lambda x: x @ WEIGHT.T, torch.ones(1, 16))
    assert 0 < ratio < 100
