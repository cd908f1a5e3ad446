"""The best of several sequences, found with few of them run to the end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offramp.controller.errors import RequestError
from offramp.worker.classifying.best_of import BestOf, bounds_of, log_odds
from offramp.worker.classifying.class_heads import ClassHead, ClassHeads
from offramp.worker.classifying.classifier import Classifier
from support.classifying.sequence_models import LABELS, encoder_stack, like_heads, random_heads

TEXTS = [np.random.default_rng(n).integers(5, 97, 3 + n % 7).tolist() for n in range(64)]


@pytest.fixture(scope="module")
def scores_NEC() -> np.ndarray:
    """Log-odds of every class after every layer, of each text alone."""
    heads = like_heads()
    found = []
    for layer in heads.exits:
        shallow = Classifier(encoder_stack(), heads)
        shallow.stack.layers = layer  # its forward, cut off there
        found.append(np.concatenate([log_odds(shallow.run([text]).probs_NC) for text in TEXTS]))
    return np.stack(found, axis=1)


@pytest.mark.parametrize("label", range(len(LABELS)))
def test_bounds_that_hold_of_all_find_the_best_with_fewer_layers(
    scores_NEC: np.ndarray, label: int
) -> None:
    heads = like_heads(bounds_of(scores_NEC, 1.0))
    race = BestOf(Classifier(encoder_stack(), heads), label)
    layers = 0
    for start in range(0, len(TEXTS), 16):
        best, found = race.run(TEXTS[start : start + 16])
        wanted = scores_NEC[start : start + 16, -1, label]
        assert best == wanted.argmax()
        assert found.layers_N[best] == 5
        assert log_odds(found.probs_NC)[best, label] == pytest.approx(wanted.max(), abs=1e-3)
        # Each is as it would be alone, where it was left; and layers are those that were run.
        for place, layer in enumerate(found.layers_N.tolist()):
            left_C = scores_NEC[start + place, layer - 1]
            np.testing.assert_allclose(log_odds(found.probs_NC[place]), left_C, atol=1e-3)
        assert found.row_layers == found.layers_N.sum()
        layers += found.row_layers
    assert layers < 0.9 * 5 * len(TEXTS)


def test_bounds_hold_of_the_share_and_follow_the_exit() -> None:
    rng = np.random.default_rng(0)
    here_NC = rng.normal(size=(4000, 2))
    last_NC = here_NC * [2.0, -1.0] + [1.0, 0.0] + rng.normal(size=(4000, 2)) * [0.1, 1.0]
    [bound_C2] = bounds_of(np.stack([here_NC, last_NC], axis=1), 0.9)
    np.testing.assert_allclose(bound_C2[:, 0], [2.0, -1.0], atol=0.05)
    # 1.2816 standard deviations of the noise above the line.
    np.testing.assert_allclose(bound_C2[:, 1], [1.128, 1.2816], atol=0.05)
    above_NC = here_NC * bound_C2[:, 0].numpy() + bound_C2[:, 1].numpy() >= last_NC
    np.testing.assert_allclose(above_NC.mean(0), 0.9, atol=0.001)


def test_heads_without_bounds_are_refused() -> None:
    with pytest.raises(RequestError, match="fitted before there were any"):
        BestOf(Classifier(encoder_stack(), random_heads()), 0)
    by_layer = {5: ClassHead(torch.ones(2, 48), torch.zeros(2))}
    assert ClassHeads(("a", "b"), "mean", by_layer).has_bounds  # full depth alone needs none
