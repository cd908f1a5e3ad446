"""Products with few rows: which kernel is faster is measured on this machine, once, and kept.

What wins differs between processors: with one row in float32 oneDNN's blocked layout is faster
than a plain matrix on AMD's, and slower on Intel's (docs/decoding.md). A choice is kept on disk, so
that every process of a machine computes with the same kernels, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from offramp.controller.durable import write_durably

Product = Callable[[Tensor], Tensor]

PAIRS = 15
"""Runs of each kernel, in turns."""

MARGIN = 0.95
"""The plain kernel is chosen where it takes less than this share of the packed one's time."""


def prefers_plain(weight_OI: Tensor, plain: Product, packed: Product) -> bool:
    """Whether one row is multiplied faster by the plain kernel.

    Args:
        weight_OI: The matrix, [out, in].
        plain: Multiplies rows [1, in] with the matrix as it lies.
        packed: Multiplies them with it in a blocked layout.
    """
    known = _known()
    key = (
        f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{weight_OI.dtype}, {list(weight_OI.shape)}, 1 row"
    )
    if key not in known:
        x_1I = torch.ones(1, weight_OI.shape[1], dtype=weight_OI.dtype)
        known[key] = _seconds(plain, packed, x_1I) < MARGIN
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


@torch.inference_mode()
def _seconds(plain: Product, packed: Product, x_1I: Tensor) -> float:
    """Median time of the plain kernel over that of the packed one."""
    ratios = []
    for _ in range(PAIRS):
        marks = [time.perf_counter()]
        for product in (plain, packed):
            product(x_1I)
            marks.append(time.perf_counter())
        ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
    return statistics.median(ratios)


@lru_cache(maxsize=1)
def _known() -> dict[str, bool]:
    return _read()


def _read() -> dict[str, bool]:
    try:
        kept = json.loads(choices_file().read_text(encoding="utf-8"))
        return {str(key): bool(choice) for key, choice in kept.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # measured anew


def _keep(known: dict[str, bool]) -> None:
    # Another process may have written since; what it measured of the same stays, and is taken over.
    known |= _read()
    with contextlib.suppress(OSError):  # without a folder, each process measures for itself
        write_durably(choices_file(), json.dumps(known, indent=1, sort_keys=True).encode())
