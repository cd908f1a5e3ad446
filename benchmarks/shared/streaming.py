"""How fast this machine reads memory, and which share of that a decoding step reaches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from offramp.worker.model.precision import NATIVE, Precision

CACHES_OVER = 4
"""A buffer this many times as large as the last-level cache cannot lie in it."""

LEAST_BYTES = 2**29


class Stream:
    """A buffer much larger than the last-level cache, read from end to end."""

    def __init__(self) -> None:
        size = max(LEAST_BYTES, CACHES_OVER * last_level_bytes())
        self.buffer = torch.ones(size // 4)

    def bytes_per_s(self) -> float:
        """One reading, with as many threads as torch has now."""
        start = time.perf_counter()
        self.buffer.sum()
        return self.buffer.nbytes / (time.perf_counter() - start)


def last_level_bytes(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Size of the largest cache that Linux knows of for the first core; 0 if it knows none."""
    sizes = [path.read_text().strip() for path in root.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=0)


def share_of_bandwidth(weight_bytes: float, step_s: float, bytes_per_s: float) -> float:
    """Time that reading the weights once would take at full bandwidth, over the step's time.

    A step gives every row of the batch one token and reads the weights once for all of them. Keys,
    values and activations are left out: they are few beside the weights at these contexts.
    """
    return weight_bytes / bytes_per_s / step_s


def bytes_read(model: Any, precision: Precision = NATIVE) -> int:
    """Bytes of weights that a step reads: all but an embedding that is not the head.

    Args:
        model: As it was loaded.
        precision: How the engine keeps its matrices; their scales and zero points are counted.
    """
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    total = 0
    for each in model.parameters():
        if each is head:
            total += _kept_bytes(each, precision.head_weights, precision.group_size)
        elif each is not embedding:
            total += _kept_bytes(each, precision.weights, precision.group_size)
    return total


def _kept_bytes(weight: torch.Tensor, kept: str, group_size: int) -> int:
    if weight.dim() != 2 or kept == "native":
        return weight.nbytes
    if kept == "int8":
        return weight.numel() + 4 * len(weight)
    # A shortlist reads a few of the native rows, too, which are left out.
    return weight.numel() // 2 + weight.numel() // group_size * 2 + 8 * len(weight)
