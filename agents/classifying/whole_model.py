"""Train a model and a head per exit together, on the losses of all exits.

Each exit's cross-entropy counts as much as it has layers (Zhou et al. 2020, "BERT Loses Patience",
arXiv 2006.04152, as Kaya et al. 2019 weigh them), so that early exits do not spoil full depth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.exit_states import ClassifyCheckpoint, TrainingState
from offramp.agents.training.resuming import segment_seed
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.classifying.class_heads import ClassHead
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.sequence_stack import Pool, SequenceBatch

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""

WEIGHT_DECAY = 0.01
MOST_GRADIENT = 1.0
"""Norm that gradients are cut to."""

BLOCK = 50
"""Batches among whose texts, drawn at random, those of like length go together."""


def train_whole(
    model: SequenceModel,
    heads: Mapping[int, ClassHead],
    sequences: Sequence[Sequence[int]],
    label_N: Tensor,
    pool: Pool,
    config: ClassifyTuneConfig,
    checkpoint: ClassifyCheckpoint,
    keep: Callable[[ClassifyCheckpoint], None],
    on_progress: Callable[[int, int], None],
) -> dict[int, ClassHead]:
    """Train all weights, in place, and heads that begin as they are given; returns these.

    Args:
        model: What is trained; in evaluation mode again afterwards.
        heads: A head for each exit, full depth among them.
        sequences: Token ids of the texts to learn from.
        label_N: Index of the class of each.
        pool: What of a sequence heads read.
        config: Passes, learning rate, tokens per step, steps between checkpoints, seed.
        checkpoint: The run as it was, if it was begun before.
        keep: Given the run as it is, every so many steps.
        on_progress: Told (steps done, in all).
    """
    lengths_N = np.array([len(tokens) for tokens in sequences])
    batches: list[IndexArray] = []
    for epoch in range(config.epochs):
        seed = segment_seed(config.seed, "texts", epoch)
        batches += _batches(lengths_N, config.batch_tokens, seed)
    linears = nn.ModuleDict({str(layer): _linear(head) for layer, head in heads.items()})
    linears.to(model.stack.device)
    module = model.module.train().requires_grad_(True)
    weights = [*module.parameters(), *linears.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=WEIGHT_DECAY)
    done = 0
    if checkpoint.training is not None:
        done = _go_on(checkpoint.training, module, linears, optimizer)
    for step in range(done, len(batches)):
        torch.manual_seed(segment_seed(config.seed, "dropout", step))
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _rate(step, len(batches))
        places = batches[step]
        loss = _loss(model, linears, [sequences[p] for p in places.tolist()], label_N[places], pool)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        nn.utils.clip_grad_norm_(weights, MOST_GRADIENT)
        optimizer.step()
        on_progress(step + 1, len(batches))
        if (step + 1) % config.checkpoint_every == 0:
            state = _state(step + 1, module, linears, optimizer)
            keep(ClassifyCheckpoint(settings=checkpoint.settings, training=state))
    module.eval().requires_grad_(False)
    return {int(layer): _head(linear) for layer, linear in linears.items()}


def heads_in(state: TrainingState) -> dict[int, ClassHead]:
    """The heads of a run that was begun before."""
    layers = {int(name.partition(".")[0]) for name in state["heads"]}
    return {
        layer: ClassHead(state["heads"][f"{layer}.weight"], state["heads"][f"{layer}.bias"])
        for layer in sorted(layers)
    }


def _loss(
    model: SequenceModel,
    linears: nn.ModuleDict,
    sequences: Sequence[Sequence[int]],
    label_B: Tensor,
    pool: Pool,
) -> Tensor:
    """Mean cross-entropy of the exits, weighted by their layers."""
    batch, losses, counted = SequenceBatch(model.stack, sequences), [], 0
    label_B = label_B.to(model.stack.device)
    for layer in range(1, model.stack.layers + 1):
        batch.run_layer(layer - 1)
        if str(layer) in linears:
            logits_BC = linears[str(layer)](batch.pooled(pool))
            losses.append(layer * cross_entropy(logits_BC, label_B))
            counted += layer
    return torch.stack(losses).sum() / counted


def _batches(lengths_N: IndexArray, most_tokens: int, seed: int) -> list[IndexArray]:
    """One pass over all texts, in batches of so many tokens at most, padding included; a text that
    is longer goes alone.
    """
    rng = np.random.default_rng(seed)
    order_N = rng.permutation(len(lengths_N))
    rows = max(1, most_tokens // int(lengths_N.max()))
    batches: list[IndexArray] = []
    for start in range(0, len(order_N), BLOCK * rows):
        block = order_N[start : start + BLOCK * rows]
        block = block[np.argsort(lengths_N[block], kind="stable")]
        first = 0
        for end in range(1, len(block) + 1):
            # Of texts in order of their length the next is the longest.
            if end == len(block) or (end + 1 - first) * lengths_N[block[end]] > most_tokens:
                batches.append(block[first:end])
                first = end
    return [batches[place] for place in rng.permutation(len(batches)).tolist()]


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: it rises, and then falls to 0, both linearly."""
    warm = max(1, round(WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def _linear(head: ClassHead) -> nn.Linear:
    linear = nn.Linear(head.weight_CD.shape[1], head.weight_CD.shape[0])
    linear.load_state_dict({"weight": head.weight_CD, "bias": head.bias_C})
    return linear


def _head(linear: nn.Module) -> ClassHead:
    assert isinstance(linear, nn.Linear)
    return ClassHead(linear.weight.detach().clone().cpu(), linear.bias.detach().clone().cpu())


def _state(
    step: int, module: Any, linears: nn.ModuleDict, optimizer: torch.optim.Optimizer
) -> TrainingState:
    return {
        "step": step,
        "model": module.state_dict(),
        "heads": linears.state_dict(),
        "optimizer": optimizer.state_dict(),
    }


def _go_on(
    state: TrainingState, module: Any, linears: nn.ModuleDict, optimizer: torch.optim.Optimizer
) -> int:
    """Take a run up where it was; returns the steps that were done."""
    module.load_state_dict(state["model"])
    linears.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
