"""p̂: a calibrated classifier of "this exit is right", by default: its token is full depth's.

Shape suffixes: N tokens, E exits, F features, M = N·E rows.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from offramp.agents.learning.export import Normaliser, Weights, linear_weights
from offramp.agents.learning.stopping_problem import StateObservations, states_of
from offramp.controller.errors import ConfigError
from offramp.controller.features import SCHEMAS, BoolArray, FeatureSchema, FloatArray
from offramp.envs.traces.tokens import Quality, TokenTraces

HIDDEN = 32

PHAT_TOKENS = 12_000
"""Tokens that the classifier of all states is fitted on, each in every state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhatConfig:
    """How the classifier is trained.

    Attributes:
        epochs: Passes over all rows.
        batch: Rows per gradient step.
        learning_rate: Adam's at the start; it falls linearly to 0.
        seed: Seeds the initial weights and the order of rows.
    """

    epochs: int = 12
    batch: int = 4096
    learning_rate: float = 5e-3
    seed: int = 0


def train_phat(
    traces: TokenTraces,
    config: PhatConfig,
    columns: Collection[str] | None = None,
    quality: Quality = "agreement",
) -> Weights:
    """Fit P(right | features) by binary cross-entropy over every exit of every token.

    Args:
        traces: Tokens to fit on.
        config: Hyper-parameters of the fit.
        columns: Features that it may read, of the recorded schema; None: all. The weights of the
            others are zero.
        quality: Says which exits are right.

    Returns:
        Weights of a [F, 32, 32, 1] tanh MLP on raw features; its output is the logit of p̂.
    """
    rows_MF = traces.features_NEF.reshape(-1, traces.features_NEF.shape[2])
    normaliser = Normaliser.fit(rows_MF)
    hidden_F = _hidden(SCHEMAS[traces.header.schema], columns)
    right_M = traces.quality(quality)[:, :-1].reshape(-1)
    return fit_classifier(rows_MF, right_M, normaliser, config, hidden_F)


def fit_classifier(
    rows_MF: FloatArray,
    right_M: FloatArray,
    normaliser: Normaliser,
    config: PhatConfig,
    hidden_F: BoolArray | None = None,
) -> Weights:
    """Fit P(right | features) on some rows; as ``train_phat``.

    Args:
        rows_MF: Features as they were recorded.
        right_M: 1 where the exit was right, else 0.
        normaliser: Normalises the features; it is folded into the first layer.
        config: Hyper-parameters of the fit.
        hidden_F: Columns that it does not see; None: it sees all.
    """
    torch.manual_seed(config.seed)
    width = rows_MF.shape[1]
    x_MF = torch.from_numpy((rows_MF - normaliser.mean_F) / normaliser.std_F)
    hidden_F = np.zeros(width, np.bool_) if hidden_F is None else hidden_F
    x_MF[:, hidden_F] = 0.0
    y_M = torch.from_numpy(right_M)
    net = nn.Sequential(
        nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(),
        nn.Linear(HIDDEN, 1),
    )  # fmt: skip
    _fit(net, x_MF, y_M, config)
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    (weight_FH, bias_H), *rest = [linear_weights(layer) for layer in layers]
    weight_FH[hidden_F] = 0.0
    return [normaliser.fold(weight_FH, bias_H), *rest]


def fit_state_phat(traces: TokenTraces, config: PhatConfig) -> Weights:
    """Fit p̂ in every state that jumps can reach, so that it is as good on any subset of exits.

    Args:
        traces: Tokens to fit on.
        config: Hyper-parameters of the fit.
    """
    exits = len(traces.header.exits)
    states = states_of(exits, exits + 1)
    observations = StateObservations(traces, states)
    rng = np.random.default_rng(config.seed)
    rows = rng.permutation(len(traces))[:PHAT_TOKENS]
    rows_MF = np.concatenate([observations.at(state, rows) for state in states[1:]])
    right_M = np.concatenate([traces.agree_NE[rows, state.here] for state in states[1:]])
    fitted = observations.normaliser((0.1, 1.0), config.seed)
    features = Normaliser(fitted.mean_F[:-1], fitted.std_F[:-1])  # without log λ
    # A token in its many states is not as many tokens: fewer passes do.
    return fit_classifier(
        rows_MF, right_M, features, replace(config, epochs=-(-config.epochs // 3))
    )


def _hidden(schema: FeatureSchema, columns: Collection[str] | None) -> BoolArray:
    if columns is None:
        return np.zeros(schema.width, np.bool_)
    if unknown := set(columns) - set(schema.columns):
        raise ConfigError("columns", f"{sorted(unknown)} are not in schema {schema.name!r}")
    return np.asarray([name not in columns for name in schema.columns])


def logit(probability: float) -> float:
    """The logit whose logistic is this probability, in (0, 1).

    >>> logit(0.5)
    0.0
    """
    return float(np.log(probability / (1 - probability)))


def _fit(net: nn.Module, x_MF: torch.Tensor, y_M: torch.Tensor, config: PhatConfig) -> None:
    optimiser = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    steps = config.epochs * -(-len(x_MF) // config.batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=steps)
    for _ in range(config.epochs):
        for batch in torch.split(torch.randperm(len(x_MF)), config.batch):
            loss = nn.functional.binary_cross_entropy_with_logits(
                net(x_MF[batch])[:, 0], y_M[batch]
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
            optimiser.step()
            schedule.step()
