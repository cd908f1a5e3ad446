"""Run ``offramp evaluate``: choose on validation documents, report on test documents."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from offramp.agents.calibration.calibrate import require_adapters
from offramp.agents.calibration.pick import EVALUATION
from offramp.agents.evaluation.archive import Archive
from offramp.agents.evaluation.assess import Assessment, assess
from offramp.agents.evaluation.evaluation_rows import TimeAndEnergy
from offramp.agents.evaluation.matched import quality_metrics
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.page import (
    conditions,
    energy_section,
    gap_headline,
    gaps,
    savings_headline,
    single_points,
    volumes,
)
from offramp.agents.evaluation.protocol import AssessConfig
from offramp.agents.evaluation.report import EvaluationReport, write_report
from offramp.agents.placing.contenders import CHOSEN, Contender, load_contenders, load_saved
from offramp.agents.recording.corpus import SPLIT, load_corpus, recorded_digests
from offramp.agents.recording.training_data import load_training_data
from offramp.controller.adapters.adapter_folder import kept_in
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import MODEL_LAYERS
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, keeping, progress, say
from offramp.deploy.cli.tables import evaluation_table
from offramp.worker.decoding.request import KVMode
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.spec import WorkerSpec, load_engine

SLOTS = 16
"""Rows decoded together where only quality is measured."""

TIMED_TOKENS = 32
"""Most tokens of a document that are timed."""

UNFINISHED = "evaluation.unfinished"
"""Folder of what is measured, beside the policies, until the evaluation is whole."""

CHOOSING = ("target_agreement", "target_edit_loss", "seed")
"""Settings that nothing measured depends on."""

TOLD = (
    "agreement", "accuracy", "perplexity", "edit_similarity", "mean_layers", "wall_ratio", "tokens",
)  # fmt: skip
"""What the chosen policy's bundle says of its evaluation."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("evaluate")(evaluate_policies)


def evaluate_policies(
    policies: Annotated[Path, typer.Option(help="Folder that `offramp train` wrote.")],
    traces: Annotated[Path, typer.Option(help="Folder that `offramp record` wrote.")],
    model: options.Model = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    documents: options.Documents = 320,
    validation_documents: Annotated[
        int, typer.Option(min=2, help="Documents the choice is made on.")
    ] = 16,
    test_documents: Annotated[int, typer.Option(min=2, help="Documents reported on.")] = 24,
    timed_documents: Annotated[int, typer.Option(min=1, help="Of either, timed and metered.")] = 12,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of each that are read at full depth first.")
    ] = 64,
    tokens: Annotated[
        int, typer.Option(min=3, help="Tokens decoded after them; shorter documents stay out.")
    ] = 96,
    lines: Annotated[int, typer.Option(min=0, help="Lines completed in each; 0 for none.")] = 4,
    target_agreement: Annotated[
        float, typer.Option(help="Least on-policy agreement of what is chosen.")
    ] = 0.93,
    target_edit_loss: Annotated[
        float | None,
        typer.Option(help="Choose by this relative loss of line-completion edit similarity."),
    ] = None,
    dtype: options.Dtype = "float32",
    weights: options.Weights = "native",
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    kv_mode: options.CacheMode = "project",
    max_pending: options.MaxPending = 8,
    translators: options.KeptTranslators = None,
    seed: options.Seed = 0,
) -> None:
    """Choose a policy on validation documents and report every policy on test documents.

    Cut off, it keeps what is measured, and the same command goes on from there.
    """
    config = AssessConfig(
        model=model,
        corpus=corpus,
        corpus_limit=documents,
        validation_documents=validation_documents,
        test_documents=test_documents,
        timed_documents=timed_documents,
        protocol=_protocol(prompt_tokens, tokens, lines),
        target_agreement=target_agreement,
        target_edit_loss=target_edit_loss,
        threads=threads,
        seed=seed,
    )
    translators = translators or kept_in(policies)
    engine_config = options.engine_config(kv_mode, max_pending, translators, weights)
    spec = WorkerSpec(
        model=model, dtype=dtype, device=device, threads=threads, slots=SLOTS, engine=engine_config
    )
    _require_open(engine_config.kv_mode)
    _evaluate(config, spec, policies, traces)


def _evaluate(config: AssessConfig, spec: WorkerSpec, policies: Path, traces: Path) -> None:
    """Measure what is not measured yet, then write and show what was found."""
    contenders, engine = _load(policies, traces, spec)
    require_recorded(config.corpus, config.corpus_limit, traces)
    settings = _settings(config, spec, engine, policies)
    archive = Archive.open(policies / UNFINISHED, settings, "policies")
    with keeping(archive.folder), progress("evaluate", "runs") as advance:
        found = assess(
            config,
            engine,
            contenders,
            lambda stage, done, total: advance(done, total, stage),
            archive,
        )
    save_assessment(policies, contenders, found, engine, config)
    shutil.rmtree(archive.folder)
    console.print(evaluation_table(found.test, contenders[found.chosen].name))
    say(f"energy: {found.energy.label}")
    console.print(f"{found.reason} → {policies / CHOSEN}")
    console.print(f"report: {policies / 'report.html'}, {policies / 'report.md'}")


