"""``offramp record``, ``train`` and ``evaluate``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from offramp.agents.assess import AssessConfig, Assessment, assess
from offramp.agents.contenders import Contender
from offramp.agents.corpus import load_corpus
from offramp.agents.phat import PhatConfig
from offramp.agents.plots import draw_exit_depths, draw_frontier
from offramp.agents.ppo import PPOConfig
from offramp.agents.record import SPLIT, RecordConfig, record_traces
from offramp.agents.study import load_study
from offramp.agents.train import TrainConfig, load_contenders, train
from offramp.controller.bundle import PolicyBundle
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.deploy.commands.options import (
    DEFAULT_MODEL,
    CacheMode,
    Corpus,
    Costs,
    Device,
    Documents,
    Dtype,
    MaxPending,
    Model,
    Seed,
    SharedThreads,
    Threads,
    Translators,
    parse_kv_mode,
    parse_layers,
    parse_shares,
    parse_threads,
    require_loadable,
    require_new_folder,
)
from offramp.deploy.commands.staged import train_by_file
from offramp.deploy.console import console, evaluation_table, progress
from offramp.deploy.serve_app import ray_session
from offramp.deploy.settings import Settings
from offramp.worker.actor import WorkerSpec, load_engine
from offramp.worker.config import EngineConfig
from offramp.worker.loading import layers_and_vocab
from offramp.worker.sequence import KVMode

CHOSEN = "chosen"
"""Folder, beside the contenders, of the bundle that an evaluation picked."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("record")(record)
    app.command("train")(train_policies)
    app.command("evaluate")(evaluate_policies)


def record(
    out: Annotated[Path, typer.Option(help="New folder for the traces.")],
    model: Model = DEFAULT_MODEL,
    corpus: Corpus = None,
    documents: Documents = 320,
    tokens_per_document: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    exits: Annotated[
        str, typer.Option(help="Layers to probe, like 3,6,9 [default: quarters of the depth].")
    ] = "",
    candidates: Annotated[int, typer.Option(min=2, help="Candidate tokens per token.")] = 64,
    recorders: Annotated[int, typer.Option(min=1, help="Ray actors at work.")] = 2,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: SharedThreads = "auto",
    translators: Translators = None,
    states: Annotated[bool, typer.Option(help="Keep the hidden states too (float16).")] = False,
) -> None:
    """Decode documents at full depth on Ray workers and store per-exit features."""
    settings = Settings.from_environment()
    config = RecordConfig(
        worker=WorkerSpec(
            model=str(Path(model).resolve()) if Path(model).exists() else model,
            dtype=dtype,
            device=device,
            threads=parse_threads(threads, recorders),
            engine=EngineConfig(translators=translators and translators.resolve()),
        ),
        corpus=corpus,
        documents=documents,
        tokens_per_document=tokens_per_document,
        exits=parse_layers("exits", exits),
        candidates=candidates,
        recorders=recorders,
        states=states,
    )
    _require_recordable(config, out, settings)
    cpus = max(recorders, os.cpu_count() or 1)
    with ray_session(settings.ray_address, cpus), progress("record", "tokens") as advance:
        report = record_traces(config, out, advance)
    console.print(
        f"{report.tokens:,} tokens of {sum(report.documents.values())} documents in "
        f"{report.seconds:.1f} s ({report.tokens_per_s:,.0f} tokens/s) → {out}"
    )


