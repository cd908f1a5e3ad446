"""Train a model's own layers to exit: the LayerSkip recipe, for those who may touch the backbone.

    python examples/layerskip_recipe.py models/reference runs/layerskip --minutes 10
    python examples/layerskip_recipe.py models/reference runs/layerskip --minutes 10 --resume
    offramp train --for drafting --model runs/layerskip --out runs/drafter

The last line says what the exits are worth, lossless.

Where `offramp tune` leaves the model alone, this changes it: layers are dropped more often the
deeper they lie, and every exit gets a share of the loss through the shared norm and head.

Source: Elhoushi et al. 2024, "LayerSkip: Enabling Early Exit Inference and Self-Speculative
Decoding", section 4.1. Layers are counted from 0 there and in the functions below. Shape suffixes:
B batch, T tokens, D width, L layers.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast
from typer import Option

from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.documents import Document
from offramp.agents.recording.documents import encode as encode_document
from offramp.agents.training.resuming import Resumable
from offramp.worker.model.loading import load_model, load_tokenizer

Curriculum = Literal["rotational", "gradual"]
EVALUATED = 32  # held-out windows
KEPT_EVERY_S = 60.0  # least seconds of training between checkpoints
KEPT_SHARE = 0.03  # most of the time that writing them may take


class LayerSkipRecipe(NamedTuple):
    """How to train; times are shares of the run, 0 to 1."""

    minutes: float
    batch: int
    length: int
    rate: float
    p_max: float
    e_scale: float
    curriculum: Curriculum
    rotation: int
    from_scratch: bool
    seed: int
    dtype: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeCheckpoint(Resumable):
    """A run between two steps; ``spent`` is the share of its time, ``generator`` torch's state."""

    command: ClassVar[str] = "examples/layerskip_recipe.py"

    settings: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    steps: int
    spent: float
    generator: Tensor


def dropout_rates(layers: int, p_max: float, spent: float, from_scratch: bool) -> list[float]:
    """p(l, t) = S(t) · D(l) · p_max with D(l) = e^(l·ln2/(L−1)) − 1: 0 at the first layer, p_max
    at the last. S(t) = e^(t·ln2/(T−1)) − 1 when pretraining from scratch, 1 otherwise.
    """
    ramp = 2.0**spent - 1.0 if from_scratch else 1.0
    return [ramp * (2.0 ** (layer / max(1, layers - 1)) - 1.0) * p_max for layer in range(layers)]


def loss_weights(
    layers: int, e_scale: float, curriculum: Curriculum, rotation: int, step: int, spent: float
) -> dict[int, float]:
    """Weights of the exits in use, summing to 1: ẽ(t, l) = C(t, l) · e(l) / Σ C(t, i) · e(i).

    e(l) = e_scale · Σ_{i≤l} i, and L − 1 more in place of its scale for the last layer. C is 1
    for the last layer; "rotational" turns on every R-th layer, one further each step; "gradual"
    turns exits on from the deepest to the first, the last of them half-way through the run.
    """
    if curriculum == "rotational":
        early = [layer for layer in range(layers - 1) if layer % rotation == step % rotation]
    else:
        enabled = min(layers - 1, int(2 * layers * spent))
        early = list(range(layers - 1 - enabled, layers - 1))
    raw = {layer: e_scale * layer * (layer + 1) / 2 for layer in early}
    raw[layers - 1] = layers - 1 + e_scale * (layers - 2) * (layers - 1) / 2
    total = sum(raw.values())
    return {layer: weight / total for layer, weight in raw.items() if weight > 0}


