"""Pictures of an evaluation. Few colours, labels at the lines, intervals as thin bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np

from offramp.agents.evaluation.matched import MatchedRow
from offramp.agents.evaluation.statistics import Estimate

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "fixed exit": "#4d4d4d",
    "CALM": "#d95f02",
    "p̂": "#1b6ca8",
    "best exits + p̂": "#0a8f6c",
    "PPO": "#7b3294",
    "PPO with jumps": "#c2185b",
}
"""What is followed by eye; every other family is grey."""

OTHER = "#a8a8a8"
INK = "#222222"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "figure.dpi": 150,
    "savefig.bbox": "tight",
}


@dataclass(frozen=True, slots=True)
class Point:
    """A policy on the frontier: its family, wall ratio, and quality relative to full depth."""

    family: str
    wall: Estimate
    quality: Estimate
    is_chosen: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """Agreement that replaying traces had promised, and what decoding kept."""

    name: str
    family: str
    promised: float
    kept: float


def colour(family: str) -> str:
    """Of a family, or the grey of all others."""
    return COLOURS.get(family, OTHER)


def draw_frontier(points: Sequence[Point], quality: str, path: Path) -> None:
    """Quality against wall time, with 95 % intervals; up and left is better.

    Args:
        points: Timed policies.
        quality: What the quality is.
        path: PNG to write.
    """
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 5.2))
        families = dict.fromkeys(point.family for point in points)
        # Grey first, so that what is followed by eye lies on top.
        for family in sorted(families, key=lambda name: name in COLOURS):
            mine = [point for point in points if point.family == family]
            _draw_family(axes, family, sorted(mine, key=lambda point: point.wall.value))
        for point in (point for point in points if point.is_chosen):
            axes.plot(
                point.wall.value,
                point.quality.value,
                "o",
                ms=15,
                mfc="none",
                mec="#c00000",
                mew=1.5,
            )
            _note(
                axes,
                "published",
                (point.wall.value, point.quality.value),
                (0, -18),
                "#c00000",
                ha="center",
            )
        axes.plot(1, 1, "s", color=INK, ms=6, zorder=5)
        _note(axes, "full depth", (1, 1), (4, 9), INK, ha="right")
        _label_lines(axes, points, families)
        axes.axhline(1, color="#cccccc", lw=0.8, zorder=0)
        axes.set_xlabel("wall time per token ÷ KV-cached full depth (batch 1); left is faster")
        axes.set_ylabel(f"{quality} ÷ full depth")
        axes.set_title("What each policy keeps, and what it takes (test documents)", pad=18)
        _save(figure, path)


def draw_savings(rows: Sequence[MatchedRow], quality: str, path: Path) -> None:
    """Wall time at matched quality: a dot with its interval per family, a panel per target."""
    targets = sorted({row.target_loss for row in rows})
    order = _by_saving(rows)
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(targets), figsize=(9, 1.7 + 0.34 * len(order)), sharey=True, sharex=True,
            squeeze=False,
        )  # fmt: skip
        for axes, target in zip(panels[0], targets, strict=True):
            for row in (row for row in rows if row.target_loss == target):
                _draw_saving(axes, row, order.index(row.policy))
            axes.axvline(1, color="#bbbbbb", lw=1, ls="--", zorder=0)
            axes.set_title(f"≤ {100 * target:g} % loss", fontsize=10.5)
            axes.grid(axis="x", alpha=0.25)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        panels[0][0].xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, steps=[1, 2, 5]))
        panels[0][0].set_yticks(range(len(order)), order)
        panels[0][0].set_ylim(len(order) - 0.4, -0.6)
        for label, family in zip(panels[0][0].get_yticklabels(), order, strict=True):
            label.set_color(colour(family) if family in COLOURS else "#555555")
        figure.supxlabel(
            "wall time per token ÷ full depth on test documents, 95 % interval; "
            "hollow: lost more than the target there", fontsize=9.5, color=INK,
        )  # fmt: skip
        figure.suptitle(
            f"Time left at a bounded loss of {quality}", x=0.01, ha="left", fontweight="bold"
        )
        figure.tight_layout()
        _save(figure, path)


def draw_gap(gaps: Sequence[Gap], path: Path) -> None:
    """What replay promised against what decoding kept: a dumbbell per policy."""
    ordered = sorted(gaps, key=lambda gap: gap.promised - gap.kept)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.8 + 0.3 * len(ordered)))
        for place, gap in enumerate(ordered):
            shade = colour(gap.family)
            axes.plot([gap.kept, gap.promised], [place, place], color=shade, lw=2.2, alpha=0.55)
            axes.plot(gap.promised, place, "o", mfc="white", mec=shade, ms=6.5, mew=1.5)
            axes.plot(gap.kept, place, "o", color=shade, ms=6.5)
            text = f"{100 * (gap.kept - gap.promised):+.1f}"
            leftmost = min(gap.kept, gap.promised)
            _note(axes, text, (leftmost, place), (-8, -3), "#555555", ha="right", size=8.5)
        axes.set_yticks(range(len(ordered)), [gap.name for gap in ordered])
        axes.set_ylim(len(ordered) - 0.4, -0.9)
        axes.margins(x=0.12)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("token agreement with full depth: ○ replay promised, ● decoding kept")
        axes.set_title("Offline promise against on-policy fact, in points")
        _save(figure, path)


def draw_exit_depths(
    depths_by_policy: Mapping[str, Mapping[int, int]], layers: int, path: Path
) -> None:
    """Share of tokens by layers executed, one bar of shares per policy, earliest on the left."""
    names = list(depths_by_policy)
    seen = sorted({layer for depths in depths_by_policy.values() for layer in depths})
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.6 + 0.34 * len(names)))
        left = np.zeros(len(names))
        for layer in seen:
            shares = np.asarray(
                [d.get(layer, 0) / sum(d.values()) for d in depths_by_policy.values()]
            )
            # From light (early) to dark (full depth).
            shade = plt.get_cmap("Blues")(0.15 + 0.75 * layer / layers)
            axes.barh(names, shares, left=left, color=shade, edgecolor="white", height=0.74)
            for place, (start, share) in enumerate(zip(left, shares, strict=True)):
                if share > 0.07:
                    ink = "white" if layer / layers > 0.5 else INK
                    middle = start + share / 2
                    axes.text(
                        middle, place, f"{layer}", ha="center", va="center", color=ink, size=8.5
                    )
            left += shares
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("share of tokens; the number is the layer after which they left")
        axes.set_title(f"Where tokens leave (of {layers} layers)")
        _save(figure, path)


def draw_energy(ratios: Mapping[str, Estimate], method: str, path: Path) -> None:
    """Joules per token over full depth's, a dot with its interval per policy."""
    order = sorted(ratios, key=lambda name: ratios[name].value)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.8 + 0.3 * len(order)))
        for place, name in enumerate(order):
            each, shade = ratios[name], colour(name)
            axes.plot([each.low, each.high], [place, place], color=shade, lw=1.6)
            axes.plot(each.value, place, "o", color=shade, ms=7)
        axes.axvline(1, color="#bbbbbb", lw=1, ls="--", zorder=0)
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"joules per token ÷ full depth, {method.replace('_', ' ')}")
        axes.set_title(f"Energy ({method.replace('_', ' ')})")
        _save(figure, path)


