"""What crosses between the host and the model's device in a step: up without a wait, down in one.

A step's integers (tokens, positions, slots, places) go up from pinned memory, queued behind what
runs. What is decided comes down through ``fetch``, the only place of a decode step that waits for
the device. On a CPU both give back what they get.

Shape suffixes: N rows, M of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(
    numbers: Sequence[Any] | NDArray[Any], device: torch.device, dtype: torch.dtype = torch.long
) -> Tensor:
    """Numbers of the host as a tensor on the device, without a wait for it.

    Args:
        numbers: Nested sequences or an array, of any shape.
        device: Where they are needed.
        dtype: Dtype of the tensor.
    """
    if device.type == "cpu":
        # From an array, which takes a quarter of the time that torch takes with nested lists.
        sent = torch.from_numpy(np.array(numbers))
        return sent if sent.dtype is dtype else sent.to(dtype)
    # From memory that is not pinned torch would wait until all is copied. Torch keeps pinned
    # memory from being used again while a queued copy reads it.
    pinned = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def take(x_N: Tensor, places: Sequence[int]) -> Tensor:
    """Some rows [M, ...] of a tensor [N, ...], a copy; an index of the host costs no wait."""
    return x_N.index_select(0, upload(places, x_N.device))


def fetch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device in host memory, after one wait for all of them."""
    device = tensors[0].device
    if device.type != "cuda":
        return tuple(each.cpu() for each in tensors)
    copies = tuple(each.to("cpu", non_blocking=True) for each in tensors)
    torch.cuda.current_stream(device).synchronize()
    return copies
