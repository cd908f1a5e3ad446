"""Run ``offramp record`` and ``drift``: documents, traces, and whether others differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.drift import find_drift
from offramp.agents.recording.own_text import TOGETHER, OwnText
from offramp.agents.recording.record import is_finished, record_traces
from offramp.agents.recording.record_config import RecordConfig
from offramp.agents.recording.training_data import has_begun
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, keeping, progress, say
from offramp.deploy.serve.serve_app import ray_session
from offramp.deploy.serve.settings import Settings
from offramp.envs.traces.store import TraceStore
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.loading import layers_and_vocab
from offramp.worker.model.precision import Precision
from offramp.worker.spec import WorkerSpec

DRIFTED = 3
"""Exit status of ``drift`` for a difference that is no chance; errors have 1 and 2."""


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("record")(record)
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
