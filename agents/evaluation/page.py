"""From measurements to the parts of a report."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp.agents.evaluation.energy_ratios import Energy
from offramp.agents.evaluation.evaluation_rows import Measured, wall_ratio
from offramp.agents.evaluation.matched import MatchedRow, quality_metrics
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.plots import EnergyRatio, FrontierPoint, Gap, draw_energy
from offramp.agents.evaluation.report import Section, Table, interval, lost
from offramp.agents.evaluation.scores import AGREEMENT, Metric
from offramp.agents.evaluation.statistics import (
    Estimate,
    Resample,
    hypervolume,
    resampled,
    with_interval,
)
from offramp.controller.costs.readings import EnergyMethod
from offramp.worker.engine.engine import AdaptiveEngine
from offramp.worker.profiling.profile import describe_machine

NO_ENERGY = (
    "Nothing on this machine measured energy, so nothing is said of it (method: unavailable). "
    "Time saved is not energy saved."
)

REFERENCE_POINT = (1.0, 0.9)
"""Corner of the hypervolume: full depth's own time, and nine tenths of its quality."""

PROMISED = 0.97
"""Promised agreement at which promises are compared."""


def conditions(
    engine: AdaptiveEngine, protocol: Protocol, documents: Mapping[str, int], **more: object
) -> dict[str, str]:
    """What a reader must know to judge or repeat the numbers, by name."""
    stack = engine.stack
    lines = (
        f"CodeXGLUE's protocol, {protocol.lines} random cuts a document, ≤ {protocol.line_context} "
        f"tokens before the cut, greedy to the end of the line, ≤ {protocol.line_tokens} tokens"
    )
    return {
        "machine": describe_machine(stack.dtype),
        "cores": f"{os.cpu_count()}",
        "python": platform.python_version(),
        "model": f"{stack.layers} layers, width {stack.width}, vocabulary {stack.vocab:,}, "
        f"fingerprint {engine.model_fingerprint[:12]}",
        "dtype": str(stack.dtype).removeprefix("torch."),
        "skipped layers": engine.config.kv_mode,
        "documents": ", ".join(f"{count} {split}" for split, count in documents.items()),
        "quality": f"teacher-forced, {protocol.prompt_tokens} prompt tokens at full depth, then "
        f"{protocol.new_tokens - 1} tokens decoded",
        "line completion": lines if protocol.lines else "not measured",
        "time": f"batch 1, {protocol.timed_tokens} tokens a document, policies in rotating order "
        "with KV-cached full depth between them; probes, decisions, fill and head included",
        "intervals": "95 %, percentile bootstrap over documents and seeds, paired, 2,000 resamples",
        **{name: str(value) for name, value in more.items()},
    }


def frontier_point(
    runs: Sequence[Measured], full: Measured, metric: Metric, *, is_chosen: bool = False
) -> FrontierPoint:
    """One operating point, as the mean over its seeds."""
    draws = Resample.draw(len(runs), len(full.scores.tokens_D))
    loss = metric.estimate_loss([run.scores for run in runs], full.scores, draws)
    wall = wall_ratio(runs)
    assert wall is not None
    # The largest loss is the lowest quality.
    quality = Estimate(1 - loss.value, 1 - loss.high, 1 - loss.low)
    return FrontierPoint(runs[0].contender.family, wall, quality, is_chosen)


def single_points(measured: Sequence[Measured], chosen: int) -> dict[str, list[FrontierPoint]]:
    """Every contender of one training, by metric; full depth is the reference."""
    full, *others = measured
    return {
        metric.name: [
            frontier_point([each], full, metric, is_chosen=index == chosen)
            for index, each in enumerate(others, 1)
        ]
        for metric in quality_metrics(full.scores)
    }


def gaps(measured: Sequence[Measured]) -> list[Gap]:
    """Per family, the operating point whose promise lies nearest to ``PROMISED``."""
    nearest: dict[str, tuple[float, Gap]] = {}
    for each in measured:
        contender, promised = each.contender, each.contender.offline_agreement
        if promised is None:
            continue
        distance = abs(promised - PROMISED)
        if contender.family not in nearest or distance < nearest[contender.family][0]:
            kept = AGREEMENT.of([each.scores])
            found = Gap(contender.name, contender.family, promised, kept)
            nearest[contender.family] = distance, found
    return [gap for _, gap in nearest.values()]