class SkippingModel(torch.nn.Module):
    """A Hugging Face decoder whose layers may be left out, each for its own rows of the batch."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def states(self, tokens_BT: Tensor, rates_L: list[float] | None) -> list[Tensor]:
        """States [B, T, D] after each layer; x + M·f(x), with M = 0 for the rows that skip."""
        body = self.model.model
        x_BTD = body.embed_tokens(tokens_BT)
        cos_BTH, sin_BTH = body.rotary_emb(x_BTD, torch.arange(tokens_BT.shape[1])[None])
        states = []
        for index, layer in enumerate(body.layers):
            # Without a mask, HF's SDPA attention is causal.
            rotary = (cos_BTH, sin_BTH)
            rate = rates_L[index] if rates_L else 0.0
            keep = torch.nonzero(torch.rand(len(tokens_BT)) >= rate)[:, 0]
            if len(keep) == len(tokens_BT):
                x_BTD = layer(x_BTD, attention_mask=None, position_embeddings=rotary)
            elif len(keep):
                kept = layer(x_BTD[keep], attention_mask=None, position_embeddings=rotary)
                x_BTD = x_BTD.index_copy(0, keep, kept.to(x_BTD.dtype))
            states.append(x_BTD)
        return states

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V] through the shared norm and head."""
        return self.model.lm_head(self.model.model.norm(x_BTD)).float()  # type: ignore[no-any-return]

    def loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Next-token loss, nats per token."""
        return cross_entropy(self.logits(x_BTD).flatten(0, 1), targets_BT.flatten())


def training_loss(
    skipping: SkippingModel, batch: Tensor, recipe: LayerSkipRecipe, step: int, spent: float
) -> Tensor:
    """One batch [B, T + 1] under the dropout and the weights of this moment."""
    layers = len(skipping.model.model.layers)
    rates = dropout_rates(layers, recipe.p_max, spent, recipe.from_scratch)
    weights = loss_weights(layers, recipe.e_scale, recipe.curriculum, recipe.rotation, step, spent)
    states = skipping.states(batch[:, :-1], rates)
    parts = [
        weight * skipping.loss(states[layer], batch[:, 1:]) for layer, weight in weights.items()
    ]
    return torch.stack(parts).sum()


@torch.no_grad()
def evaluate(
    skipping: SkippingModel, windows: Tensor, dtype: str = "float32"
) -> list[tuple[float, float]]:
    """Held-out loss, and agreement with full depth, after every layer; products as in training."""
    found = []
    with products(dtype):
        for window in torch.split(windows, 1):
            states = skipping.states(window[:, :-1], None)
            full_T = skipping.logits(states[-1])[0].argmax(-1)
            for x_BTD in states:
                logits_TV = skipping.logits(x_BTD)[0]
                loss = cross_entropy(logits_TV, window[0, 1:])
                found.append((loss, (logits_TV.argmax(-1) == full_T).float().mean()))
    means = torch.tensor(found).view(len(windows), -1, 2).mean(0)
    return [(loss, agreement) for loss, agreement in means.tolist()]


def products(dtype: str) -> torch.autocast:
    """Run products in bfloat16, if they are to be; weights stay as they are."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