def _protocol(prompt_tokens: int, tokens: int, lines: int) -> Protocol:
    return Protocol(
        prompt_tokens=prompt_tokens,
        new_tokens=tokens,
        timed_tokens=min(TIMED_TOKENS, tokens - 1),
        lines=lines,
    )


def _settings(
    config: AssessConfig, spec: WorkerSpec, engine: AdaptiveEngine, policies: Path
) -> dict[str, Any]:
    """All that measurements depend on; models and corpora go by what they hold."""
    documents = load_corpus(config.corpus, limit=config.corpus_limit)
    digests = ",".join(each.digest for each in documents).encode()
    told = {k: v for k, v in asdict(config).items() if k not in ("model", "corpus", *CHOOSING)}
    return {
        **told,
        "corpus": hashlib.sha256(digests).hexdigest(),
        "model": engine.model_fingerprint,
        "translators": engine.decoder.translators.digest,
        "dtype": spec.dtype,
        "device": spec.device,
        "kv_mode": spec.engine.kv_mode,
        "max_pending": spec.engine.max_pending,
        "policies": [
            [each.name, hashlib.sha256(bundle.blob).hexdigest()]
            for each, bundle in load_saved(policies)
        ],
    }


def _load(policies: Path, traces: Path, spec: WorkerSpec) -> tuple[list[Contender], AdaptiveEngine]:
    """The contenders, and the engine of the model that they were trained for."""
    contenders = load_contenders(policies)
    if not contenders:
        raise ConfigError("policies", f"{policies} holds no policy", "Run `offramp train` first")
    facts = load_training_data(traces).facts
    engine = load_engine(spec)
    if engine.model_fingerprint != facts.model:
        raise ConfigError(
            "model",
            f"{spec.model!r} is not the model of {traces}",
            "Name the one that was recorded, with the --weights it had",
        )
    for _, bundle in load_saved(policies):
        require_adapters(bundle, engine)
    return contenders, engine


def _require_open(mode: KVMode) -> None:
    if mode == "verify":
        raise ConfigError(
            "kv_mode",
            "verify emits what full depth would: there is no agreement to choose by",
            "Use project or defer",
        )


def require_recorded(corpus: Path | None, documents: int | None, traces: Path) -> None:
    """Refuse to evaluate on another corpus: its test documents may be among those trained on.

    Raises:
        ConfigError: the documents are not those whose split was recorded.
        TraceError: the corpus cannot be read.
    """
    recorded = recorded_digests(traces)
    if {document.digest for document in load_corpus(corpus, limit=documents)} != recorded:
        raise ConfigError(
            "corpus",
            f"is not the one whose split {traces / SPLIT} holds",
            "Give the --corpus and --documents of offramp record",
        )


def save_assessment(
    policies: Path,
    contenders: list[Contender],
    found: Assessment,
    engine: AdaptiveEngine,
    config: AssessConfig,
) -> None:
    """Write the rows, the report with its pictures, and the chosen policy's bundle."""
    chosen = contenders[found.chosen].name
    rows: dict[str, Sequence[TimeAndEnergy]]
    rows = {"validation": found.validation, "test": found.test, "matched": found.matched}
    plain = {name: [asdict(row) for row in each] for name, each in rows.items()}
    ratio = found.energy.ratios[found.chosen - 1]
    energy = {
        "policy": chosen,
        "method": found.energy.method.value,
        "source": found.energy.source,
        "full_depth_j_per_token": found.energy.full_j,
        "ratio": ratio and asdict(ratio),
    }
    told = {**plain, "chosen": chosen, "reason": found.reason, "energy": energy}
    write_durably(policies / EVALUATION, json.dumps(told, indent=1).encode())
    write_report(_report(found, engine, config, policies), policies)
    bundle = PolicyBundle.load(policies / f"{found.chosen:02d}")
    row = found.test[found.chosen]
    metrics = {name: getattr(row, name) for name in TOLD} | {"reason": found.reason}
    metrics[MODEL_LAYERS] = engine.stack.layers
    manifest = replace(bundle.manifest, metrics={**bundle.manifest.metrics, **metrics})
    PolicyBundle(manifest, bundle.blob).save(policies / CHOSEN)


def _report(
    found: Assessment, engine: AdaptiveEngine, config: AssessConfig, policies: Path
) -> EvaluationReport:
    metrics = quality_metrics(found.measured[0].scores)
    promises = gaps(found.measured)
    counts = {"validation": found.documents[0], "test": found.documents[1]}
    return EvaluationReport(
        title="Early-exit policies on held-out documents",
        headlines=[
            f"{found.reason[0].upper()}{found.reason[1:]}.",
            *(savings_headline(found.matched, metric, 0.01) for metric in metrics),
            gap_headline(promises),
        ],
        conditions=conditions(
            engine, config.protocol, counts, threads=config.threads, seed=config.seed
        ),
        matched=found.matched,
        points=single_points(found.measured, found.chosen),
        gaps=promises,
        depths={row.policy: row.depths for row in found.test if row.family != "fixed exit"},
        layers=engine.stack.layers,
        extra=[
            energy_section(
                [(row.policy, row.family) for row in found.test[1:]],
                found.energy,
                min(config.timed_documents, found.documents[1]),
                policies,
            ),
            volumes(found.measured, metrics),
        ],
    )
