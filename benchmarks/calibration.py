"""How often is a guarantee broken, and what do the methods certify?

Losses of a family's settings are measured once, document by document, decoded on-policy and
replayed. Each method then walks them. For the violations, the measured documents are taken as the
whole population, whose risks are therefore known, and calibration sets are drawn from it with
replacement, many times: a violation is a certified setting whose risk in the population exceeds
delta. For these draws delta is moved to just below the first risk above it, where it is hardest to
keep. ``off by one`` returns the setting that failed, as public code does; ``binomial`` takes tokens
for units.

    python benchmarks/calibration.py --policies runs/policies --traces runs/traces --json c.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from offramp.agents.calibration.calibration_documents import calibration_windows, unseen_documents
from offramp.agents.calibration.fixed_sequence import (
    LossesOf,
    WalkResult,
    conformal_risk_control,
    learn_then_test,
)
from offramp.agents.calibration.losses import LossSource, OnPolicy, Replayed
from offramp.agents.calibration.setting_families import SettingFamily, family_of, load_points
from offramp.controller.release.certificate import Method
from offramp.envs.traces.candidate_file import load_candidates
from offramp.worker.profiling.profile import describe_machine
from offramp.worker.spec import WorkerSpec, load_engine

EPSILONS = (0.01, 0.05, 0.1, 0.2, 0.3)
METHODS: tuple[Method, ...] = ("hoeffding-bentkus", "betting", "binomial")
CONSOLE = Console(width=110)

Losses = dict[float, NDArray[np.float64]]
"""By setting, safest first: one loss per document."""


def main(
    policies: Annotated[Path, typer.Option(help="Folder that `offramp train` wrote.")],
    traces: Annotated[Path, typer.Option(help="Folder that `offramp record` wrote.")],
    family: Annotated[str, typer.Option(help="Whose settings to walk.")] = "p̂",
    model: Annotated[str, typer.Option(help="Model folder.")] = "models/reference",
    documents: Annotated[int, typer.Option(help="Documents at most.")] = 208,
    prompt_tokens: Annotated[int, typer.Option(help="Read of each at full depth.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Of each that losses count.")] = 64,
    steps: Annotated[int, typer.Option(help="Settings.")] = 10,
    delta: Annotated[float, typer.Option(help="Bound on the mean loss.")] = 0.05,
    draws: Annotated[int, typer.Option(help="Calibration sets drawn.")] = 2000,
    measured: Annotated[
        Path | None, typer.Option(help="Take the losses from an earlier --json.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer of everything.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw violations against epsilon.")] = None,
) -> None:
    if quick:
        documents, new_tokens, steps, draws = 64, 24, 5, 1000
    if measured is None:
        machine, decoded, replayed = losses_of(
            (policies, traces, model), family, steps, documents, (prompt_tokens, new_tokens)
        )
    else:
        earlier = json.loads(measured.read_text())
        machine, family, new_tokens = (earlier[k] for k in ("machine", "family", "new_tokens"))
        decoded, replayed = (
            {float(s): np.asarray(each) for s, each in earlier["losses"][mode].items()}
            for mode in ("project", "replay")
        )
    count = len(next(iter(decoded.values())))
    shape = {"documents": count, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    CONSOLE.print(f"{machine}; {family}; {shape}; delta {delta}")
    CONSOLE.print(risk_table(decoded, replayed, new_tokens))
    certified = {
        f"{mode}, {name}": certify(losses, name, delta, 0.1, new_tokens)
        for mode, losses in (("project", decoded), ("replay", replayed))
        for name in (*METHODS, "conformal")
    }
    for name, outcome in certified.items():
        found = outcome.certified
        says = "nothing" if found is None else f"λ {found.setting:.3f}"
        risk = 0.0 if found is None else decoded[found.setting].mean()
        CONSOLE.print(f"  {name}: {says}, on-policy risk there {risk:.4f}")
    hardest = min(each.mean() for each in decoded.values() if each.mean() > delta) * (1 - 1e-9)
    rows = violations(decoded, hardest, draws, new_tokens)
    CONSOLE.print(f"violations of delta {hardest:.4f}, {draws} draws")
    CONSOLE.print(violation_table(rows))
    if plot is not None:
        draw(rows, plot)
    if json_file is not None:
        plain = {
            mode: {f"{s:.6g}": each.tolist() for s, each in losses.items()}
            for mode, losses in (("project", decoded), ("replay", replayed))
        }
        whole = {"machine": machine, "family": family, **shape, "delta": delta, "draws": draws}
        json_file.write_text(json.dumps({**whole, "rows": rows, "losses": plain}, indent=1))


def losses_of(
    places: tuple[Path, Path, str], family: str, steps: int, documents: int, tokens: tuple[int, int]
) -> tuple[str, Losses, Losses]:
    """The machine; losses decoded and replayed, of documents that training never saw."""
    policies, traces, model = places
    prompt_tokens, new_tokens = tokens
    engine = load_engine(WorkerSpec(model=model, slots=32))
    walked = family_of(load_points(policies), family, steps)
    unseen = unseen_documents(None, traces)
    windows = calibration_windows(model, unseen, prompt_tokens + new_tokens + 1, documents)
    exits = walked.bundle.manifest.exits
    table_VK = load_candidates(traces)
    replayed = measure(walked, Replayed(engine, windows, prompt_tokens, exits, table_VK))
    decoded = measure(walked, OnPolicy(engine, windows, prompt_tokens))
    return describe_machine(engine.stack.dtype), decoded, replayed


def measure(family: SettingFamily, source: LossSource) -> Losses:
    losses = {}
    for setting in family.settings:
        losses[setting] = source.losses(family.build(setting), "document")
        CONSOLE.print(f"  {source.decode_mode} λ {setting:.3f}: {losses[setting].mean():.4f}")
    return losses


def certify(losses: Losses, name: str, delta: float, epsilon: float, tokens: int) -> WalkResult:
    if name == "conformal":
        return conformal_risk_control(losses, losses.__getitem__, delta=delta)
    [method] = [each for each in METHODS if each == name]
    by_unit = by_token(losses, tokens) if method == "binomial" else losses.__getitem__
    return learn_then_test(losses, by_unit, delta=delta, epsilon=epsilon, method=method)


def by_token(losses: Losses, tokens: int) -> LossesOf:
    """A 0/1 loss per token, as the means over ``tokens`` tokens tell."""

    def zero_one(setting: float) -> NDArray[np.float64]:
        wrong = np.rint(losses[setting] * tokens).astype(np.int64).sum()
        ones: NDArray[np.float64] = np.arange(len(losses[setting]) * tokens) < wrong
        return ones.astype(np.float64)

    return zero_one


def violations(losses: Losses, delta: float, draws: int, tokens: int) -> list[dict[str, Any]]:
    """Share of draws whose certified setting is too risky in the population, by epsilon."""
    rng = np.random.default_rng(0)
    count = len(next(iter(losses.values())))
    risks = {setting: float(each.mean()) for setting, each in losses.items()}
    samples = rng.integers(count, size=(draws, count))
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        for epsilon in EPSILONS:
            kept, off_by_one, found = 0, 0, 0.0
            for sample in samples:
                drawn = {setting: each[sample] for setting, each in losses.items()}
                outcome = certify(drawn, method, delta, epsilon, tokens)
                if outcome.certified is not None:
                    kept += risks[outcome.certified.setting] > delta
                    found += risks[outcome.certified.setting]
                off_by_one += risks[outcome.walked[-1].setting] > delta
            rows.append(
                {
                    "method": method,
                    "epsilon": epsilon,
                    "violations": kept / draws,
                    "off_by_one": off_by_one / draws,
                    "mean_risk": found / draws,
                }
            )
    return rows


def risk_table(decoded: Losses, replayed: Losses, tokens: int) -> Table:
    """``design effect``: variance of a document's loss over that of independent tokens."""
    table = Table("λ", "risk, project", "sd over documents", "design effect", "risk, replay")
    for setting, each in decoded.items():
        risk = each.mean()
        effect = each.var() * tokens / (risk * (1 - risk)) if risk > 0 else float("nan")
        cells = [f"{risk:.4f}", f"{each.std():.4f}", f"{effect:.2f}"]
        table.add_row(f"{setting:.3f}", *cells, f"{replayed[setting].mean():.4f}")
    return table


def violation_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("method", "epsilon", "violations", "off by one", "mean risk certified")
    for row in rows:
        shares = [f"{row[name]:.3f}" for name in ("violations", "off_by_one", "mean_risk")]
        table.add_row(row["method"], f"{row['epsilon']:g}", *shares)
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4), layout="constrained")
    axes.plot([0, max(EPSILONS)], [0, max(EPSILONS)], color="grey", lw=1, label="allowed")
    for method, colour in zip(METHODS, ("tab:blue", "tab:green", "tab:orange"), strict=True):
        mine = [row for row in rows if row["method"] == method]
        epsilons = [row["epsilon"] for row in mine]
        kept = [row["violations"] for row in mine]
        axes.plot(epsilons, kept, "o-", color=colour, label=method)
        wrong = [row["off_by_one"] for row in mine]
        axes.plot(epsilons, wrong, "x--", color=colour, alpha=0.6, label=f"{method}, off by one")
    axes.set(xlabel="ε", ylabel="share of calibrations whose bound does not hold")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
