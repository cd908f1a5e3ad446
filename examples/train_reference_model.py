"""Train a small language model of Python source with exits, from what this machine has.

    python examples/train_reference_model.py runs/model --minutes 90 --threads 2

The texts are the standard library and the installed packages, so nothing is downloaded. Reading
and tokenizing them, compiling, and the held-out losses come on top of `--minutes`, which is the
time of training alone. Shape suffixes: B batch, T tokens, D width, E exits.
"""

from __future__ import annotations

import math
import os
import platform
import sysconfig
import time
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer import Option

from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.documents import Document

REFERENCE = Path(__file__).resolve().parents[1] / "models" / "reference"
END = "<|endoftext|>"
HELD_OUT_SHARE = 0.05  # of files, by the hash of their content
HELD_OUT_BATCHES = 16
TOKENIZER_FILES = 2000  # a vocabulary of 4,096 hardly changes with more
TEST_FOLDERS = frozenset({"test", "tests", "testing", "idle_test"})
WARM_UP_SHARE = 0.03  # of the time budget
FINAL_RATE_SHARE = 0.02  # of the peak learning rate
LOG_EVERY = 25  # steps
Stream = NDArray[np.int32]
BF16 = torch.autocast("cpu", dtype=torch.bfloat16)


class Recipe(NamedTuple):
    """How to train: what the command line says; `exits` maps a layer to its loss's weight."""

    minutes: float
    batch: int
    length: int
    exits: dict[int, float]
    muon: bool
    rate: float
    seed: int
    compiled: bool


def is_test(path: str) -> bool:
    *folders, name = path.split("/")
    named = name.startswith("test_") or name.endswith("_test.py") or name == "conftest.py"
    return named or not TEST_FOLDERS.isdisjoint(folders)


def gather(max_files: int | None) -> list[Document]:
    """Python files of the standard library and of the installed packages, in order of hash."""
    packages = Path(sysconfig.get_path("purelib"))
    found = load_corpus(None, min_chars=200) + load_corpus(packages, min_chars=200)
    usable = (each for each in found if each.path.endswith(".py") and not is_test(each.path))
    unique = {each.digest: each for each in usable}
    return [unique[digest] for digest in sorted(unique)][:max_files]


def is_held_out(document: Document) -> bool:
    # The end of the range that offramp's test split is taken from: these files stay unseen there.
    return int(document.digest[-8:], 16) / 16**8 >= 1 - HELD_OUT_SHARE


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:TOKENIZER_FILES], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=context
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Stream:
    """One stream of tokens, each text followed by the end token."""
    parts = []
    for text in track(texts, "tokenizing"):
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int32))
    return np.concatenate(parts)


class ExitLosses(nn.Module):
    """Next-token loss of each exit: the model's own norm and head after that layer."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.exits = tuple(recipe.exits)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return losses_E in nats per token."""
        body, targets = self.model.model, tokens_BT[:, 1:].flatten()
        hidden_BTD = body.embed_tokens(tokens_BT[:, :-1])
        rotary = body.rotary_emb(hidden_BTD, torch.arange(hidden_BTD.shape[1])[None])
        losses = []
        for depth, layer in enumerate(body.layers, 1):
            # Without a mask, HF's SDPA attention is causal.
            hidden_BTD = layer(hidden_BTD, attention_mask=None, position_embeddings=rotary)
            if depth in self.exits:
                logits = self.model.lm_head(body.norm(hidden_BTD)).float()
                losses.append(cross_entropy(logits.flatten(0, 1), targets))
        return torch.stack(losses)


