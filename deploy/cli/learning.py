"""Run ``offramp record``, ``train`` and ``drift``: documents, traces, policies, and their age."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.agents.drafting.draft_parts import DraftingConfig
from offramp.agents.learning.ppo import PPOConfig
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.drift import find_drift
from offramp.agents.recording.own_text import TOGETHER, OwnText
from offramp.agents.recording.record import is_finished, record_traces
from offramp.agents.recording.record_config import RecordConfig
from offramp.agents.recording.training_data import has_begun
from offramp.agents.training.train_config import GATE_FAMILIES, TrainConfig
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.classifying import CLASSIFY, Data, Heads, require_unused, teach_classes
from offramp.deploy.cli.console import console, keeping, progress, say
from offramp.deploy.cli.drafting import teach
from offramp.deploy.cli.prompting import PROMPTS, WEIGHT, Steps, Weight, teach_prompts_here
from offramp.deploy.cli.train_by_file import train_by_file, train_here
from offramp.deploy.serve.serve_app import ray_session
from offramp.deploy.serve.settings import Settings
from offramp.envs.traces.store import TraceStore
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.loading import layers_and_vocab
from offramp.worker.model.precision import Precision
from offramp.worker.spec import WorkerSpec

Goal = Annotated[
    str,
    typer.Option("--for", help="What is taught: exits, drafting (lossless), prompts or classify."),
]
DraftModel = Annotated[
    str, typer.Option(help="With --for drafting or prompts: folder of the model.")
]
DraftDtype = Annotated[
    str,
    typer.Option(help="With --for drafting or prompts: weights' dtype.", show_default="float32"),
]
DraftTemperature = Annotated[
    float, typer.Option(help="With --for drafting: of the model's own text, which is recorded.")
]
Insight = Annotated[
    bool,
    typer.Option(
        "--insight", help="With --for drafting: drafters also read states, and the token before."
    ),
]
Targets = Annotated[
    str, typer.Option(help="Offline agreements at which to place policies, like .92,.96.")
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="With --config, or for prompts: go on from --out's checkpoint."),
]
Seeds = Annotated[
    str,
    typer.Option(
        help="With --config: one run per seed, like 0,1,2, as Ray tasks. For prompts: one policy "
        "per seed."
    ),
]
Cluster = Annotated[
    str | None, typer.Option(help="With --config: cluster to join.", show_default="RAY_ADDRESS")
]

STEPS = 1_500_000
"""PPO's steps where nobody says; a lesson on prompts has a default of its own."""

DRIFTED = 3
"""Exit status of ``drift`` for a difference that is no chance; errors have 1 and 2."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("record")(record)
    app.command("train")(train_policies)
    app.command("drift")(drift)


def record(
    out: Annotated[Path, typer.Option(help="New folder for the traces.")],
    model: options.Model = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    documents: options.Documents = 320,
    tokens_per_document: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    exits: Annotated[
        str, typer.Option(help="Layers to probe, like 3,6,9.", show_default="quarters of the depth")
    ] = "",
    candidates: Annotated[int, typer.Option(min=2, help="Candidate tokens per token.")] = 64,
    recorders: Annotated[int, typer.Option(min=1, help="Ray actors at work.")] = 2,
    dtype: options.Dtype = "float32",
    weights: options.Weights = "native",
    device: options.Device = "cpu",
    threads: options.SharedThreads = "auto",
    translators: options.Translators = None,
    states: Annotated[bool, typer.Option(help="Keep the hidden states too (float16).")] = False,
    own_text: options.OwnText = False,
    temperature: options.Temperature = 0.0,
    prompt_share: options.PromptShare = 0.25,
) -> None:
    """Decode documents at full depth on Ray workers and store per-exit features.

    Cut off, it keeps what is recorded, and the same command goes on from there.
    """
    config = RecordConfig(
        worker=WorkerSpec(
            model=str(Path(model).resolve()) if Path(model).exists() else model,
            dtype=dtype,
            device=device,
            threads=options.parse_threads(threads, recorders),
            slots=TOGETHER,
            engine=EngineConfig(
                translators=translators and translators.resolve(),
                precision=Precision.parse(weights),
            ),
        ),
        corpus=corpus,
        documents=documents,
        tokens_per_document=tokens_per_document,
        exits=options.parse_layers("exits", exits),
        candidates=candidates,
        recorders=recorders,
        states=states,
        own_text=OwnText.asked_for(own_text, temperature, prompt_share),
    )
    _record(config, out)


def _record(config: RecordConfig, out: Path) -> None:
    """Record on a Ray of our own, or on a cluster's."""
    settings = Settings.from_environment()
    if not has_begun(out):
        options.require_new_folder("out", out)
    elif is_finished(config, out):
        say(f"{out} holds this recording, finished; it is left alone")
        return
    _require_recordable(config, settings)
    cpus = max(config.recorders, os.cpu_count() or 1)
    with (
        keeping(out),
        ray_session(settings.ray_address, cpus),
        progress("record", "tokens", own_text="texts", costs="") as advance,
    ):
        report = record_traces(config, out, lambda stage, done, total: advance(done, total, stage))
    if not report.tokens:
        say(f"All tokens had been recorded; what they cost was measured → {out}")
        return
    console.print(
        f"{report.tokens:,} tokens of {sum(report.documents.values())} documents in "
        f"{report.seconds:.1f} s ({report.tokens_per_s:,.0f} tokens/s) → {out}"
    )