def energy_section(
    policies: Sequence[tuple[str, str]], energy: Energy, documents: int, folder: Path
) -> Section:
    """What is known of energy, with a picture, and how it was obtained; or that nothing is.

    Args:
        policies: Name and family of each policy that was metered.
        energy: What was metered of them.
        documents: How many documents were decoded for it.
        folder: Folder that the picture is written to.
    """
    pairs = zip(policies, energy.ratios, strict=True)
    known = [EnergyRatio(*policy, ratio) for policy, ratio in pairs if ratio is not None]
    if energy.full_j is None or not known:
        return Section("Energy", f"{NO_ENERGY} The reason: {energy.source}.")
    method = energy.method.value.replace("_", " ")
    draw_energy(known, method, folder / "energy.png")
    text = (
        f"{energy.label}. Full depth takes {1000 * energy.full_j:.1f} mJ a token. "
        f"{documents} documents at batch 1, interleaved with full depth."
    )
    if energy.method is EnergyMethod.MODELLED:
        text += " A modelled figure tells policies apart by their work; nothing was measured."
    rows = [(each.name, interval(each.ratio)) for each in known]
    table = Table(("policy", f"energy ÷ full, {method}"), rows)
    return Section(f"Energy ({method})", text, "energy.png", table)


def gap_headline(found: Sequence[Gap]) -> str:
    """The offline-to-online gap in one sentence."""
    if not found:
        return "No policy was replayed offline, so there is no offline-to-online gap to report."
    losses = [100 * (gap.promised - gap.kept) for gap in found]
    worst = int(np.argmax(losses))
    return (
        f"Replay flatters: decoding kept {np.mean(losses):.1f} points less agreement than replay "
        f"had promised on average, {losses[worst]:.1f} at worst ({found[worst].name})."
    )


def volumes(measured: Sequence[Measured], metrics: Sequence[Metric]) -> Section:
    """Hypervolume of each family's frontier."""
    full = measured[0]
    families = dict.fromkeys(each.contender.family for each in measured[1:])
    head = ["family", *(metric.label for metric in metrics)]
    rows = []
    for family in families:
        points = [each for each in measured if each.contender.family == family and each.clock]
        cells = [frontier_volume(points, full, metric) for metric in metrics] if points else []
        rows.append((family, *map(interval, cells)))
    cost, quality = REFERENCE_POINT
    text = (
        "Share of the corner between no time at full quality and the reference point "
        f"(wall ratio {cost:g}, {quality:g} of full depth's quality) that a family's points "
        "dominate, on the timed documents. More is better; a family that never saves without "
        "losing a tenth has 0."
    )
    rows.sort(key=lambda row: row[1], reverse=True)
    return Section("Hypervolume", text, table=Table(head, rows))


def frontier_volume(
    points: Sequence[Measured], full: Measured, metric: Metric, seed: int = 0
) -> Estimate:
    """Hypervolume of timed points: wall ratio against quality relative to full depth.

    Quality and time are resampled over the timed documents, which are the first of the split.
    """
    clocks = [point.clock for point in points if point.clock is not None]
    assert len(clocks) == len(points)
    timed = len(clocks[0].mine_D)

    def volume(drawn_D: NDArray[np.int64]) -> float:
        cost_P = np.asarray([c.mine_D[drawn_D].sum() / c.full_D[drawn_D].sum() for c in clocks])
        # NaN where no drawn document has a line: dominates nothing.
        theirs = metric.over(full.scores, drawn_D)
        losses = [metric.loss(metric.over(each.scores, drawn_D), theirs) for each in points]
        quality_P = 1 - np.asarray(losses)
        return hypervolume(cost_P, quality_P, REFERENCE_POINT)

    return with_interval(volume(np.arange(timed)), resampled(volume, timed, seed))


def savings_headline(rows: Sequence[MatchedRow], metric: Metric, target_loss: float) -> str:
    """Who saves most at a target, in one sentence."""
    goal = f"{100 * target_loss:g} % loss of {metric.label}"
    timed = [
        (row.wall, row)
        for row in rows
        if (row.metric, row.target_loss) == (metric.name, target_loss) and row.wall is not None
    ]
    if not timed:
        return f"Nothing was timed at {goal}."
    wall, best = min(timed, key=lambda each: each[0].value)
    if wall.value >= 1:
        return f"At ≤ {goal} on validation no policy saves any time."
    kept = "and kept" if best.loss <= target_loss else "but missed"
    return (
        f"At ≤ {goal} on validation, {best.policy} takes the least time: {interval(wall)} of full "
        f"depth's on test, {kept} the target there ({lost(best)})."
    )