def train(
    skipping: SkippingModel,
    stream_T: Tensor,
    recipe: LayerSkipRecipe,
    out: Path,
    begun: RecipeCheckpoint | None = None,
) -> int:
    """Take steps until the time is spent, with a checkpoint each minute; their number."""
    optimizer = torch.optim.AdamW(skipping.parameters(), lr=recipe.rate, betas=(0.9, 0.95))
    steps, spent, whole_s = 0, 0.0, 60 * recipe.minutes
    if begun is not None:
        skipping.load_state_dict(begun.model)
        optimizer.load_state_dict(begun.optimizer)
        torch.set_rng_state(begun.generator)
        steps, spent = begun.steps, begun.spent
    started = time.monotonic() - spent * whole_s
    keep_at_s = time.monotonic() + KEPT_EVERY_S
    with Progress(BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")) as bar:
        task = bar.add_task("training", total=1.0)
        while spent < 1.0:
            batch = draw(stream_T, recipe.batch, recipe.length)
            with products(recipe.dtype):
                loss = training_loss(skipping, batch, recipe, steps, spent)
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            torch.nn.utils.clip_grad_norm_(skipping.parameters(), 1.0, error_if_nonfinite=True)
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * (0.5 + 0.5 * math.cos(math.pi * spent))
            optimizer.step()
            optimizer.zero_grad()
            steps, spent = steps + 1, (time.monotonic() - started) / whole_s
            if spent >= 1.0 or time.monotonic() > keep_at_s:
                writing_s = -time.monotonic()
                RecipeCheckpoint(
                    settings=recipe._asdict(), model=skipping.state_dict(), steps=steps,
                    optimizer=optimizer.state_dict(), spent=spent, generator=torch.get_rng_state(),
                ).save(out)  # fmt: skip
                writing_s += time.monotonic()
                keep_at_s = time.monotonic() + max(KEPT_EVERY_S, writing_s / KEPT_SHARE)
            bar.update(task, completed=spent, description=f"step {steps} loss {loss.item():.3f}")
    return steps


def draw(stream_T: Tensor, batch: int, length: int) -> Tensor:
    """Windows [B, T + 1] from random places."""
    starts = torch.randint(len(stream_T) - length, (batch,)).tolist()
    return torch.stack([stream_T[start : start + length + 1] for start in starts])


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> Tensor:
    """One stream of tokens, conversations in the model's own chat template."""
    return torch.tensor([token for each in documents for token in encode_document(tokenizer, each)])


def spread(stream_T: Tensor, length: int) -> Tensor:
    """Held-out windows [B, T + 1], spread evenly."""
    starts = np.linspace(0, len(stream_T) - length - 1, EVALUATED).astype(int).tolist()
    return torch.stack([stream_T[start : start + length + 1] for start in starts])


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the model to start from.")],
    out: Annotated[Path, typer.Argument(help="Folder for the trained model.")],
    minutes: Annotated[float, Option(min=0.01, help="Time of training, minutes.")] = 10.0,
    corpus: Annotated[
        Path | None, Option(help="Documents; the standard library by default.")
    ] = None,
    documents: Annotated[int, Option(min=3, help="Documents, over all splits.")] = 320,
    batch: Annotated[int, Option(min=1, help="Windows per step.")] = 8,
    length: Annotated[int, Option(min=8, help="Tokens per window.")] = 256,
    rate: Annotated[float, Option(min=0.0, help="Peak learning rate.")] = 3e-4,
    p_max: Annotated[float, Option(min=0.0, max=1.0, help="Dropout of the last layer.")] = 0.1,
    e_scale: Annotated[float, Option(min=0.0, max=1.0, help="Scale of the exits' losses.")] = 0.2,
    curriculum: Annotated[str, Option(help="rotational or gradual.")] = "rotational",
    rotation: Annotated[int, Option(min=1, help="R of the rotation, in layers.")] = 4,
    from_scratch: Annotated[bool, Option(help="Raise the dropout over the run.")] = False,
    dtype: Annotated[
        str, Option(help="Of products: float32 or bfloat16; weights stay float32.")
    ] = "float32",
    threads: Annotated[int, Option(min=1, help="CPU threads.")] = 1,
    seed: Annotated[int, Option(help="Of the windows and the dropout.")] = 0,
    resume: Annotated[bool, Option("--resume", help="Go on from the checkpoint in OUT.")] = False,
) -> None:
    """Continue training a model so that its early layers can be left at, and save it."""
    if curriculum not in ("rotational", "gradual"):
        raise typer.BadParameter("write rotational or gradual", param_hint="--curriculum")
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter("write float32 or bfloat16", param_hint="--dtype")
    kind: Curriculum = "gradual" if curriculum == "gradual" else "rotational"
    recipe = LayerSkipRecipe(
        minutes, batch, length, rate, p_max, e_scale, kind, rotation, from_scratch, seed, dtype
    )
    begun = RecipeCheckpoint.load(out) if resume else None
    if begun is not None:
        begun.require(recipe._asdict())
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    loaded, tokenizer = load_model(model, torch.float32, "cpu"), load_tokenizer(model)
    skipping = SkippingModel(loaded.requires_grad_(True))
    found = load_corpus(corpus, limit=documents)
    train_T = encode(tokenizer, [each for each in found if each.split == "train"])
    held_out = encode(tokenizer, [each for each in found if each.split == "validation"])
    windows = spread(held_out, length)
    before = evaluate(skipping, windows, dtype)
    steps = train(skipping, train_T, recipe, out, begun)
    after = evaluate(skipping, windows, dtype)
    print("layer  held-out loss (nats)  agreement with full depth")
    for layer, (old, new) in enumerate(zip(before, after, strict=True), 1):
        print(f"{layer:5}  {old[0]:6.3f} → {new[0]:6.3f}       {old[1]:.3f} → {new[1]:.3f}")
    loaded.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{steps} steps, saved in {out}")


if __name__ == "__main__":
    typer.run(main)
