"""Fit heads and gates to each other: each head to the texts that leave there, gates to the heads.

What is made least is JEI-DNN's objective (Regol, Chataoui and Coates 2024, "Jointly-Learned Exit
and Inference for a Dynamic Neural Network", arXiv 2310.09163): the mean over texts of
Σ_e P(e) · (cross-entropy of e's head + λ · cost of e), where P(e) = g_e · Π_{k<e} (1 − g_k) and the
gate g sees how sure the head is. The backbone is frozen, and heads and gates are fitted in turns.
Three things differ: the gates descend the objective itself instead of surrogate labels; they
learn from texts that the heads were not fitted to, for on their own heads are surer than on any
others; and every text counts a little for every head.

Shape suffixes: N texts, E exits, E1 = E + 1 with full depth, C classes, D width, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from offramp.agents.classifying.head_fitting import fit_head, temper
from offramp.agents.classifying.sequence_traces import ReadTexts, sequence_traces
from offramp.agents.learning.export import Weights
from offramp.agents.learning.halting import HaltingConfig, least, outputs
from offramp.controller.features import SOFTMAX_V2, FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.protocols import IndexArray
from offramp.worker.classifying.class_heads import ClassHead, ClassHeads
from offramp.worker.classifying.sequence_stack import Pool

ROUNDS = 4
"""Times that heads are fitted, and gates to them."""

LEAST_WEIGHT = 0.1
"""What a text counts at least for each head, of what it counts in the mean."""

FITTING = HaltingConfig(epochs=60)
"""How gates are fitted; prior and weight mean nothing here."""


def fit_joint(
    states_NED: FloatArray,
    read: ReadTexts,
    exits: tuple[int, ...],
    pool: Pool,
    learned: IndexArray,
    chosen: IndexArray,
    cost: float,
    seed: int,
    on_heads: Callable[[int, int], None],
) -> tuple[dict[int, ClassHead], MlpPolicy]:
    """Fit heads without their temperatures, and the policy that their gates are.

    Args:
        states_NED: Pooled states of all texts after each exit, full depth last.
        read: The texts.
        exits: Numbers of layers executed; the last is full depth.
        pool: What of a sequence the states are.
        learned: Places of the texts that heads are fitted to.
        chosen: Places of those that penalties, temperatures and gates are.
        cost: λ, what a text's full depth counts, in nats.
        seed: Seeds the gates.
        on_heads: Told (heads fitted, in all).
    """
    classes = read.texts.of(learned).classes
    label_N = torch.from_numpy(read.texts.indices(classes))
    states = torch.from_numpy(states_NED)
    weight_NE = torch.ones(len(learned), len(exits))
    cost_E = torch.tensor(exits) / exits[-1] * cost
    for turn in range(ROUNDS):
        plain, tempered = {}, {}
        for place, layer in enumerate(exits):
            parts = [(states[each, place], label_N[each]) for each in (learned, chosen)]
            weight_N = weight_NE[:, place]
            plain[layer], _ = fit_head(*parts[0], *parts[1], weight_N=weight_N)
            tempered[layer], _ = temper(plain[layer], *parts[1])
            on_heads(turn * len(exits) + place + 1, ROUNDS * len(exits))
        heads = ClassHeads(classes, pool, tempered)
        told = sequence_traces(heads, states_NED[chosen], read.of(chosen))
        logits_ENC = [tempered[layer](states[chosen, e]) for e, layer in enumerate(exits)]
        loss_NE = cost_E + torch.stack(
            [cross_entropy(each, label_N[chosen], reduction="none") for each in logits_ENC], dim=1
        )
        gates = MlpPolicy(exits[:-1], SOFTMAX_V2, _gates(told.features_NEF, loss_NE, seed))
        if turn + 1 < ROUNDS:
            told = sequence_traces(heads, states_NED[learned], read.of(learned))
            weight_NE = _weights(gates, told.features_NEF)
    return plain, gates


def _gates(features_NEF: FloatArray, loss_NE1: Tensor, seed: int) -> Weights:
    def loss(logits_BE: Tensor, places_B: Tensor) -> Tensor:
        return (leaving(logits_BE) * loss_NE1[places_B]).sum(-1).mean()

    return least(loss, features_NEF, replace(FITTING, seed=seed))


def leaving(logits_NE: Tensor) -> Tensor:
    """Chance of leaving at each exit and of staying to full depth, [N, E1], of the gates' logits.

    >>> leaving(torch.zeros(1, 2)).tolist()
    [[0.5, 0.25, 0.25]]
    """
    gate_NE = logits_NE.sigmoid()
    stayed_NE1 = torch.cat((torch.ones_like(gate_NE[:, :1]), (1 - gate_NE).cumprod(-1)), -1)
    return torch.cat((gate_NE * stayed_NE1[:, :-1], stayed_NE1[:, -1:]), -1)


def _weights(gates: MlpPolicy, features_NEF: FloatArray) -> Tensor:
    """What each text counts for each head, [N, E1], 1 in the mean of a head's texts."""
    chance_NE1 = leaving(torch.from_numpy(outputs(gates, features_NEF)).float())
    share_NE1 = chance_NE1 / chance_NE1.mean(0).clamp_min(1e-6)
    return LEAST_WEIGHT + (1 - LEAST_WEIGHT) * share_NE1
