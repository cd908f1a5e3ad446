"""What exits are fitted by: how far they are from full depth, in what they say or in their states.

Sources: the KL differs from the cross-entropy of Kangaroo (Liu et al. 2024, arXiv 2404.18911,
section 3.2) by a constant; the distance of states, with a tenth of it beside, is the loss of EAGLE
(Li et al. 2024, arXiv 2401.15077, section 4.2).

Shape suffixes: N rows of any origin, D width, V tokens of the head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, smooth_l1_loss

from offramp.worker.model.stack import LayerStack

BLOCK_VALUES = 2**23
"""Logits held at a time (32 MiB in float32); longer batches go through the head in blocks."""

KL, FEATURES = "kl", "features"
LOSSES = (KL, FEATURES)
"""What exits are fitted by: KL(final ‖ exit), or the distance to the state that the head reads."""

KL_BESIDE_FEATURES = 0.1
"""Weight of the KL beside the distance of states (EAGLE, section 4.2)."""

LARGEST_RATIO = 8.0
"""A state this many times the size of the median one is an attention sink's."""


class LossHead(Protocol):
    """What turns states into the logits that the loss compares; a whole model is one."""

    vocab: int
    dtype: torch.dtype

    def logits(self, x_ND: Tensor) -> Tensor:
        """Final norm and head, [N, V]."""
        ...

    def norm(self, x_ND: Tensor) -> Tensor:
        """Final norm, [N, D]."""
        ...


class FrequentHead:
    """The model's final norm and those rows of its head that are of common tokens.

    On a real vocabulary the head is most of a training step, and nearly all of its rows are of
    tokens that neither side gives a chance.

    Args:
        stack: The model.
        tokens: Distinct token ids.
    """

    def __init__(self, stack: LayerStack, tokens: Sequence[int]) -> None:
        self.vocab, self.dtype = len(tokens), stack.dtype
        self._stack = stack
        self._rows_VD = stack.head_rows(torch.tensor(tokens, device=stack.device)).detach()

    def logits(self, x_ND: Tensor) -> Tensor:
        """Logits of the common tokens, [N, V]."""
        return linear(self.norm(x_ND), self._rows_VD)

    def norm(self, x_ND: Tensor) -> Tensor:
        """The model's final norm, [N, D]."""
        return self._stack.norm(x_ND)


def loss_head(stack: LayerStack, counts: Counter[int], tokens: int) -> LossHead:
    """The head that the loss takes: of the most frequent tokens by count, or 0 for all."""
    if not 0 < tokens < stack.vocab:
        return stack
    return FrequentHead(stack, [token for token, _ in counts.most_common(tokens)])


def kl_of_logits(final_NV: Tensor, exit_NV: Tensor) -> Tensor:
    """KL(softmax(final) ‖ softmax(exit)) of each row, [N], nats."""
    final_NV, exit_NV = final_NV.log_softmax(-1), exit_NV.log_softmax(-1)
    return (final_NV.exp() * (final_NV - exit_NV)).sum(-1)


def exit_loss(head: LossHead, module: nn.Module, x_ND: Tensor, final_NV: Tensor) -> Tensor:
    """Sum over rows of KL(final ‖ translated exit), nats; float32, or float64 for a check of it."""
    logits_NV = head.logits(module(x_ND).to(head.dtype))
    return kl_of_logits(final_NV, logits_NV.to(final_NV.dtype)).sum()


def feature_loss(head: LossHead, read_ND: Tensor, last_ND: Tensor) -> Tensor:
    """Sum over rows of the mean smooth L1 distance between normed states, exit's and last layer's.

    After the norm, so that the sizes of states, which grow with depth, weigh nothing.
    """
    said_ND = head.norm(read_ND.to(head.dtype)).float()
    with torch.no_grad():
        meant_ND = head.norm(last_ND).float()
    return smooth_l1_loss(said_ND, meant_ND, reduction="none").mean(-1).sum()


def blocks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices of rows whose logits are at most ``BLOCK_VALUES``.

    >>> [(part.start, part.stop) for part in blocks(5, BLOCK_VALUES // 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    size = max(1, BLOCK_VALUES // vocab)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def typical_rows(x_ND: Tensor) -> Tensor:
    """Which states are of usual size, [N] bool.

    A few first tokens of each text hold states a hundred times as large as all others (attention
    sinks: Xiao et al. 2024): no exit is asked there, and every mean would be theirs.
    """
    size_N = x_ND.float().square().mean(-1).sqrt()
    return size_N <= LARGEST_RATIO * size_N.median()


def mean_loss(stack: LayerStack, module: nn.Module, x_ND: Tensor, last_ND: Tensor) -> float:
    """Mean KL(final ‖ translated exit) over the rows of usual size, nats; no gradient."""
    kept_N = typical_rows(x_ND)
    x_ND, last_ND = x_ND[kept_N], last_ND[kept_N]
    with torch.no_grad():
        losses = [
            exit_loss(stack, module, x_ND[part], stack.logits(last_ND[part]).float()).item()
            for part in blocks(len(x_ND), stack.vocab)
        ]
    return sum(losses) / len(x_ND)
