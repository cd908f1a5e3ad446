"""Learns what tells a right draft from a wrong one beside its lead: projections and small nets.

Shape suffixes: N tokens, B of a batch, E exits, D width, R numbers of a projection, I inputs,
S softmax columns, K columns of a token's kind, H hidden units, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from offramp.controller.features import BoolArray, FloatArray
from offramp.controller.policies.drafts.draft_insight import (
    KIND_COLUMNS,
    SURE_COLUMNS,
    DraftInsight,
    inputs_of,
    kind_byte,
    kind_columns,
    kinds_of,
    scaled,
)
from offramp.controller.policies.net import Weights
from offramp.envs.traces.tokens import TokenTraces

NUMBERS = 8
"""Numbers that a state is projected to."""

HIDDEN = 16

FOLDS = 3
"""Parts of the documents, each judged by what was learned on the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InsightConfig:
    """How insight is learned.

    Attributes:
        steps: Gradient steps.
        judged_every: Steps between looks at held-out documents; of each exit the best look counts.
        batch: Tokens per gradient step; as many as there are to learn from, if those are fewer.
        learning_rate: Rate of AdamW, the same in all steps.
        decay: Weight decay of AdamW.
        dropout: Share of a state's columns that a step does not see.
        held_out: Share of the documents that say which pass was best.
        seed: Seeds weights, batches and dropout.
    """

    steps: int = 960
    judged_every: int = 40
    batch: int = 512
    learning_rate: float = 2e-3
    decay: float = 0.1
    dropout: float = 0.3
    held_out: float = 0.2
    seed: int = 0


def token_kinds(tokenizer: Any, vocab: int) -> NDArray[np.uint8]:
    """The kind of each token of a vocabulary, by its text alone, [V]."""
    texts = tokenizer.batch_decode([[token] for token in range(vocab)])
    return np.array([kind_byte(text) for text in texts], np.uint8)


def fit_insight(
    traces: TokenTraces,
    base_NE: FloatArray,
    kinds: NDArray[np.uint8],
    config: InsightConfig = InsightConfig(),
) -> tuple[DraftInsight, FloatArray]:
    """Learn what to add to the log-odds that the leads give.

    Args:
        traces: Recorded tokens, with states.
        base_NE: Log-odds by the leads alone.
        kinds: The kind of each token, [V].
        config: How much is learned, and how fast.

    Returns:
        The insight, and what is added for each recorded token by one that was learned on other
        documents, [N, E]: what an agent that trains on these tokens may see of it.
    """
    learner = _Learner(traces, base_NE, kinds, config)
    fold_N = traces.document_N % FOLDS
    more_NE = np.zeros_like(base_NE)
    for fold in range(FOLDS):
        others = learner.learn(fold_N != fold)
        more_NE[fold_N == fold] = more_of(others, traces, np.flatnonzero(fold_N == fold))
    return learner.learn(np.ones(len(traces), np.bool_)), more_NE


