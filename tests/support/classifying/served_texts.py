"""A service that classifies texts with a small random encoder."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from offramp.worker.classifying.classified_text import ClassifiedText
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.text_service import TextService
from offramp.worker.decoding.request import PolicySnapshot
from support.classifying.sequence_models import ByLength, encoder_stack, random_heads

ROWS, WAITING = 4, 8
SHORT = PolicySnapshot(7, "d" * 64, ByLength({1: 2, 3: 4}))


class Served:
    def __init__(self) -> None:
        self.classifier = Classifier(encoder_stack(), random_heads())
        self.current = SHORT
        self.service = TextService(
            self.classifier, lambda: self.current, rows=ROWS, max_waiting=WAITING
        )

    def classify(self, texts: list[list[int]], **options: Any) -> list[ClassifiedText]:
        found: list[ClassifiedText] = self.run(lambda service: service.classify(texts, **options))
        return found

    def run(self, ask: Callable[[TextService], Awaitable[Any]]) -> Any:
        async def within() -> Any:
            return await asyncio.wait_for(ask(self.service), 60)

        return asyncio.run(within())


def sequences(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 97, rng.integers(1, 8)).tolist() for _ in range(count)]
