"""From measurements to the parts of a report."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offramp.agents.evaluation.bars import Gap, Take, draw_energy
from offramp.agents.evaluation.energy_ratios import Energy
from offramp.agents.evaluation.evaluation_rows import Measured, wall_ratio
from offramp.agents.evaluation.matched import MatchedRow
from offramp.agents.evaluation.measure import Protocol
from offramp.agents.evaluation.plots import FrontierPoint
from offramp.agents.evaluation.report import Section, Table, interval
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY, Metric, Scores
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
"""Of the hypervolume: full depth's own time, and nine tenths of its quality."""

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
    quality = Estimate(1 - loss.value, 1 - loss.high, 1 - loss.low)
    return FrontierPoint(runs[0].contender.family, wall, quality, is_chosen)


def single_points(measured: Sequence[Measured], chosen: int) -> dict[str, list[FrontierPoint]]:
    """Every contender of one training, by metric; full depth is the reference."""
    full = measured[0]
    return {
        metric.name: [
            frontier_point([each], full, metric, is_chosen=index == chosen)
            for index, each in enumerate(measured)
            if index and metric.is_measured(each.scores)
        ]
        for metric in (AGREEMENT, EDIT_SIMILARITY)
    }


def gaps(measured: Sequence[Measured]) -> list[Gap]:
    """Per family, the operating point whose promise lies nearest to ``PROMISED``."""
    nearest: dict[str, Measured] = {}
    for each in measured:
        promised = each.contender.offline_agreement
        if promised is None:
            continue
        best = nearest.get(each.contender.family)
        if best is None or _distance(each) < _distance(best):
            nearest[each.contender.family] = each
    return [
        Gap(
            each.contender.name,
            family,
            each.contender.offline_agreement or 0.0,
            AGREEMENT.of([each.scores]),
        )
        for family, each in nearest.items()
    ]


def _distance(measured: Measured) -> float:
    return abs((measured.contender.offline_agreement or 0.0) - PROMISED)


def energy_section(
    policies: Sequence[tuple[str, str]], energy: Energy, documents: int, folder: Path
) -> Section:
    """What is known of energy, with a picture, and how it was come by; or that nothing is.

    Args:
        policies: Name and family of those metered.
        energy: What was metered.
        documents: How many were decoded for it.
        folder: Where the picture goes.
    """
    pairs = zip(policies, energy.ratios, strict=True)
    known = [Take(*policy, ratio) for policy, ratio in pairs if ratio is not None]
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
    rows = [(take.name, interval(take.ratio)) for take in known]
    table = Table(("policy", f"energy ÷ full, {method}"), rows)
    return Section(f"Energy ({method})", text, "energy.png", table)


def gap_headline(found: Sequence[Gap]) -> str:
    """The offline-to-online gap in one sentence."""
    if not found:
        return "No policy was replayed offline, so there is no offline-to-online gap to report."
    losses = [gap.promised - gap.kept for gap in found]
    worst = max(found, key=lambda gap: gap.promised - gap.kept)
    return (
        f"Replay flatters: decoding kept {100 * sum(losses) / len(losses):.1f} points less "
        f"agreement than replay had promised on average, {100 * max(losses):.1f} at worst "
        f"({worst.name})."
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
    assert all(point.clock is not None for point in points)
    clocks = [point.clock for point in points if point.clock is not None]
    timed = len(clocks[0].mine_D)

    def volume(drawn_D: NDArray[np.int64]) -> float:
        cost_P = np.asarray([c.mine_D[drawn_D].sum() / c.full_D[drawn_D].sum() for c in clocks])
        quality_P = np.asarray([1 - _loss(point, full, metric, drawn_D) for point in points])
        return hypervolume(cost_P, quality_P, REFERENCE_POINT)

    whole = volume(np.arange(timed))
    return with_interval(whole, resampled(volume, timed, seed))


def _loss(point: Measured, full: Measured, metric: Metric, drawn_D: NDArray[np.int64]) -> float:
    mine, theirs = (_drawn(m.scores, drawn_D) for m in (point, full))
    if not metric.is_measured(theirs):
        return 1.0
    return metric.loss(metric.of([mine]), metric.of([theirs]))


def _drawn(scores: Scores, drawn_D: NDArray[np.int64]) -> Scores:
    plain = scores.plain()
    depths = plain.pop("depths")
    drawn = {name: np.asarray(column)[drawn_D] for name, column in plain.items()}
    return Scores.of({**drawn, "depths": depths})


def savings_headline(rows: Sequence[MatchedRow], metric: Metric, target_loss: float) -> str:
    """Who saves most at a target, in one sentence."""
    mine = [r for r in rows if r.metric == metric.name and r.target_loss == target_loss]
    timed = [row for row in mine if row.wall_ratio is not None]
    if not timed:
        return f"Nothing was timed at {100 * target_loss:g} % loss of {metric.label}."
    best = min(timed, key=lambda row: row.wall_ratio or 1.0)
    assert best.wall_ratio is not None
    assert best.wall_ratio_low is not None
    assert best.wall_ratio_high is not None
    if best.wall_ratio >= 1:
        return (
            f"At ≤ {100 * target_loss:g} % loss of {metric.label} on validation no policy saves "
            "any time."
        )
    kept = "and kept" if best.loss <= target_loss else "but missed"
    return (
        f"At ≤ {100 * target_loss:g} % loss of {metric.label} on validation, {best.policy} takes "
        f"the least time: {best.wall_ratio:.3f} [{best.wall_ratio_low:.3f}, "
        f"{best.wall_ratio_high:.3f}] of full depth's on test, {kept} the target there "
        f"({100 * best.loss:+.1f} % [{100 * best.loss_low:+.1f}, {100 * best.loss_high:+.1f}])."
    )
