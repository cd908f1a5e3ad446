"""PALBERT's Q-exit: leave once the learned chance of having halted by now reaches q.

PonderNet (Banino et al. 2021, arXiv 2107.05407) learns a distribution p over exits, of which it
draws where to leave; PALBERT (Balagansky and Gavrilov 2022, arXiv 2204.03276, sections 3 and 4)
leaves at the first exit whose cumulative distribution reaches q, so that nothing is drawn. There
each exit gives a hazard, and the cumulative distribution is 1 − Π (1 − hazard) over the exits so
far, which a policy that sees one exit at a time cannot know. Here the net gives the cumulative
distribution itself, F, as seen from an exit; what has halted stays halted, so by exit e it is the
largest F of the exits up to e, and the first exit at which that reaches q is the first whose own F
does. Every path of hazards has such an F.

Shape suffixes: N texts or tokens, E exits, E1 = E + 1 with full depth, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from offramp.agents.learning.export import Normaliser, Weights, linear_weights
from offramp.agents.learning.phat import HIDDEN
from offramp.controller.errors import ConfigError
from offramp.controller.features import FloatArray
from offramp.controller.policies.mlp import MlpPolicy
from offramp.controller.policies.net import MAX_ROWS
from offramp.envs.traces.tokens import Quality, TokenTraces

LEAST = 1e-6
"""Chances below this count as this, where their logarithm is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HaltingConfig:
    """How the halting distribution is learned.

    Attributes:
        epochs: Passes over all texts or tokens.
        batch: Texts or tokens per gradient step.
        learning_rate: Adam's at the start; it falls linearly to 0.
        prior: Chance of halting at an exit under the geometric prior, in (0, 1).
        weight: β, what the divergence from the prior counts beside the expected error.
        seed: Seeds the initial weights and the order.
    """

    epochs: int = 40
    batch: int = 256
    learning_rate: float = 5e-3
    prior: float = 0.3
    weight: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ConfigError("prior", f"{self.prior} is not in (0, 1)", "Use 0.1 to 0.5")


def train_halting(
    traces: TokenTraces, config: HaltingConfig, quality: Quality = "label"
) -> Weights:
    """Learn where to halt: least Σ p(e) · (1 − quality(e)) + β · KL(p ‖ geometric prior).

    PALBERT's loss in place of 1 − quality is the cross-entropy of each exit's head, which is
    trained along; the heads here are there already.

    Args:
        traces: Recorded texts, or tokens, to learn from.
        config: How the distribution is learned.
        quality: What leaving at an exit is worth.

    Returns:
        Weights of a [F, 32, 32, 1] tanh MLP on raw features; its output is the logit of F.
    """
    error_NE1 = torch.from_numpy(1 - traces.quality(quality))
    prior_E1 = torch.from_numpy(geometric(traces.features_NEF.shape[1], config.prior))

    def loss(logits_NE: Tensor, places_N: Tensor) -> Tensor:
        chance_NE1 = halting(logits_NE)
        error = (chance_NE1 * error_NE1[places_N]).sum(-1)
        log_ratio_NE1 = (chance_NE1.clamp_min(LEAST) / prior_E1).log()
        divergence = (chance_NE1 * log_ratio_NE1).sum(-1)
        return (error + config.weight * divergence).mean()

    return least(loss, traces.features_NEF, config)


def least(
    loss: Callable[[Tensor, Tensor], Tensor], features_NEF: FloatArray, config: HaltingConfig
) -> Weights:
    """Learn the net whose outputs at the exits make a loss least.

    Args:
        loss: Takes the outputs for some texts or tokens [B, E], and their places [B].
        features_NEF: What the net sees at each exit.
        config: Says how the net is learned.

    Returns:
        Weights of a [F, 32, 32, 1] tanh MLP on raw features.
    """
    torch.manual_seed(config.seed)
    normaliser = Normaliser.fit(features_NEF.reshape(-1, features_NEF.shape[2]))
    x_NEF = torch.from_numpy((features_NEF - normaliser.mean_F) / normaliser.std_F)
    net = nn.Sequential(
        nn.Linear(x_NEF.shape[2], HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
        nn.Linear(HIDDEN, 1),
    )  # fmt: skip
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    steps = config.epochs * -(-len(x_NEF) // config.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    for _ in range(config.epochs):
        for batch in torch.split(torch.randperm(len(x_NEF)), config.batch):
            found = loss(net(x_NEF[batch])[..., 0], batch)
            optimiser.zero_grad()
            found.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
            optimiser.step()
            schedule.step()
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    first, *rest = [linear_weights(layer) for layer in layers]
    return [normaliser.fold(*first), *rest]


def outputs(net: MlpPolicy, features_NEF: FloatArray) -> FloatArray:
    """What a net says of any number of texts or tokens at each exit, float64 [N, E]."""
    rows_MF = features_NEF.reshape(-1, features_NEF.shape[2])
    parts = np.array_split(rows_MF, -(-len(rows_MF) // MAX_ROWS))
    logits_M = np.concatenate([net.logits(part).astype(np.float64) for part in parts])
    return logits_M.reshape(features_NEF.shape[:2])


def halting(logits_NE: Tensor) -> Tensor:
    """Chance of halting at each exit and at full depth, [N, E1], of the logits of F at exits."""
    by_now_NE = logits_NE.sigmoid().cummax(-1).values
    none_N1, all_N1 = torch.zeros_like(by_now_NE[:, :1]), torch.ones_like(by_now_NE[:, :1])
    return torch.cat((none_N1, by_now_NE, all_N1), -1).diff(dim=-1)


def geometric(exits: int, chance: float) -> FloatArray:
    """The geometric distribution over so many exits, with the rest at full depth, [E1].

    >>> geometric(2, 0.5).tolist()
    [0.5, 0.25, 0.25]
    """
    going_E1 = (1 - chance) ** np.arange(exits + 1)
    return np.append(chance * going_E1[:-1], going_E1[-1]).astype(np.float32)
