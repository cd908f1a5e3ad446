"""How to fit heads that classify, and what can be refused before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from offramp.agents.classifying.labelled_texts import TEXT, require_share
from offramp.controller.errors import ConfigError
from offramp.worker.classifying.sequence_stack import SequenceStack, parse_pool
from offramp.worker.model.loading import parse_dtype, require_device

HEADS, MODEL, JOINT = "heads", "model", "joint"
FITS = (HEADS, MODEL, JOINT)
"""What is fitted: heads to the model as it is, the model along with them, or gates along."""

ONLY_WITH = {MODEL: ("epochs", "lr", "batch_tokens", "checkpoint_every"), JOINT: ("cost",)}
"""Settings that one way to fit alone reads."""

MOST_EXITS = 12
"""Exits placed at most, unless some are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyTuneConfig:
    """How to fit a head per exit to a frozen model.

    Attributes:
        model: Folder of an encoder or a causal LM in Hugging Face format.
        data: File of texts with labels, ``.csv`` or ``.jsonl``.
        text_field: Name of the field that holds the text.
        label_field: Name of the field that holds the label; "" is the only other one.
        exits: Layers to fit below full depth; () takes all, or twelve evenly spaced.
        pool: What of a sequence heads read; "" takes what suits the family.
        held_out: Share of each class that heads are not fitted to: half of it sets penalties and
            temperatures, the other half says how well they do.
        dtype: Number format of the frozen weights; heads are float32.
        device: Device that the model runs on.
        threads: Torch threads.
        seed: Seeds the split, and what is trained.
        fit: What is fitted, one of ``FITS``.
        cost: With gates, what a text's full depth counts beside the cross-entropy, nats.
        epochs: Passes over the texts in which the whole model is trained.
        lr: The highest learning rate, of all weights.
        batch_tokens: Tokens per step, padding included; a text that is longer goes alone.
        checkpoint_every: Steps between two checkpoints.
    """

    model: str
    data: Path
    text_field: str = TEXT
    label_field: str = ""
    exits: tuple[int, ...] = ()
    pool: str = ""
    held_out: float = 0.3
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    seed: int = 0
    fit: str = HEADS
    cost: float = 0.1
    epochs: int = 3
    lr: float = 5e-5
    batch_tokens: int = 512
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ConfigError("fit", f"{self.fit!r} is unknown", f"Use {', '.join(FITS)}")
        if self.fit == MODEL and self.dtype != "float32":
            raise ConfigError("dtype", f"{self.dtype} is too coarse to train in", "Use float32")
        if not 0 <= self.cost < float("inf"):
            raise ConfigError("cost", f"{self.cost} is not in [0, ∞)", "Use 0.01 to 1")
        if not 0 < self.lr < 1:
            raise ConfigError("lr", f"{self.lr} is not in (0, 1)", "Use 1e-5 to 1e-4")
        for name in ("epochs", "batch_tokens", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(name, f"{getattr(self, name)} is below 1", "Use 1 or more")
        require_share("held_out", self.held_out)
        if self.threads < 1:
            raise ConfigError("threads", f"{self.threads} is below 1", "Use 1 or more")
        if self.pool:
            parse_pool(self.pool)
        parse_dtype(self.dtype)
        require_device(self.device)


def exits_of_stack(stack: SequenceStack, asked: tuple[int, ...]) -> tuple[int, ...]:
    """The layers to fit, full depth last.

    Raises:
        ConfigError: those asked for do not ascend below the model's depth.
    """
    if not asked:
        step = -(-stack.layers // MOST_EXITS)
        return (*range(step, stack.layers, step), stack.layers)
    if list(asked) != sorted(set(asked)) or not all(1 <= each < stack.layers for each in asked):
        raise ConfigError(
            "exits",
            f"{','.join(map(str, asked))} do not ascend within 1 to {stack.layers - 1}",
            f"The model has {stack.layers} layers, and the last has a head in any case",
        )
    return (*asked, stack.layers)
