"""Products with few rows: which kernel is faster is measured on this machine, once, and kept.

Whether oneDNN's blocked layout or a plain matrix is faster differs between processors, matrices and
numbers of rows (benchmarks/few_rows.py). A choice is kept on disk, so that the processes of a
machine compute with the same kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from offramp.controller.durable import write_durably
from offramp.worker.model.kernels.rounding import rounded_rows

Product = Callable[[Tensor], Tensor]
"""x Wᵀ, or x Wᵀ + b, of rows x."""

BiasedProduct = Callable[[Tensor, Tensor | None], Tensor]
"""x Wᵀ + b of rows x and a bias b, which may be None."""

T = TypeVar("T")

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of rows at which kernels are compared, until the one for many rows wins."""

UNUSED_S = 60.0
"""Products that nobody asked for in so long are forgotten when another is made."""

PAIRS = 9
"""Runs of each kernel at each size, in turns."""

MARGIN = 0.95
"""The kernel for few rows is chosen where it takes less than this share of the other's time."""


def can_pack(weight: Tensor) -> bool:
    """Whether this torch, on this processor, has the packed kernels for the weight."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def packed_product(weight_OI: Tensor) -> BiasedProduct:
    """Multiply rows with a matrix [out, in] that is kept in oneDNN's blocked layout; add a bias."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous())

    def product(x: Tensor, bias_O: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(  # type: ignore[no-any-return]
            x, packed, bias_O, "none", [], ""
        )

    return product


def on_rounded_rows(product: BiasedProduct) -> BiasedProduct:
    """Let rows be rounded to 8 bits before a product; see ``rounded_rows``."""
    return lambda x, bias_O: product(rounded_rows(x), bias_O)


def rows_up_to(
    what: str, rows_MI: Tensor, few: Product, many: Product, sizes: Sequence[int] = SIZES
) -> int:
    """Up to how many rows one kernel is faster than another; 0 for none.

    Args:
        what: The two kernels and what they work on, by shape; the name in the file of choices.
        rows_MI: As many rows as the last of the sizes.
        few: Takes rows [N, I], and gains for few of them if at all.
        many: Computes the same in the other way.
        sizes: Numbers of rows to compare at, ascending.
    """
    known = _known()
    versions = f"torch {torch.__version__}, kernels {_kernels()}"
    key = f"{processor()}, {versions}, {torch.get_num_threads()} threads, {what}"
    key += f", up to {sizes[-1]}"
    if key not in known:
        faster = itertools.takewhile(
            lambda size: _seconds(few, many, rows_MI[:size]) < MARGIN, sizes
        )
        known[key] = max(faster, default=0)
        _keep(known)
    return known[key]


def choices_file() -> Path:
    """Where choices are kept: below XDG_CACHE_HOME, or the home's .cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "offramp" / "products.json"


def processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def _kernels() -> str:
    """Digest of our kernels' sources: what was measured of others says nothing of these."""
    sources = sorted((Path(__file__).parent / "kernels").glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:8]


@torch.inference_mode()
def _seconds(few: Product, many: Product, rows_NI: Tensor) -> float:
    """Median time of one kernel over that of the other."""
    ratios = []
    few(rows_NI)  # compiled, or read from disk, before it is measured
    for _ in range(PAIRS):
        marks = [time.perf_counter()]
        for product in (few, many):
            product(rows_NI)
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return statistics.median(ratios)


@lru_cache(maxsize=1)
def _known() -> dict[str, int]:
    return _read()


def _read() -> dict[str, int]:
    try:
        kept = json.loads(choices_file().read_text(encoding="utf-8"))
        return {str(key): int(choice) for key, choice in kept.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # measured anew


def _keep(known: dict[str, int]) -> None:
    # Another process may have written since; what it measured of the same stays, and is taken over.
    known |= _read()
    with contextlib.suppress(OSError):  # without a folder, each process measures for itself
        write_durably(choices_file(), json.dumps(known, indent=1, sort_keys=True).encode())


@dataclass(slots=True)
class KeptProduct(Generic[T]):
    """What multiplies, and when it was asked for last, by ``time.monotonic``."""

    product: T
    used_s: float


class RecentProducts(Generic[T]):
    """Products, or what holds some, by number, each made when it is first asked for.

    Those that nobody asked for in ``UNUSED_S`` go when another is made: the fill has one for each
    exit, a copy of all layers behind it, and a worker that is given policy after policy would hold
    one for every exit that any of them ever named.
    """

    def __init__(self) -> None:
        self._kept: dict[int, KeptProduct[T]] = {}

    def get(self, number: int, make: Callable[[], T]) -> T:
        """The product of a number."""
        now_s = time.monotonic()
        if number not in self._kept:
            recent = {
                each: kept for each, kept in self._kept.items() if kept.used_s >= now_s - UNUSED_S
            }
            self._kept = {**recent, number: KeptProduct(make(), now_s)}
        kept = self._kept[number]
        kept.used_s = now_s
        return kept.product