def _by_saving(rows: Sequence[MatchedRow]) -> list[str]:
    """Families, the one that saves most first, by the mean over targets."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row.policy, []).append(1.0 if row.wall_ratio is None else row.wall_ratio)
    return sorted(ratios, key=lambda family: float(np.mean(ratios[family])))


def _draw_saving(axes: plt.Axes, row: MatchedRow, place: int) -> None:
    if row.wall_ratio is None:
        return
    kept = row.loss <= row.target_loss
    shade = colour(row.policy)
    axes.plot([row.wall_ratio_low, row.wall_ratio_high], [place, place], color=shade, lw=1.6)
    axes.plot(
        row.wall_ratio, place, "o", color=shade, mfc=shade if kept else "white", ms=7, mew=1.5
    )


def _draw_family(axes: plt.Axes, family: str, points: Sequence[Point]) -> None:
    x, y = ([getattr(p, axis).value for p in points] for axis in ("wall", "quality"))
    errors = [
        np.maximum([[v.value - v.low for v in each], [v.high - v.value for v in each]], 0)
        for each in ([p.wall for p in points], [p.quality for p in points])
    ]
    followed = family in COLOURS
    shade = colour(family)
    axes.errorbar(
        x, y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=shade, elinewidth=0.8,
        alpha=0.45 if followed else 0.25, zorder=2 if followed else 1,
    )  # fmt: skip
    axes.plot(
        x, y, "o-", color=shade, ms=5 if followed else 3.5, lw=1.8 if followed else 0.9,
        zorder=4 if followed else 1,
    )  # fmt: skip


def _label_lines(axes: plt.Axes, points: Sequence[Point], families: Mapping[str, None]) -> None:
    """Each family's name left of its fastest point, moved apart where two would overlap."""
    ends = {
        family: min((p for p in points if p.family == family), key=lambda p: p.wall.value)
        for family in families
    }
    low, high = axes.get_ylim()
    gap = (high - low) * 0.042
    left = axes.get_xlim()[0] - 0.02 * np.ptp(axes.get_xlim())
    height = np.inf
    for family, end in sorted(ends.items(), key=lambda item: -item[1].quality.value):
        height = min(height - gap, end.quality.value)
        ink = colour(family) if family in COLOURS else "#777777"
        axes.annotate(
            family, (end.wall.value, end.quality.value), xytext=(left, height), ha="right",
            va="center", color=ink, size=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": ink, "lw": 0.5, "alpha": 0.5, "shrinkB": 4},
        )  # fmt: skip
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.spines["left"].set_visible(False)
    axes.spines["right"].set_visible(True)


def _note(
    axes: plt.Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    ink: str,
    *,
    ha: str = "left",
    size: float = 9,
) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", color=ink, size=size, ha=ha)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
