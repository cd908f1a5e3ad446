"""The frontier, and the savings at matched quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from offramp.agents.evaluation.frame import COLOURS, INK, STYLE, colour, note, save
from offramp.agents.evaluation.matched import MatchedRow
from offramp.agents.evaluation.statistics import Estimate

FEW = 4
"""So many grey families have their names on the frontier; more would hide it."""


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A policy on the frontier: its family, wall ratio, and quality relative to full depth."""

    family: str
    wall: Estimate
    quality: Estimate
    is_chosen: bool = False


def draw_frontier(points: Sequence[FrontierPoint], quality: str, path: Path) -> None:
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
            note(
                axes,
                "published",
                (point.wall.value, point.quality.value),
                (0, -18),
                "#c00000",
                ha="center",
            )
        axes.plot(1, 1, "s", color=INK, ms=6, zorder=5)
        note(axes, "full depth", (1, 1), (4, 9), INK, ha="right")
        others = [family for family in families if family not in COLOURS]
        named = [family for family in families if family in COLOURS or len(others) <= FEW]
        if len(others) > FEW:
            axes.text(
                0.01, 0.02, f"grey: {len(others)} other rules, named in the tables",
                transform=axes.transAxes, color="#777777", size=9,
            )  # fmt: skip
        _label_lines(axes, points, named)
        axes.axhline(1, color="#cccccc", lw=0.8, zorder=0)
        axes.set_xlabel("wall time per token ÷ KV-cached full depth (batch 1); left is faster")
        axes.set_ylabel(f"{quality} ÷ full depth")
        axes.set_title("What each policy keeps, and what it takes (test documents)", pad=18)
        save(figure, path)


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
        save(figure, path)


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


def _draw_family(axes: plt.Axes, family: str, points: Sequence[FrontierPoint]) -> None:
    x, y = ([getattr(p, axis).value for p in points] for axis in ("wall", "quality"))
    errors = [
        np.maximum([[v.value - v.low for v in each], [v.high - v.value for v in each]], 0)
        for each in ([p.wall for p in points], [p.quality for p in points])
    ]
    followed = family in COLOURS
    shade = colour(family)
    if followed:
        axes.errorbar(
            x, y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=shade, elinewidth=0.8,
            alpha=0.45, zorder=2,
        )  # fmt: skip
    axes.plot(
        x, y, "o-", color=shade, ms=5 if followed else 3.5, lw=1.8 if followed else 0.9,
        zorder=4 if followed else 1,
    )  # fmt: skip


def _label_lines(axes: plt.Axes, points: Sequence[FrontierPoint], families: Sequence[str]) -> None:
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
