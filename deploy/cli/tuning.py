"""Run ``offramp import`` and ``tune``: bring a model in, and fit exits to it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.agents.classifying.classify_config import HEADS
from offramp.agents.recording.own_text import OwnText, only_texts
from offramp.agents.tuning.exit_losses import KL
from offramp.agents.tuning.kv_tuning import KVTuneConfig, require_fill_exits, tune_kv
from offramp.agents.tuning.state_feed import STATES
from offramp.agents.tuning.tune import tune
from offramp.agents.tuning.tune_config import TuneConfig, require_exits
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.classifying import CLASSIFY, TOKENS, tune_heads
from offramp.deploy.cli.console import console, keeping, progress, say
from offramp.deploy.cli.tables import fill_table, tuning_losses_table, tuning_table
from offramp.worker.hf.gguf_import import find_gguf, import_gguf
from offramp.worker.model.loading import parse_dtype

Minutes = Annotated[
    float | None, typer.Option(help="Take as many steps as fit.", show_default="--steps")
]
Loss = Annotated[
    str, typer.Option(help="kl, of what is said; features: distance of states, and a tenth of it.")
]
LossTokens = Annotated[
    int, typer.Option(min=0, help="Most frequent tokens that the loss is over; 0: all.")
]

StatesGb = Annotated[
    float, typer.Option(help="Most GB of disk for states that later passes read; 0: none.")
]

KV = Annotated[
    bool, typer.Option("--kv", help="Fit what skipped layers are filled through, in closed form.")
]
Beside = Annotated[
    Path | None,
    typer.Option("--translators", help="With --kv: adapters for the same exits, written along."),
]
Exits = Annotated[
    str, typer.Option(help="Layers to fit, like 3,6,9.", show_default="quarters of the depth")
]
Kind = Annotated[str, typer.Option(help="translator, or layer: a decoder layer after each exit.")]
Rank = Annotated[
    int | None, typer.Option(help="Rank of each translator or map.", show_default="32; --kv: 256")
]
Inner = Annotated[
    int | None,
    typer.Option(
        help="With --kind layer: inner width of its MLP; 0: none.", show_default="the model's"
    ),
]
Shared = Annotated[
    bool, typer.Option("--shared", help="With --kind layer: one layer for all exits.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")]
CheckpointEvery = Annotated[
    int, typer.Option(help="Steps between checkpoints.", show_default="50; --fit model: 500")
]

BatchTokens = Annotated[
    int, typer.Option(help="Tokens per step.", show_default="2048; --fit model: 512")
]
Rate = Annotated[
    float, typer.Option(help="Peak learning rate.", show_default="1e-3; --fit model: 5e-5")
]
Task = Annotated[
    str, typer.Option(help="tokens: exits that emit tokens; classify: heads that classify texts.")
]
Data = Annotated[
    Path | None, typer.Option(help="With --task classify: .csv or .jsonl of texts with labels.")
]
TextField = Annotated[str, typer.Option(help="With --data: field of the text.")]
LabelField = Annotated[
    str, typer.Option(help="With --data: field of the label.", show_default="the only other one")
]
HeadPool = Annotated[
    str,
    typer.Option(help="With --task classify: mean, first or last.", show_default="the family's"),
]
Fit = Annotated[
    str,
    typer.Option(
        help="With --task classify: heads, to the model as it is; model, all weights with them; "
        "joint, heads and gates to each other."
    ),
]
Cost = Annotated[
    float, typer.Option(help="With --fit joint: what a text's full depth counts, nats.")
]
HeldOut = Annotated[
    float | None,
    typer.Option(
        help="Validation documents measured; with --task classify: share of each class kept back.",
        show_default="48; classify: 0.3",
    ),
]

FOR_CLASSES = frozenset({
    "out", "task", "model", "data", "text_field", "label_field", "pool", "exits", "held_out",
    "resume", "dtype", "device", "threads", "seed", "fit", "cost", "epochs", "lr", "batch_tokens",
    "checkpoint_every",
})  # fmt: skip
"""Options of ``offramp tune`` that mean something with --task classify."""

ONLY_CLASSES = ("data", "text_field", "label_field", "pool", "fit", "cost", "epochs")
"""Options of ``offramp tune`` that mean nothing without --task classify."""

FOR_KV = frozenset({
    "out", "kv", "translators", "model", "corpus", "documents", "exits", "rank", "length",
    "held_out", "dtype", "device", "threads", "seed",
})  # fmt: skip
"""Options of ``offramp tune`` that mean something with --kv."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("import")(import_model)
    app.command("tune")(tune_exits)