def train_policies(
    out: Annotated[Path, typer.Option(help="Folder for the trained policies.")],
    traces: Annotated[Path | None, typer.Option(help="Folder that `offramp record` wrote.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="PPO environment steps.")] = 1_500_000,
    targets: Annotated[
        str, typer.Option(help="Offline agreements at which to place policies, like .92,.96.")
    ] = ".92,.95,.97,.985",
    costs: Costs = None,
    threads: Threads = 1,
    seed: Seed = 0,
    config: Annotated[
        Path | None, typer.Option(help="TOML file: the staged method; see docs/training.md.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --config: go on from the checkpoint in --out.")
    ] = False,
    seeds: Annotated[
        str, typer.Option(help="With --config: one run per seed, like 0,1,2, as Ray tasks.")
    ] = "",
    ray_address: Annotated[
        str | None, typer.Option(help="With --config: cluster to join [default: RAY_ADDRESS].")
    ] = None,
) -> None:
    """Train p̂ and PPO on recorded traces, and place them and the baselines."""
    if config is not None:
        train_by_file(config, traces, out, resume=resume, seeds=seeds, ray_address=ray_address)
        return
    if traces is None:
        raise ConfigError("traces", "is not given", "Name the folder, or give --config")
    if resume or seeds or ray_address:
        raise ConfigError("config", "is not given, and --resume, --seeds and --ray-address need it")
    require_new_folder("out", out)
    settings = TrainConfig(
        phat=PhatConfig(seed=seed),
        ppo=PPOConfig(steps=steps, seed=seed),
        targets=parse_shares("targets", targets),
        threads=threads,
    )
    with progress("PPO", "steps") as advance:
        contenders = train(settings, traces, out, advance, costs)
    console.print(f"{len(contenders)} policies → {out}")


def evaluate_policies(
    policies: Annotated[Path, typer.Option(help="Folder that `offramp train` wrote.")],
    traces: Annotated[Path, typer.Option(help="Folder that `offramp record` wrote.")],
    model: Model = DEFAULT_MODEL,
    corpus: Corpus = None,
    documents: Documents = 320,
    test_documents: Annotated[int, typer.Option(min=1, help="Documents reported on.")] = 24,
    timed_documents: Annotated[int, typer.Option(min=1, help="Of those, timed.")] = 12,
    target_agreement: Annotated[
        float, typer.Option(help="Least on-policy agreement of what is chosen.")
    ] = 0.93,
    costs: Costs = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    threads: Threads = 1,
    kv_mode: CacheMode = "project",
    max_pending: MaxPending = 8,
    translators: Translators = None,
    seed: Seed = 0,
) -> None:
    """Choose a policy on validation documents and report every policy on test documents."""
    config = AssessConfig(
        model=model,
        corpus=corpus,
        corpus_limit=documents,
        test_documents=test_documents,
        timed_documents=timed_documents,
        target_agreement=target_agreement,
        threads=threads,
        seed=seed,
    )
    mode = parse_kv_mode(kv_mode)
    spec = WorkerSpec(
        model=model,
        dtype=dtype,
        device=device,
        threads=threads,
        slots=test_documents,
        engine=EngineConfig(kv_mode=mode, max_pending=max_pending, translators=translators),
    )
    _require_open(mode)
    contenders = load_contenders(policies)
    if not contenders:
        raise ConfigError("policies", f"{policies} holds no policy", "Run `offramp train` first")
    study = load_study(traces, costs)
    engine = load_engine(spec)
    if engine.model_fingerprint != study.facts.model:
        raise ConfigError(
            "model", f"{model!r} is not the model of {traces}", "Name the one that was recorded"
        )
    require_recorded(corpus, documents, traces)
    for difference in study.costs.differences(dtype=dtype, device=device, threads=threads):
        console.print(f"[yellow]warning[/] costs: {difference}; prices are only a lead")
    with progress("evaluate", "runs") as advance:
        found = assess(config, engine, contenders, study.costs, lambda _, *count: advance(*count))
    save_assessment(policies, contenders, found, study.costs.layers)
    console.print(evaluation_table(found.test, contenders[found.chosen].name))
    console.print(f"{found.reason} → {policies / CHOSEN}")


def _require_open(mode: KVMode) -> None:
    if mode == "verify":
        raise ConfigError(
            "kv_mode",
            "verify emits what full depth would: there is no agreement to choose by",
            "Use project or defer",
        )


def _require_recordable(config: RecordConfig, out: Path, settings: Settings) -> None:
    """Every check that needs no worker, before Ray is started."""
    require_new_folder("out", out)
    require_loadable(config.worker, settings)
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


def require_recorded(corpus: Path | None, documents: int, traces: Path) -> None:
    """Refuse to evaluate on another corpus: its test documents may be among those trained on.

    Raises:
        ConfigError: the documents are not those whose split was recorded.
        TraceError: the corpus cannot be read.
    """
    try:
        recorded = json.loads((traces / SPLIT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("traces", f"{traces / SPLIT} is unreadable", "Record again") from error
    if {document.digest for document in load_corpus(corpus, limit=documents)} != set(recorded):
        raise ConfigError(
            "corpus",
            f"is not the one whose split {traces / SPLIT} holds",
            "Give the --corpus and --documents of offramp record",
        )


def save_assessment(
    policies: Path, contenders: list[Contender], found: Assessment, layers: int
) -> None:
    """Write the rows, the pictures and the chosen policy's bundle with its measured metrics."""
    chosen = contenders[found.chosen].name
    rows = {"validation": found.validation, "test": found.test}
    plain = {split: [asdict(row) for row in each] for split, each in rows.items()}
    content = json.dumps({**plain, "chosen": chosen, "reason": found.reason}, indent=1)
    write_durably(policies / "evaluation.json", content.encode())
    draw_frontier(found.test, chosen, policies / "frontier.png")
    depths = {row.policy: row.depths for row in found.test if row.family != "fixed exit"}
    draw_exit_depths(depths, layers, policies / "exit_depths.png")
    bundle = PolicyBundle.load(policies / f"{found.chosen:02d}")
    row = found.test[found.chosen]
    metrics = {
        "agreement": row.agreement,
        "accuracy": row.accuracy,
        "mean_layers": row.mean_layers,
        "wall_ratio": row.wall_ratio,
        "tokens": row.tokens,
        "reason": found.reason,
    }
    manifest = replace(bundle.manifest, metrics={**bundle.manifest.metrics, **metrics})
    PolicyBundle(manifest, bundle.blob).save(policies / CHOSEN)
