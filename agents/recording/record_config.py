"""How to record, and what can be refused before any work is done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offramp.agents.recording.own_text import OwnText
from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import ascend, is_on_copy
from offramp.worker.spec import WorkerSpec

RECORDED_SPLITS = ("train", "validation")
"""Test documents are never recorded: they are only met on-policy, in evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordConfig:
    """Settings of a recording.

    Attributes:
        worker: What each recorder loads.
        corpus: Folder of documents; None takes the interpreter's standard library.
        documents: Documents to take from the corpus, over all splits; None takes all.
        tokens_per_document: Tokens recorded of each, from a place its digest picks.
        exits: Layers to probe; () places three at the quarters of the depth.
        candidates: Candidate tokens per token.
        recorders: Ray actors at work.
        states: Whether hidden states are kept too, as float16 (2·D bytes per exit and token).
        own_text: How the model goes on from the documents' beginnings, where its own text is
            recorded; None records the documents as they are.
        profile_s: Seconds of measuring what a token's parts cost, once it is set up; `offramp
            profile` takes more care.
    """

    worker: WorkerSpec
    corpus: Path | None = None
    documents: int | None = 320
    tokens_per_document: int = 256
    exits: tuple[int, ...] = ()
    candidates: int = 64
    recorders: int = 2
    states: bool = False
    own_text: OwnText | None = None
    profile_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("tokens_per_document", "recorders"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1")

    def settings(self, exits: tuple[int, ...]) -> dict[str, Any]:
        """What a recording is held to when it goes on, beside the model and its documents."""
        names = ("documents", "tokens_per_document", "candidates", "states")
        told = {name: getattr(self, name) for name in names}
        own = self.own_text and asdict(self.own_text)
        weights = {"dtype": self.worker.dtype, "weights": self.worker.engine.precision.name}
        return {**told, **weights, "exits": exits, "own_text": own}


def quarters(layers: int) -> tuple[int, ...]:
    """Exits after one, two and three quarters of the layers.

    >>> quarters(12)
    (3, 6, 9)
    """
    return tuple(sorted({max(1, layers * part // 4) for part in (1, 2, 3)}))


def require_exits(exits: tuple[int, ...], layers: int) -> None:
    """Refuse exits that are not layers of a model's own, ascending.

    Raises:
        ConfigError: naming them.
    """
    if not ascend(exits) or not all(e < layers and not is_on_copy(e) for e in exits):
        raise ConfigError(
            "exits", f"{exits} do not ascend within [1, {layers - 1}]", "Use layers of the model"
        )