def train_policies(
    out: Annotated[Path, typer.Option(help="New folder for the trained policies.")],
    goal: Goal = "exits",
    heads: Heads = None,
    data: Data = None,
    traces: Annotated[Path | None, typer.Option(help="Folder that `offramp record` wrote.")] = None,
    model: DraftModel = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    translators: options.Translators = None,
    dtype: DraftDtype = "",
    exits: options.DraftExits = "",
    temperature: DraftTemperature = 0.0,
    insight: Insight = False,
    weight: Weight = WEIGHT,
    steps: Steps = None,
    targets: Targets = ".92,.95,.97,.985",
    costs: options.Costs = None,
    threads: options.Threads = 1,
    seed: options.Seed = 0,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with more settings; see docs/training.md.")
    ] = None,
    resume: Resume = False,
    seeds: Seeds = "",
    ray_address: Cluster = None,
) -> None:
    """Teach policies when to leave, from recorded traces; or when to draft and when to verify."""
    asked = locals()
    if goal == PROMPTS:
        teach_prompts_here(asked, out)
        return
    require_unused({"weight": weight != WEIGHT}, f"means nothing without --for {PROMPTS}")
    steps = asked["steps"] = steps or STEPS
    given = {"exits": exits, "corpus": corpus, "dtype": dtype}
    if goal == "drafting":
        teach(config, _lesson(asked), steps, out)
        return
    if goal == CLASSIFY:
        teach_classes(asked, out)
        return
    if goal != "exits":
        raise ConfigError(
            "for", f"{goal!r} is unknown", f"Use exits, drafting, {PROMPTS} or {CLASSIFY}"
        )
    require_unused({"heads": heads, "data": data}, f"means nothing without --for {CLASSIFY}")
    require_unused(given | {"temperature": temperature}, "is that of the recording")
    require_unused({"insight": insight}, "means nothing without --for drafting")
    if config is not None:
        require_unused({"translators": translators}, "is a setting of the file")
        train_by_file(config, traces, out, resume=resume, seeds=seeds, ray_address=ray_address)
        return
    if traces is None:
        raise ConfigError("traces", "is not given", "Name the folder, or give --config")
    if resume or seeds or ray_address:
        raise ConfigError("config", "is not given, and --resume, --seeds and --ray-address need it")
    options.require_new_folder("out", out)
    placed_at = options.parse_list("targets", targets, float, "numbers", ".9,.97")
    train_here(_gates(traces, costs, translators, placed_at, steps, (threads, seed)), out)


def _lesson(asked: Mapping[str, Any]) -> DraftingConfig:
    """How drafting is taught, from the options of the command."""
    require_unused(
        {name: asked[name] for name in ("traces", "costs", "seeds", "resume", "heads", "data")},
        "does not go with --for drafting, which records and measures for itself",
    )
    same = {name: asked[name] for name in ("model", "threads", "seed", "temperature", "insight")}
    return DraftingConfig(
        **same,
        corpus=str(asked["corpus"] or ""),
        translators=str(asked["translators"] or ""),
        dtype=asked["dtype"] or "float32",
        exits=options.parse_exits("exits", asked["exits"]),
    )


def drift(
    traces: Annotated[Path, typer.Argument(help="A recording of now, by `offramp record`.")],
    against: Annotated[Path, typer.Option(help="The recording that policies were trained on.")],
    false_alarms: Annotated[
        float, typer.Option(min=0.002, max=0.5, help="Chance of an alarm if nothing changed.")
    ] = 0.01,
) -> None:
    """Compare the features of two recordings; exit status 3 if they differ beyond chance."""
    before = TraceStore.open(against).read("train")
    found = find_drift(before, TraceStore.open(traces).read())
    first, second = found.document_counts
    has_drifted = found.p_value <= false_alarms
    verdict = "they differ beyond chance" if has_drifted else "no difference beyond chance"
    console.print(
        f"{verdict}: p = {found.p_value:.3g}, over {first} and {second} documents; most at "
        f"{found.column}, by {found.distance:.2f} (Kolmogorov-Smirnov)"
    )
    if has_drifted:
        raise typer.Exit(DRIFTED)


def _gates(
    traces: Path,
    costs: Path | None,
    translators: Path | None,
    targets: tuple[float, ...],
    steps: int,
    machine: tuple[int, int],
) -> TrainConfig:
    """Settings of the command line; ``machine`` is threads and seed."""
    threads, seed = machine
    return TrainConfig(
        traces=str(traces),
        costs=str(costs or ""),
        translators=str(translators or ""),
        families=GATE_FAMILIES,
        seed=seed,
        threads=threads,
        targets=targets,
        gate=PPOConfig(steps=steps),
    )


def _require_recordable(config: RecordConfig, settings: Settings) -> None:
    """Every check that needs no worker, before Ray is started."""
    options.require_loadable(config.worker, settings)
    layers, vocab = layers_and_vocab(config.worker.model)
    if config.exits and config.exits[-1] >= layers:
        raise ConfigError(
            "exits",
            f"{config.exits[-1]} is not below the model's {layers} layers",
            f"Name layers from 1 to {layers - 1}",
        )
    if config.candidates > vocab:
        raise ConfigError("candidates", f"{config.candidates} exceed the vocabulary of {vocab}")
    load_corpus(config.corpus, limit=config.documents)
