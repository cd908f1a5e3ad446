"""Run ``offramp calibrate``: a setting with a certificate, or one picked from measured points."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from offramp.agents.calibration.calibrate import (
    Calibration,
    MeasuredWith,
    Promise,
    calibrate,
    parse_promise,
    require_enough,
    require_fingerprints,
)
from offramp.agents.calibration.calibration_documents import (
    CalibrationDocument,
    calibration_windows,
    unseen_documents,
    with_lines,
)
from offramp.agents.calibration.losses import (
    DISAGREEMENT,
    EDIT_SIMILARITY,
    CompletedLines,
    LossSource,
    OnPolicy,
    Replayed,
    require_loss,
)
from offramp.agents.calibration.pick import Picked, load_rows, parse_wish, pick
from offramp.agents.calibration.setting_families import SettingFamily, family_of, load_points
from offramp.agents.placing.contenders import CHOSEN
from offramp.controller.adapters.adapter_folder import keep_adapters, kept_in
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certificate import Walked
from offramp.deploy.cli import options
from offramp.deploy.cli.classifying import Data, Heads, LabelSource
from offramp.deploy.cli.console import console, say
from offramp.envs.traces.candidate_file import load_candidates
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.spec import WorkerSpec, load_engine

CERTIFIED = "certified"
"""Folder, beside the contenders, of the bundle that a calibration certified."""

REPORT = "calibration.json"
FOR_TOKENS = (
    "traces", "corpus", "replay", "translators", "prompt_tokens", "new_tokens", "kv_mode",
    "max_pending", "weights", "slots", "unit", "quality", "latency_budget", "energy_budget",
)  # fmt: skip
WITH_HEADS = "means nothing with --heads"
"""Options that say nothing of a classification, and why they are refused."""

NOTHING_CERTIFIED = 3
"""Exit status when no setting passed."""


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("calibrate")(calibrate_policies)


Delta = Annotated[float, typer.Option(help="Bound on the mean loss.")]
Epsilon = Annotated[
    float | None, typer.Option(help="Probability that it may not hold.", show_default="0.05")
]
TestMethod = Annotated[str, typer.Option(help="hoeffding-bentkus|betting|binomial|conformal.")]
LossName = Annotated[
    str,
    typer.Option(
        "--loss",
        help="disagreement|edit-similarity; with --heads, label-error|lost-labels.",
        show_default="disagreement; label-error",
    ),
]
Independent = Annotated[str, typer.Option(help="Independent draws: document|token.")]
FamilyName = Annotated[
    str, typer.Option(help="Whose settings to walk.", show_default="that of the chosen policy")
]
Quality = Annotated[
    float | None, typer.Option(help="End at the cheapest measured point that agrees so much.")
]
LatencyBudget = Annotated[
    float | None, typer.Option(help="Or at the best within this share of full depth's time.")
]
EnergyBudget = Annotated[
    float | None, typer.Option(help="Or at the best within this share of its energy.")
]
Out = Annotated[
    Path | None, typer.Option(help="New folder.", show_default="certified, beside the policies")
]


def calibrate_policies(
    context: typer.Context,
    policies: Annotated[Path, typer.Option(help="Folder that `offramp train` wrote.")],
    traces: Annotated[Path | None, typer.Option(help="Folder that `offramp record` wrote.")] = None,
    heads: Heads = None,
    data: Data = None,
    loss: LossName = "",
    delta: Delta = 0.05,
    epsilon: Epsilon = None,
    method: TestMethod = "hoeffding-bentkus",
    unit: Independent = "document",
    family: FamilyName = "",
    steps: Annotated[int, typer.Option(min=2, help="Settings to walk at most.")] = 16,
    quality: Quality = None,
    latency_budget: LatencyBudget = None,
    energy_budget: EnergyBudget = None,
    out: Out = None,
    model: options.Model = options.DEFAULT_MODEL,
    corpus: options.Corpus = None,
    documents: Annotated[int, typer.Option(min=1, help="Calibration documents at most.")] = 200,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Read of each at full depth.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each that losses count.")] = 96,
    replay: Annotated[
        bool, typer.Option("--replay", help="Replay full-depth passes: cheaper, and optimistic.")
    ] = False,
    kv_mode: options.CacheMode = "project",
    max_pending: options.MaxPending = 8,
    dtype: options.Dtype = "float32",
    weights: options.Weights = "native",
    device: options.Device = "cpu",
    threads: options.Threads = 1,
    slots: Annotated[int, typer.Option(min=1, help="Documents decoded together.")] = 16,
    translators: options.KeptTranslators = None,
) -> None:
    """Find the most eager setting whose loss is bounded, and write its certified bundle.

    Exit status 3: no setting passed. Nothing is certified, and full depth remains.
    """
    given = locals() | {"typed": options.options_typed(context)}
    given["promise"] = parse_promise(delta, epsilon, method, unit)
    given["out"] = out or policies / CERTIFIED
    given["wish"] = parse_wish(quality, latency_budget, energy_budget)
    (_calibrate_tokens if heads is None else _calibrate_labels)(given)


def _calibrate_labels(given: dict[str, Any]) -> None:
    """Certify a policy that classifies, from the options of the command."""
    options.require_unused({name: name in given["typed"] for name in FOR_TOKENS}, WITH_HEADS)
    options.require_new_folder("out", given["out"], but=REPORT)
    torch.set_num_threads(given["threads"])
    source = LabelSource(**{each.name: given[each.name] for each in fields(LabelSource)})
    picked, walked = _family(given)
    named = walked.bundle.manifest.adapters
    measured, texts, labels = source.open(given["loss"], given["promise"], named)
    given["adapters"] = source.heads
    _certify(given, measured, walked, texts, labels, 0, picked)


def _calibrate_tokens(given: dict[str, Any]) -> None:
    """Certify a policy that decodes, from the options of the command."""
    options.require_unused({"data": given["data"]}, "means nothing without --heads")
    traces, policies, out = given["traces"], given["policies"], given["out"]
    if traces is None:
        raise ConfigError("traces", "is not given", "Name the folder, or give --heads")
    loss = given["loss"] or DISAGREEMENT
    require_loss(loss, given["unit"], replay=given["replay"])
    options.require_new_folder("out", out, but=REPORT)
    picked, walked = _family(given)
    translators = given["translators"] or kept_in(policies)
    config = options.engine_config(
        given["kv_mode"], given["max_pending"], translators, given["weights"]
    )
    same = {name: given[name] for name in ("model", "dtype", "device", "threads", "slots")}
    engine = load_engine(WorkerSpec(**same, engine=config))
    measured = MeasuredWith.of(engine)
    require_fingerprints(walked.bundle, measured)
    prompt_tokens = given["prompt_tokens"]
    length = prompt_tokens + given["new_tokens"] + 1
    unseen = unseen_documents(given["corpus"], traces)
    windows = calibration_windows(given["model"], unseen, length, given["documents"])
    replayed = traces if given["replay"] else None
    promise = given["promise"]
    windows, losses = _losses(promise, loss, engine, windows, prompt_tokens, walked, replayed)
    given["adapters"] = config.translators
    _certify(given, measured, walked, windows, losses, prompt_tokens, picked)


def _certify(
    given: dict[str, Any],
    measured: MeasuredWith,
    family: SettingFamily,
    documents: list[CalibrationDocument],
    losses: LossSource,
    prompt_tokens: int,
    picked: Picked | None,
) -> None:
    """Walk the family, write what it came to, and say so."""
    promise, out = given["promise"], given["out"]
    _announce(family, promise, documents, losses, picked)
    found = calibrate(promise, measured, family, documents, losses, prompt_tokens, _show)
    save_calibration(out, promise, found)
    is_apart = out.resolve().parent != given["policies"].resolve()
    if found.bundle is not None and given["adapters"] is not None and is_apart:
        keep_adapters(given["adapters"], out)  # where ``offramp publish`` looks for them
    _conclude(found, picked, out)


def _family(given: dict[str, Any]) -> tuple[Picked | None, SettingFamily]:
    policies, wish = given["policies"], given["wish"]
    points = load_points(policies)
    name = given["family"] or _chosen_family(policies)
    picked = pick(load_rows(policies), name, wish) if wish else None
    last = None if picked is None else picked.setting
    return picked, family_of(points, name, given["steps"], last)


def _chosen_family(policies: Path) -> str:
    try:
        return str(PolicyBundle.load(policies / CHOSEN).manifest.training["family"])
    except (ConfigError, KeyError) as error:
        raise ConfigError(
            "family", f"{policies} holds no chosen policy", "Name one, or run `offramp evaluate`"
        ) from error


def _losses(
    promise: Promise,
    loss: str,
    engine: AdaptiveEngine,
    windows: list[CalibrationDocument],
    prompt_tokens: int,
    family: SettingFamily,
    replayed: Path | None,
) -> tuple[list[CalibrationDocument], LossSource]:
    """The documents that the loss can be measured on, and what measures it."""
    if loss == EDIT_SIMILARITY:
        cut = with_lines(windows, engine.tokenizer, prompt_tokens)
        require_enough(promise, len(cut))
        return [each for each, _ in cut], CompletedLines(engine, [lines for _, lines in cut])
    require_enough(promise, len(windows))
    if replayed is None:
        return windows, OnPolicy(engine, windows, prompt_tokens)
    exits, table_VK = family.bundle.manifest.exits, load_candidates(replayed)
    return windows, Replayed(engine, windows, prompt_tokens, exits, table_VK)


def _announce(
    family: SettingFamily,
    promise: Promise,
    windows: list[CalibrationDocument],
    losses: LossSource,
    picked: Picked | None,
) -> None:
    if picked is not None:
        say(
            f"walking up to {picked.policy}: {picked.value:.3f}{picked.how} "
            f"on {picked.split} documents"
        )
    bound = f"{losses.loss} ≤ {promise.delta:g}"
    if promise.epsilon is not None:
        bound += f" with probability ≥ {1 - promise.epsilon:g}"
    say(
        f"{family.name}, {family.parameter}: {bound} ({promise.method}), "
        f"{len(windows)} unseen documents, {losses.decode_mode}"
    )


def _show(step: Walked) -> None:
    tested = "" if step.p_value is None else f"   p {step.p_value:.2e}"
    verdict = "passed" if step.passed else "[bold]failed[/]"
    console.print(f"  λ {step.setting:8.4f}   risk {step.risk:.4f}{tested}   {verdict}")


def save_calibration(out: Path, promise: Promise, found: Calibration) -> None:
    """Write what was walked, and the certified bundle if there is one."""
    bundle = found.bundle
    report = {
        "loss": found.loss,
        **asdict(promise),
        "n": found.outcome.n,
        "walked": [asdict(step) for step in found.outcome.walked],
        "certified": None if bundle is None else bundle.manifest.digest,
    }
    write_durably(out / REPORT, json.dumps(report, indent=1).encode())
    if bundle is not None:
        bundle.save(out)


def _conclude(found: Calibration, picked: Picked | None, out: Path) -> None:
    if found.bundle is None:
        say(f"nothing is certified: full depth remains ({out / REPORT})")
        raise typer.Exit(NOTHING_CERTIFIED)
    certificate = found.bundle.manifest.certificate
    assert certificate is not None
    if not found.outcome.walked[-1].passed and picked is not None:
        console.print(f"the walk ended before {picked.policy}: a safer setting is certified")
    say(f"certified λ {certificate.setting:.4f}: {certificate.statement} → {out}")