def more_of(
    insight: DraftInsight, traces: TokenTraces, rows_N: NDArray[np.int64] | None = None
) -> FloatArray:
    """What an insight adds to the log-odds of recorded tokens, [N, E].

    Args:
        insight: What was learned for the traces' exits.
        traces: Recorded with states.
        rows_N: Which tokens; None: all.
    """
    assert traces.state_NED is not None
    assert traces.read_N is not None
    rows_N = np.arange(len(traces)) if rows_N is None else rows_N
    kind_NK = kinds_of(insight.kind_VK, traces.read_N[rows_N])
    columns = []
    for here in range(insight.exits):
        projected_NR = np.concatenate(
            [
                insight.projected(here, traces.state_NED[part, here].astype(np.float32))
                for part in np.array_split(rows_N, max(1, len(rows_N) // 4096))
            ]
        )
        x_NI = inputs_of(traces.softmax_NES[rows_N, here], kind_NK, projected_NR)
        columns.append(insight.nets[here].values(x_NI)[:, 0])
    return np.stack(columns, axis=1)


class _Nets(nn.Module):
    """All exits' projections and nets side by side."""

    def __init__(self, exits: int, width: int, dropout: float) -> None:
        super().__init__()
        inputs = SURE_COLUMNS + KIND_COLUMNS + NUMBERS
        self.project_EDR = nn.Parameter(torch.randn(exits, width, NUMBERS) / width**0.5)
        self.first_EIH = nn.Parameter(torch.randn(exits, inputs, HIDDEN) / inputs**0.5)
        self.bias_EH = nn.Parameter(torch.zeros(exits, HIDDEN))
        # Nothing is added at first: the leads' odds are where it starts from.
        self.last_EH = nn.Parameter(torch.zeros(exits, HIDDEN))
        self.level_E = nn.Parameter(torch.zeros(exits))
        self.dropout = nn.Dropout(dropout)

    def forward(self, seen_BEI: Tensor, state_BED: Tensor) -> Tensor:
        """What is added to the log-odds, [B, E]."""
        # One draw of columns for all exits, whose nets learn nothing of each other: a draw for each
        # took longer than all the rest of a step.
        kept_B1D = self.dropout(state_BED.new_ones(len(state_BED), 1, state_BED.shape[2]))
        state_BED = state_BED * kept_B1D
        projected_BER = torch.einsum("bed,edr->ber", state_BED, self.project_EDR)
        x_BEI = torch.cat([seen_BEI, projected_BER], dim=-1)
        hidden_BEH = torch.tanh(torch.einsum("bei,eih->beh", x_BEI, self.first_EIH) + self.bias_EH)
        return (hidden_BEH * self.last_EH).sum(-1) + self.level_E


class _Learner:
    """Tokens as nets learn from them, standardised."""

    def __init__(
        self,
        traces: TokenTraces,
        base_NE: FloatArray,
        kinds: NDArray[np.uint8],
        config: InsightConfig,
    ) -> None:
        assert traces.state_NED is not None
        assert traces.read_N is not None
        self.config, self.kinds = config, kinds
        self.document_N = traces.document_N
        self.width = traces.state_NED.shape[2]
        self.right_NE = torch.from_numpy(traces.agree_NE)
        self.base_NE = torch.from_numpy(base_NE)
        kind_NK = kinds_of(kind_columns(kinds), traces.read_N)
        nothing_N0 = np.empty((len(traces), 0), np.float32)
        exits = range(len(traces.header.exits))
        seen = [inputs_of(traces.softmax_NES[:, e], kind_NK, nothing_N0) for e in exits]
        state = [scaled(traces.state_NED[:, e].astype(np.float32)) for e in exits]
        self.seen_NEI, self.seen_mean, self.seen_scale = _standard(np.stack(seen, axis=1))
        self.state_NED, self.state_mean, self.state_scale = _standard(np.stack(state, axis=1))

    def learn(self, chosen_N: BoolArray) -> DraftInsight:
        """Learn on some of the tokens."""
        torch.manual_seed(self.config.seed)
        nets = _Nets(self.seen_NEI.shape[1], self.width, self.config.dropout)
        optimiser = torch.optim.AdamW(
            nets.parameters(), lr=self.config.learning_rate, weight_decay=self.config.decay
        )
        share = round(1 / self.config.held_out)
        judges_N = chosen_N & (self.document_N // FOLDS % share == 0)
        learned = torch.from_numpy(np.flatnonzero(chosen_N & ~judges_N))
        judged = torch.from_numpy(np.flatnonzero(judges_N))
        best = copy.deepcopy(nets.state_dict())
        best_E = self._loss(nets, judged).mean(0)
        batch = min(self.config.batch, len(learned))
        for _ in range(self.config.steps // self.config.judged_every):
            nets.train()
            for _ in range(self.config.judged_every):
                part = learned[torch.randint(len(learned), (batch,))]
                optimiser.zero_grad()
                self._loss(nets, part).sum(1).mean().backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            nets.eval()
            with torch.no_grad():
                loss_E = self._loss(nets, judged).mean(0)
            better_E = loss_E < best_E
            best_E = torch.where(better_E, loss_E, best_E)
            for name, values in nets.state_dict().items():
                best[name][better_E] = values[better_E]
        nets.load_state_dict(best)
        return self._folded(nets)

    def _loss(self, nets: _Nets, rows: Tensor) -> Tensor:
        more_BE = nets(self.seen_NEI[rows], self.state_NED[rows].float())
        return nn.functional.binary_cross_entropy_with_logits(
            self.base_NE[rows] + more_BE, self.right_NE[rows], reduction="none"
        )

    def _folded(self, nets: _Nets) -> DraftInsight:
        """The nets as they read what is not standardised."""
        part = {name: values.numpy() for name, values in nets.state_dict().items()}
        project_EDR = part["project_EDR"] / self.state_scale[:, :, None]
        shift_ER = np.einsum("ed,edr->er", self.state_mean, project_EDR)
        weights: list[Weights] = []
        for e, first_IH in enumerate(part["first_EIH"]):
            own = first_IH[:-NUMBERS] / self.seen_scale[e][:, None]
            bias_H = (
                part["bias_EH"][e] - self.seen_mean[e] @ own - shift_ER[e] @ first_IH[-NUMBERS:]
            )
            first = np.concatenate([own, first_IH[-NUMBERS:]])
            last = (part["last_EH"][e][:, None], part["level_E"][e : e + 1])
            weights.append([(first.astype(np.float32), bias_H.astype(np.float32)), last])
        return DraftInsight(project_EDR.astype(np.float32), weights, self.kinds)


def _standard(x_NEI: FloatArray) -> tuple[Tensor, FloatArray, FloatArray]:
    """Columns of mean 0 and deviation 1, as half floats, and the means and deviations, [E, I]."""
    mean_EI = x_NEI.mean(0)
    scale_EI = x_NEI.std(0) + 1e-3
    x_NEI -= mean_EI
    x_NEI /= scale_EI
    return torch.from_numpy(x_NEI.astype(np.float16)), mean_EI, scale_EI
