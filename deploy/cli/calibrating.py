"""Run ``offramp calibrate``: a setting with a certificate, or one picked from measured points."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from offramp.agents.calibration.calibrate import (
    Calibration,
    Promise,
    calibrate,
    require_enough,
    require_fingerprints,
)
from offramp.agents.calibration.calibration_documents import (
    CalibrationDocument,
    calibration_windows,
    unseen_documents,
    with_lines,
)
from offramp.agents.calibration.losses import CompletedLines, LossSource, OnPolicy, Replayed
from offramp.agents.calibration.pick import Picked, Wish, load_rows, pick
from offramp.agents.calibration.setting_families import SettingFamily, family_of, load_points
from offramp.agents.placing.contenders import CHOSEN
from offramp.agents.recording.training_data import load_candidates
from offramp.controller.adapters.adapter_folder import keep_adapters, kept_in
from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.certificate import Method, Unit, Walked
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, say
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.spec import WorkerSpec, load_engine

CERTIFIED = "certified"
"""Folder, beside the contenders, of the bundle that a calibration certified."""

EDIT_SIMILARITY = "edit-similarity"
LOSSES = ("disagreement", EDIT_SIMILARITY)
"""What can be bounded."""

REPORT = "calibration.json"
NOTHING_CERTIFIED = 3
"""Exit status when no setting passed."""

EPSILON = 0.05


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("calibrate")(calibrate_policies)


Delta = Annotated[float, typer.Option(help="Bound on the mean loss.")]
Epsilon = Annotated[
    float | None, typer.Option(help="Probability that it may not hold.", show_default="0.05")
]
TestMethod = Annotated[str, typer.Option(help="hoeffding-bentkus|betting|binomial|conformal.")]
LossName = Annotated[str, typer.Option("--loss", help="disagreement|edit-similarity.")]
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
    policies: Annotated[Path, typer.Option(help="Folder that `offramp train` wrote.")],
    traces: Annotated[Path, typer.Option(help="Folder that `offramp record` wrote.")],
    loss: LossName = "disagreement",
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
    promise = parse_promise(delta, epsilon, method, unit)
    require_loss(loss, unit, replay=replay)
    out = out or policies / CERTIFIED
    options.require_new_folder("out", out)
    wish = parse_wish(quality, latency_budget, energy_budget)
    picked, walked = _family(policies, family, steps, wish)
    translators = translators or kept_in(policies)
    config = options.engine_config(kv_mode, max_pending, translators, weights)
    spec = WorkerSpec(
        model=model, dtype=dtype, device=device, threads=threads, slots=slots, engine=config
    )
    engine = load_engine(spec)
    require_fingerprints(walked.bundle, engine)
    unseen = unseen_documents(corpus, traces)
    windows = calibration_windows(model, unseen, prompt_tokens + new_tokens + 1, documents)
    replayed = traces if replay else None
    windows, losses = _losses(promise, loss, engine, windows, prompt_tokens, walked, replayed)
    _announce(walked, promise, windows, losses, picked)
    found = calibrate(promise, engine, walked, windows, losses, prompt_tokens, _show)
    save_calibration(out, promise, found)
    if config.translators is not None and out.resolve().parent != policies.resolve():
        keep_adapters(config.translators, out)
    _conclude(found, picked, out)


def parse_promise(delta: float, epsilon: float | None, method: str, unit: str) -> Promise:
    """Read what is to be guaranteed off the command line.

    Raises:
        ConfigError: an unknown name, or numbers outside their range.
    """
    for field, value, known in (
        ("method", method, get_args(Method)),
        ("unit", unit, get_args(Unit)),
    ):
        if value not in known:
            raise ConfigError(field, f"{value!r} is unknown", f"Use one of {', '.join(known)}")
    if epsilon is None and method != "conformal":
        epsilon = EPSILON
    return Promise(delta=delta, epsilon=epsilon, method=cast(Method, method), unit=cast(Unit, unit))


def require_loss(loss: str, unit: str, *, replay: bool) -> None:
    """Refuse a loss that is unknown, or that cannot be measured as asked.

    Raises:
        ConfigError: it is; the field names the option.
    """
    if loss not in LOSSES:
        raise ConfigError("loss", f"{loss!r} is unknown", f"Use one of {', '.join(LOSSES)}")
    if loss == EDIT_SIMILARITY and unit != "document":
        raise ConfigError("unit", f"{loss} is not a {unit}'s", "Use document")
    if loss == EDIT_SIMILARITY and replay:
        raise ConfigError("replay", f"has no completions to take {loss} of", "Leave it out")


def parse_wish(
    quality: float | None, latency_budget: float | None, energy_budget: float | None
) -> Wish | None:
    """Read what the operator asked for off the command line, if anything.

    Raises:
        ConfigError: two things at once, or a number outside its range.
    """
    if quality is latency_budget is energy_budget is None:
        return None
    return Wish(quality=quality, latency=latency_budget, energy=energy_budget)


def _family(
    policies: Path, name: str, steps: int, wish: Wish | None
) -> tuple[Picked | None, SettingFamily]:
    points = load_points(policies)
    name = name or _chosen_family(policies)
    picked = pick(load_rows(policies), name, wish) if wish else None
    last = None if picked is None else picked.setting
    return picked, family_of(points, name, steps, last)


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
