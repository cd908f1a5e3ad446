"""What heads say of texts that they were not fitted to, of every text of the training file.

A head is surer, and more often right, on the texts that it was fitted to: a policy that learns
there trusts it too much. Holding texts out leaves few to learn from. So heads are fitted several
times, each time without one part of the texts (Stone 1974, "Cross-validatory choice and assessment
of statistical predictions", JRSS-B 36(2)), and each part is read by the heads that never saw it.

Shape suffixes: N texts, E exits, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from offramp.agents.classifying.head_fitting import fit_head, temper
from offramp.agents.classifying.labelled_texts import LabelledTexts, split_by_class
from offramp.agents.classifying.sequence_traces import ReadTexts, traces_of_logits
from offramp.controller.features import FloatArray
from offramp.controller.policies.protocols import IndexArray
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.classifying.class_heads import ClassHeads

FOLDS = 4
"""Parts of the texts, and times that each exit's head is fitted."""

CHOOSING = 0.18
"""Share of the first fold's texts that sets penalties and temperatures. Then all of the fold's
texts are fitted to, so that heads here learn from about as many texts as those that are served."""


def cross_fitted_traces(
    heads: ClassHeads,
    states_NED: FloatArray,
    read: ReadTexts,
    seed: int,
    on_heads: Callable[[int, int], None] = lambda *_: None,
) -> TokenTraces:
    """Traces of all texts, each as heads see it that were fitted to the other parts.

    Args:
        heads: Those that are served; their exits and classes are taken.
        states_NED: Pooled states of all texts after each exit.
        read: The texts that those heads were fitted to.
        seed: Seeds the parts.
        on_heads: Told (heads fitted, heads in all).
    """
    texts = read.texts
    label_N = torch.from_numpy(texts.indices(heads.labels))
    exits = len(heads.exits)
    logits_ENC = torch.zeros(exits, len(texts), len(heads.labels))
    chosen: dict[int, tuple[float, float]] = {}
    for number, (others, unseen) in enumerate(_folds(texts, seed)):
        for place in range(exits):
            states_ND = torch.from_numpy(states_NED[:, place])
            if place not in chosen:
                labels = [texts.labels[other] for other in others.tolist()]
                learned, kept = (others[part] for part in split_by_class(labels, CHOOSING, seed))
                chosen[place] = _chosen(states_ND, label_N, learned, kept, len(heads.labels))
            penalty, temperature = chosen[place]
            fitted = states_ND[others], label_N[others]
            head, _ = fit_head(*fitted, *fitted, (penalty,), len(heads.labels))
            logits_ENC[place, unseen] = head(states_ND[unseen]) / temperature
            on_heads(number * exits + place + 1, FOLDS * exits)
    return traces_of_logits(logits_ENC, heads, read)


def _chosen(
    states_ND: Tensor, label_N: Tensor, learned: IndexArray, kept: IndexArray, classes: int
) -> tuple[float, float]:
    """The penalty and the temperature that suit texts which were kept back."""
    back = states_ND[kept], label_N[kept]
    head, penalty = fit_head(states_ND[learned], label_N[learned], *back, classes=classes)
    return penalty, temper(head, *back)[1]


def _folds(texts: LabelledTexts, seed: int) -> list[tuple[IndexArray, IndexArray]]:
    """Places to fit to, and those that are read by what was fitted, by fold.

    A class of one text is unknown to the heads that read it.
    """
    rng = np.random.default_rng(seed)
    fold_N = np.empty(len(texts), np.int64)
    by_class = np.array(texts.labels)
    for name in texts.classes:
        places = rng.permutation(np.flatnonzero(by_class == name))
        fold_N[places] = np.arange(len(places)) % FOLDS
    return [
        (np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)) for fold in range(FOLDS)
    ]