def make_optimizers(model: LlamaForCausalLM, muon: bool) -> list[torch.optim.Optimizer]:
    hidden = [each for each in model.model.layers.parameters() if each.ndim == 2]
    known = {id(each) for each in hidden}
    rest = [each for each in model.parameters() if id(each) not in known]
    others = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    if muon:
        # Updates as large as AdamW's, so that one learning rate fits both.
        return [others, torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")]
    return [others, torch.optim.AdamW(hidden, betas=(0.9, 0.95), weight_decay=0.1)]


def rate_share(spent: float) -> float:
    """Share of the peak learning rate after this share of the time budget."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(spent, 1.0))
    return min(1.0, spent / WARM_UP_SHARE) * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * cosine)


def cut(stream_T: Stream, starts_B: NDArray[np.int64], length: int) -> Tensor:
    windows = [stream_T[start : start + length + 1] for start in starts_B]
    return torch.from_numpy(np.stack(windows)).long()


def rounded(losses_E: Tensor) -> list[float]:
    return [round(loss, 3) for loss in losses_E.tolist()]


def step(model: nn.Module, optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    model.zero_grad()


def train(model: LlamaForCausalLM, stream_T: Stream, recipe: Recipe) -> tuple[int, list[str]]:
    """Take steps until the time is spent; return their number, and the log."""
    losses_of = torch.compile(ExitLosses(model, recipe), disable=not recipe.compiled)
    weights_E = torch.tensor(list(recipe.exits.values()))
    optimizers = make_optimizers(model, recipe.muon)
    generator = np.random.default_rng(recipe.seed)

    def backward() -> Tensor:
        starts = generator.integers(0, len(stream_T) - recipe.length, recipe.batch)
        with BF16:
            losses_E: Tensor = losses_of(cut(stream_T, starts, recipe.length))
        (losses_E @ weights_E).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
        return losses_E.detach()

    backward()  # compiles, before the clock starts
    model.zero_grad()
    steps, log, spent_s, budget_s = 0, [], 0.0, recipe.minutes * 60
    started = time.monotonic()
    with Progress(BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")) as bar:
        task = bar.add_task("training", total=budget_s)
        while spent_s < budget_s:
            losses_E = backward()
            step(model, optimizers, recipe.rate * rate_share(spent_s / budget_s))
            steps, spent_s = steps + 1, time.monotonic() - started
            if steps % LOG_EVERY == 0:
                speed = steps * recipe.batch * recipe.length / spent_s
                log.append(f"{steps} {spent_s:.0f}s tok/s {speed:.0f} {rounded(losses_E)}")
            bar.update(task, completed=spent_s, description=log[-1] if log else "training")
    return steps, log


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream_T: Stream, recipe: Recipe) -> list[float]:
    """Held-out nats per token of each exit, over windows spread evenly."""
    last = len(stream_T) - recipe.length - 1
    starts = np.linspace(0, last, HELD_OUT_BATCHES * recipe.batch).astype(np.int64)
    losses_of, losses = ExitLosses(model, recipe), []
    for some in track(np.split(starts, HELD_OUT_BATCHES), "held-out losses"):
        with BF16:
            losses.append(losses_of(cut(stream_T, some, recipe.length)))
    return rounded(torch.stack(losses).mean(0))


def run(out: Path, config: LlamaConfig, recipe: Recipe, max_files: int | None) -> None:
    documents = gather(max_files)
    texts = [each.text for each in documents if not is_held_out(each)]
    held_out = [each.text for each in documents if is_held_out(each)]
    tokenizer = train_tokenizer(texts, config.vocab_size, config.max_position_embeddings)
    stream_T = encode(tokenizer, texts)
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    steps, log = train(model, stream_T, recipe)
    losses_E = evaluate(model, encode(tokenizer, held_out), recipe)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.log").write_text("\n".join([*log, f"val {losses_E}\n"]), encoding="utf-8")
    data = f"{len(texts)} files, {len(stream_T)} tokens; {len(held_out)} other files are held out"
    seen = f"{steps} steps, {steps * recipe.batch * recipe.length / len(stream_T):.2f} of an epoch"
    (out / "README.md").write_text(card(config, recipe, data, seen, losses_E), encoding="utf-8")
    print(f"{seen}, held-out losses {losses_E} at {list(recipe.exits)}, saved in {out}")


def card(config: LlamaConfig, recipe: Recipe, data: str, seen: str, losses_E: list[float]) -> str:
    """The model card."""
    rows = zip(recipe.exits.items(), losses_E, strict=True)
    optimizer = "Muon" if recipe.muon else "AdamW"
    table = "\n".join(f"| {layer} | {weight} | {loss} |" for (layer, weight), loss in rows)
    return f"""# A small LM of Python source, trained to exit

Llama architecture, {config.num_hidden_layers} layers, width {config.hidden_size}, byte-level BPE
of {config.vocab_size} tokens, context {config.max_position_embeddings}, bf16.

## Data

Python files of the CPython {platform.python_version()} standard library and of the packages beside
it (tests left out, deduplicated, lines ≤ 400 characters):
{data}, chosen by the hash of their content.

## Training

{recipe.minutes} minutes on {torch.get_num_threads()} CPU threads (torch {torch.__version__}, bf16
autocast): {seen}, {recipe.batch} windows of {recipe.length} tokens a step. {optimizer} for the
hidden matrices, AdamW for the rest, peak rate {recipe.rate}, cosine over the time, seed
{recipe.seed}. Losses on the way: `training.log`.

## Losses per exit

| after layer | weight in training | held-out nats per token |
|---|---|---|
{table}

## Limits

It writes text that looks like Python, not correct Python. Only the exits above were trained.
"""


def parse_exits(text: str) -> dict[int, float]:
    """`3:.15,12:1` as {3: 0.15, 12: 1.0}."""
    pairs = (pair.split(":") for pair in text.split(","))
    try:
        return {int(layer): float(weight) for layer, weight in pairs}
    except ValueError as error:
        raise typer.BadParameter("write layer:weight,layer:weight", param_hint="--exits") from error


def check(recipe: Recipe, config: LlamaConfig) -> None:
    exits, last = list(recipe.exits), config.num_hidden_layers
    if exits != sorted(exits) or exits[0] < 1 or exits[-1] != last:
        raise typer.BadParameter(f"layers must ascend and end at {last}", param_hint="--exits")
    if recipe.length > config.max_position_embeddings:
        raise typer.BadParameter("is longer than the model's context", param_hint="--length")
    if recipe.muon and not hasattr(torch.optim, "Muon"):
        raise typer.BadParameter("needs torch 2.9; take --adamw", param_hint="--muon")


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the model; made if missing.")],
    config: Annotated[Path, Option(exists=True, help="Folder of a Llama config.json.")] = REFERENCE,
    minutes: Annotated[float, Option(min=0.1, help="Time of training, minutes.")] = 90.0,
    threads: Annotated[int, Option(min=1, help="CPU threads.")] = os.cpu_count() or 1,
    max_files: Annotated[int | None, Option(min=200, help="Files; all by default.")] = None,
    batch: Annotated[int, Option(min=1, help="Windows per step.")] = 16,
    length: Annotated[int, Option(min=8, help="Tokens per window.")] = 256,
    exits: Annotated[str, Option(help="Layer:weight of each loss.")] = "3:.15,6:.15,9:.2,12:1",
    muon: Annotated[bool, Option("--muon/--adamw", help="For the hidden matrices.")] = True,
    rate: Annotated[float, Option(min=0.0, help="Peak learning rate.")] = 4e-3,
    seed: Annotated[int, Option(help="Of the weights and of the windows.")] = 0,
    compiled: Annotated[bool, Option("--compile/--no-compile", help="Needs a compiler.")] = True,
) -> None:
    """Train a tokenizer and a Llama with exits on this machine's Python files."""
    torch.set_num_threads(threads)
    shape = LlamaConfig.from_pretrained(config)
    recipe = Recipe(minutes, batch, length, parse_exits(exits), muon, rate, seed, compiled)
    check(recipe, shape)
    run(out, shape, recipe, max_files)


if __name__ == "__main__":
    typer.run(main)
