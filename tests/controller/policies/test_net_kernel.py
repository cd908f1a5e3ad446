"""One row in compiled code, with and without a folder to keep it in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from offramp.controller.errors import PolicyFaultError
from offramp.controller.policies.net import FEW_ROWS, MAX_ROWS, TanhNet
from offramp.controller.policies.net_kernel import forget_stale

KEPT_NOWHERE = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
from offramp.controller.policies.net_kernel import best_of
import numpy as np
flat, sizes = np.array([1, -1, 0, 0], np.float32), np.array([1, 2])
print(best_of(np.ones(1, np.float32), flat, sizes, np.zeros(2, np.float32)))
"""


def net(seed: int = 0) -> TanhNet:
    rng = np.random.default_rng(seed)
    sizes = ((5, 8), (8, 3))
    weights = [(rng.standard_normal(size), rng.standard_normal(size[1])) for size in sizes]
    return TanhNet([(w.astype(np.float32), b.astype(np.float32)) for w, b in weights],
                   inputs=5, outputs=3)  # fmt: skip


def test_the_best_of_one_row_is_that_of_the_matrices() -> None:
    rng, mine = np.random.default_rng(1), net()
    for _ in range(200):
        x_5 = rng.standard_normal(5).astype(np.float32)
        mask_3 = np.where(rng.random(3) < 0.3, -np.inf, 0).astype(np.float32)
        mask_3[0] = 0
        expected = (mine.rows(x_5[None])[0] + mask_3).argmax()
        assert mine.best(mask_3, x_5[:2], x_5[2:]) == expected


@pytest.mark.parametrize("rows", [0, 1, 7, FEW_ROWS, FEW_ROWS + 1, MAX_ROWS + 5])
def test_the_best_of_many_rows_is_that_of_each(rows: int) -> None:
    mine, mask_3 = net(), np.array([0, -np.inf, 0], np.float32)
    x_N5 = np.random.default_rng(2).standard_normal((rows, 5)).astype(np.float32)
    alone = [mine.best(mask_3, x_5) for x_5 in x_N5]
    assert mine.bests(mask_3, x_N5[:, :2], x_N5[:, 2:]).tolist() == alone


@pytest.mark.parametrize("rows", [2, FEW_ROWS + 1])
def test_one_row_that_is_not_finite_is_a_fault_of_many(rows: int) -> None:
    x_N5 = np.zeros((rows, 5), np.float32)
    x_N5[1, 3] = np.nan
    with pytest.raises(PolicyFaultError, match="not finite"):
        net().bests(np.zeros(3, np.float32), x_N5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_a_fault(bad: float) -> None:
    x_5 = np.array([0, 0, bad, 0, 0], np.float32)
    with pytest.raises(PolicyFaultError, match="not finite"):
        net().best(np.zeros(3, np.float32), x_5)


def test_it_compiles_where_no_folder_can_be_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEPT_NOWHERE], capture_output=True, text=True, cwd=tmp_path,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "0", done.stderr


def test_compiled_code_is_forgotten_once_a_source_beside_it_changed(tmp_path: Path) -> None:
    (tmp_path / "caller.py").write_text("A = 1\n")
    (tmp_path / "__pycache__").mkdir()
    code = tmp_path / "__pycache__" / "caller.step-1.py311.1.nbc"

    def survives() -> bool:
        forget_stale.cache_clear()
        forget_stale(tmp_path)
        return code.exists()

    code.write_bytes(b"of an unknown version")
    assert not survives()
    code.write_bytes(b"of this version")
    assert survives()
    (tmp_path / "callee.py").write_text("B = 2\n")
    assert not survives()
