"""Times classifications under several policies in turn, so that all meet the same machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp.controller.policies.protocols import Policy
from offramp.worker.classifying.classifier import Classifier

ROUND = 48
"""Texts that are timed under one policy before the next has its turn."""


def timed_in_turn(
    contenders: Sequence[tuple[Classifier, Policy]], sequences: Sequence[Sequence[int]], batch: int
) -> NDArray[np.float64]:
    """Time rounds of texts under each policy, the order turning with the rounds.

    Args:
        contenders: P policies, each with what runs it; each runs a batch untimed first.
        sequences: Token ids of texts; what is left of the last whole round is not timed.
        batch: Texts that run together.

    Returns:
        Seconds of each round of ROUND texts under each policy, [rounds, P].
    """
    starts = range(0, len(sequences) - ROUND + 1, ROUND)
    out = np.zeros((len(starts), len(contenders)))
    for classifier, policy in contenders:
        classifier.run(sequences[:batch], policy)
    for number, start in enumerate(starts):
        texts = sequences[start : start + ROUND]
        for turn in range(len(contenders)):
            place = (turn + number) % len(contenders)
            classifier, policy = contenders[place]
            begun = time.perf_counter()
            for first in range(0, ROUND, batch):
                classifier.run(texts[first : first + batch], policy)
            out[number, place] = time.perf_counter() - begun
    return out
