"""How to fit exit translators, and what can be refused before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from offramp.agents.recording.own_text import OwnText
from offramp.agents.recording.record_config import quarters
from offramp.agents.tuning.exit_losses import KL, LOSSES
from offramp.controller.errors import ConfigError
from offramp.worker.model.loading import layers_and_vocab, parse_dtype
from offramp.worker.model.stack import LayerStack

OnTuning = Callable[[str, int, int, str], None]
"""Told (stage, units done, units in all, what is to be said of it)."""

KINDS = ("translator", "layer")
"""What can be fitted to an exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneConfig:
    """How to fit translators or adapter layers.

    Attributes:
        kind: "translator", or "layer": a decoder layer of its own after each exit.
        model: Folder in Hugging Face format.
        corpus: Folder of documents; None takes the interpreter's standard library.
        documents: Documents to take from the corpus, over all splits; None takes all.
        exits: Layers to fit; () places three at the quarters of the depth.
        rank: r of each translator; a layer has none.
        inner: Inner width of an adapter layer's MLP; None: the model's; 0: it has no MLP.
        shared: Whether all exits have one adapter layer, trained on what each of them shows it.
        steps: Steps of the optimizer.
        minutes: How long they may take: as many are done as fit, by the time of one on the first
            batch. None: ``steps`` are done.
        batch_tokens: Tokens per step, a multiple of ``length``.
        length: Tokens per window.
        learning_rate: Peak rate of Adam.
        loss: "kl", KL(full depth ‖ exit), or "features": smooth L1 to the last layer's state, and
            a tenth of the KL.
        loss_tokens: Most frequent tokens of the training documents that the loss is over; 0 takes
            the whole vocabulary. Agreement is always measured over all.
        held_out: Validation documents measured, at most.
        candidates: Candidate tokens per token in the successor table.
        checkpoint_every: Steps between checkpoints.
        dtype: Weights of the frozen model; translators are always trained in float32.
        device: Device that the model runs on.
        threads: Torch threads; part of what makes a run reproducible.
        seed: Seeds the translators' start and the order of the documents.
        states_gb: Most GB of disk for the states that later passes over the texts read; where a
            pass has more, the model computes them anew in each step.
        own_text: How the model goes on from the documents' beginnings, where exits are fitted to
            its own text; None fits them to the documents as they are.
    """

    kind: str = "translator"
    model: str
    corpus: Path | None = None
    documents: int | None = 320
    exits: tuple[int, ...] = ()
    rank: int = 32
    inner: int | None = None
    shared: bool = False
    steps: int = 300
    minutes: float | None = None
    batch_tokens: int = 2048
    length: int = 256
    learning_rate: float = 1e-3
    loss: str = KL
    loss_tokens: int = 4096
    held_out: int = 48
    candidates: int = 64
    checkpoint_every: int = 50
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    states_gb: float = 8.0
    own_text: OwnText | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError("kind", f"{self.kind!r} is unknown", f"Use {' or '.join(KINDS)}")
        if self.loss not in LOSSES:
            raise ConfigError("loss", f"{self.loss!r} is unknown", f"Use {' or '.join(LOSSES)}")
        if self.kind != "layer" and (self.inner is not None or self.shared):
            name = "shared" if self.shared else "inner"
            raise ConfigError(name, "is for adapter layers", "Add --kind layer, or leave it out")
        for name in ("rank", "steps", "held_out", "checkpoint_every", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1", "Use 1 or more")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise ConfigError("minutes", f"{self.minutes} is no time", "Try 20")
        if not 0 <= self.states_gb < math.inf:
            raise ConfigError("states_gb", f"{self.states_gb} is no size", "Try 8, or 0 for none")
        if not 0 < self.learning_rate <= 1:
            raise ConfigError("lr", f"{self.learning_rate} is not in (0, 1]", "Try 1e-3")
        if self.length < 2 or self.batch_tokens < 1 or self.batch_tokens % self.length:
            raise ConfigError(
                "batch_tokens",
                f"{self.batch_tokens} is no multiple of the window's {self.length} tokens",
                "Use a whole number of windows of 2 tokens or more",
            )


def require_exits(config: TuneConfig) -> tuple[int, ...]:
    """The layers to fit, after every check that needs only the model's config.json.

    Raises:
        ModelError: there is no such model.
        ConfigError: exits that are not below the model's depth, or a table wider than its
            vocabulary.
    """
    layers, vocab = layers_and_vocab(config.model)
    parse_dtype(config.dtype)
    exits = config.exits or quarters(layers)
    if list(exits) != sorted(set(exits)) or not all(1 <= layer < layers for layer in exits):
        raise ConfigError(
            "exits",
            f"{','.join(map(str, exits))} do not ascend within 1 to {layers - 1}",
            f"The model has {layers} layers, and the last needs no translator",
        )
    if not 2 <= config.candidates <= vocab:
        raise ConfigError(
            "candidates", f"{config.candidates} is not between 2 and {vocab}", "Try 64"
        )
    return exits


def require_fit(config: TuneConfig, stack: LayerStack) -> None:
    """Checks that need the loaded model.

    Raises:
        ConfigError: windows longer than its context, or a rank above its width.
    """
    if config.length > stack.context:
        raise ConfigError(
            "length", f"{config.length} exceeds the model's context of {stack.context}"
        )
    if config.rank > stack.width:
        raise ConfigError(
            "rank", f"{config.rank} exceeds the model's width of {stack.width}", "Try 32"
        )