def import_model(
    gguf: Annotated[
        str, typer.Argument(help="A GGUF file, or an installed package that ships one.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    dtype: options.Dtype = "bfloat16",
) -> None:
    """Turn a GGUF file into a model folder; quantised weights are undone."""
    options.require_new_folder("out", out)
    file = find_gguf(gguf)
    import_gguf(file, out, parse_dtype(dtype))
    say(f"{file.name} → {out}")


def tune_exits(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for what is fitted.")],
    task: Task = TOKENS,
    model: options.Model = options.DEFAULT_MODEL,
    data: Data = None,
    text_field: TextField = "text",
    label_field: LabelField = "",
    pool: HeadPool = "",
    fit: Fit = HEADS,
    cost: Cost = 0.1,
    epochs: Annotated[int, typer.Option(help="With --fit model: passes over the texts.")] = 3,
    corpus: options.Corpus = None,
    documents: options.Documents = 320,
    own_text: options.OwnText = False,
    temperature: options.Temperature = 0.0,
    prompt_share: options.PromptShare = 0.25,
    exits: Exits = "",
    kind: Kind = "translator",
    kv: KV = False,
    translators: Beside = None,
    rank: Rank = None,
    inner: Inner = None,
    shared: Shared = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 300,
    minutes: Minutes = None,
    batch_tokens: BatchTokens = 2048,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    lr: Rate = 1e-3,
    loss: Loss = KL,
    loss_tokens: LossTokens = 4096,
    held_out: HeldOut = None,
    candidates: Annotated[int, typer.Option(help="Candidate tokens per token.")] = 64,
    states_gb: StatesGb = 8.0,
    checkpoint_every: CheckpointEvery = 50,
    resume: Resume = False,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    seed: options.Seed = 0,
) -> None:
    """Fit exits of a model that was not trained to exit; full depth stays as it is."""
    asked = locals()
    if task == CLASSIFY:
        problem = f"means nothing with --task {CLASSIFY}"
        tune_heads(options.require_meant(context, FOR_CLASSES, problem), out, resume)
        return
    if task != TOKENS:
        raise ConfigError("task", f"{task!r} is unknown", f"Use {TOKENS} or {CLASSIFY}")
    typed = options.options_typed(context)
    options.require_unused(
        {name: name in typed for name in ONLY_CLASSES}, f"means nothing without --task {CLASSIFY}"
    )
    if kv:
        _tune_kv(context, out)
        return
    if translators is not None:
        raise ConfigError("translators", "means nothing without --kv", "Leave it out")
    _tune(_token_config(asked), out, resume)


def _token_config(given: dict[str, Any]) -> TuneConfig:
    """The settings of translators or adapter layers, from the options of the command."""
    own = OwnText.asked_for(given["own_text"], given["temperature"], given["prompt_share"])
    renamed = {
        "exits": options.parse_layers("exits", given["exits"]),
        "rank": 32 if given["rank"] is None else given["rank"],
        "learning_rate": given["lr"],
        "held_out": 48 if given["held_out"] is None else _documents(given["held_out"]),
        "own_text": own,
    }
    same = {each.name for each in fields(TuneConfig)} - renamed.keys()
    return TuneConfig(**{name: given[name] for name in same}, **renamed)


def _documents(held_out: float) -> int:
    """Read a number of documents that are held out; of a classification it is a share.

    Raises:
        ConfigError: it is no whole number.
    """
    if not held_out.is_integer():
        problem = f"{held_out:g} is no number of documents"
        raise ConfigError("held_out", problem, f"Use 1 or more; shares are for --task {CLASSIFY}")
    return int(held_out)


def _tune_kv(context: typer.Context, out: Path) -> None:
    """Fit a map of the fill, from what was given of the options that mean something to it."""
    given = options.require_meant(context, FOR_KV, "means nothing with --kv")
    given["exits"] = options.parse_layers("exits", given.get("exits", ""))
    if "held_out" in given:
        given["held_out"] = _documents(given["held_out"])
    given["beside"] = given.pop("translators", None)
    given = {"model": context.params["model"]} | given
    config = KVTuneConfig(
        **{name: each for name, each in given.items() if name not in ("out", "kv")}
    )
    require_fill_exits(config)
    options.require_new_folder("out", out)
    with progress("states", "texts") as advance:
        found = tune_kv(config, out, lambda stage, done, total: advance(done, total, stage))
    console.print(fill_table(found))
    console.print(f"{found[0].tokens:,} held-out tokens that stayed → {out}")


def _tune(config: TuneConfig, out: Path, resume: bool) -> None:
    """Tune, and show what it came to."""
    require_exits(config)
    # Cut off before the first checkpoint, it just goes on from the model's texts.
    if not resume and not only_texts(out, STATES):
        options.require_new_folder("out", out)
    with keeping(out, "--resume goes on"), progress("tune", "tokens", own_text="texts") as advance:
        report = tune(
            config,
            out,
            resume=resume,
            on_progress=lambda stage, done, total, said: advance(done, total, stage, said),
        )
    console.print(tuning_losses_table(report))
    console.print(tuning_table(report))
    console.print(f"{report.documents} held-out documents, {report.tokens:,} tokens → {out}")
