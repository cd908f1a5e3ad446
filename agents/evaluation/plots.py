"""The figures of an evaluation: frontier, savings, promises, exit depths and energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from offramp.agents.evaluation.figure_style import (
    COLOURS,
    INK,
    MUTED,
    STYLE,
    bare_rows,
    colour,
    dot_with_interval,
    mark_full_depth,
    note,
    one_row_each,
    save,
)
from offramp.agents.evaluation.matched import MatchedRow
from offramp.agents.evaluation.statistics import Estimate

FEW = 4
"""So many grey families have their names on the frontier; more would hide it."""

PUBLISHED = "#c00000"


@dataclass(frozen=True, slots=True)
class FrontierPoint:
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


@dataclass(frozen=True, slots=True)
class EnergyRatio:
    """Joules per token that a policy takes, over full depth's."""

    name: str
    family: str
    ratio: Estimate


def draw_frontier(points: Sequence[FrontierPoint], quality: str, path: Path) -> None:
    """Quality against wall time, with 95 % intervals; up and left is better."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 5.2))
        families = dict.fromkeys(point.family for point in points)
        # Grey first, so that what is followed by eye lies on top.
        for family in sorted(families, key=lambda name: name in COLOURS):
            mine = [point for point in points if point.family == family]
            _draw_family(axes, family, sorted(mine, key=lambda point: point.wall.value))
        for chosen in (point for point in points if point.is_chosen):
            at = (chosen.wall.value, chosen.quality.value)
            axes.plot(*at, "o", ms=15, mfc="none", mec=PUBLISHED, mew=1.5)
            note(axes, "published", at, (0, -18), PUBLISHED, ha="center")
        axes.plot(1, 1, "s", color=INK, ms=6, zorder=5)
        note(axes, "full depth", (1, 1), (4, 9), INK, ha="right")
        others = [family for family in families if family not in COLOURS]
        named = [family for family in families if family in COLOURS or len(others) <= FEW]
        if len(others) > FEW:
            text = f"grey: {len(others)} other rules, named in the tables"
            axes.text(0.01, 0.02, text, transform=axes.transAxes, color=MUTED, size=9)
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
        figure, [panels] = plt.subplots(
            1, len(targets), figsize=(9, 1.7 + 0.34 * len(order)), sharey=True, sharex=True,
            squeeze=False,
        )  # fmt: skip
        for axes, target in zip(panels, targets, strict=True):
            for row in rows:
                if row.target_loss == target and row.wall is not None:
                    place, shade = order.index(row.policy), colour(row.policy)
                    dot_with_interval(axes, row.wall, place, shade, is_hollow=row.loss > target)
            mark_full_depth(axes)
            axes.set_title(f"≤ {100 * target:g} % loss", fontsize=10.5)
            bare_rows(axes)
        panels[0].xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, steps=[1, 2, 5]))
        panels[0].set_yticks(range(len(order)), order)
        panels[0].set_ylim(len(order) - 0.4, -0.6)
        for label, family in zip(panels[0].get_yticklabels(), order, strict=True):
            label.set_color(colour(family, "#555555"))
        figure.supxlabel(
            "wall time per token ÷ full depth on test documents, 95 % interval; "
            "hollow: lost more than the target there", fontsize=9.5, color=INK,
        )  # fmt: skip
        title = f"Time left at a bounded loss of {quality}"
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        figure.tight_layout()
        save(figure, path)


def draw_gap(gaps: Sequence[Gap], path: Path) -> None:
    """What replay promised against what decoding kept: a dumbbell per policy."""
    ordered = sorted(gaps, key=lambda gap: gap.promised - gap.kept)
    title = "Offline promise against on-policy fact, in points"
    label = "token agreement with full depth: ○ replay promised, ● decoding kept"
    with one_row_each([gap.name for gap in ordered], path, title=title, label=label) as axes:
        for row, gap in enumerate(ordered):
            shade = colour(gap.family)
            axes.plot([gap.kept, gap.promised], [row, row], color=shade, lw=2.2, alpha=0.55)
            axes.plot(gap.promised, row, "o", mfc="white", mec=shade, ms=6.5, mew=1.5)
            axes.plot(gap.kept, row, "o", color=shade, ms=6.5)
            text = f"{100 * (gap.kept - gap.promised):+.1f}"
            leftmost = min(gap.kept, gap.promised)
            note(axes, text, (leftmost, row), (-8, -3), "#555555", ha="right", size=8.5)
        axes.margins(x=0.12)


def draw_energy(ratios: Sequence[EnergyRatio], method: str, path: Path) -> None:
    """Joules per token over full depth's, a dot with its interval per policy."""
    order = sorted(ratios, key=lambda each: each.ratio.value)
    title, label = f"Energy ({method})", f"joules per token ÷ full depth, {method}"
    with one_row_each([each.name for each in order], path, title=title, label=label) as axes:
        for row, each in enumerate(order):
            dot_with_interval(axes, each.ratio, row, colour(each.family))
        mark_full_depth(axes)


def draw_exit_depths(
    depths_by_policy: Mapping[str, Mapping[int, int]], layers: int, path: Path
) -> None:
    """Share of tokens by layers executed, one bar of shares per policy, earliest on the left."""
    names = list(depths_by_policy)
    seen = sorted({layer for depths in depths_by_policy.values() for layer in depths})
    title = f"Where tokens leave (of {layers} layers)"
    label = "share of tokens; the number is the layer after which they left"
    with one_row_each(names, path, title=title, label=label, height=0.34) as axes:
        left = np.zeros(len(names))
        for layer in seen:
            shares = np.asarray(
                [d.get(layer, 0) / sum(d.values()) for d in depths_by_policy.values()]
            )
            # From light (early) to dark (full depth).
            shade = plt.get_cmap("Blues")(0.15 + 0.75 * layer / layers)
            rows = range(len(names))
            axes.barh(rows, shares, left=left, color=shade, edgecolor="white", height=0.74)
            ink = "white" if layer / layers > 0.5 else INK
            for row in np.flatnonzero(shares > 0.07):
                middle = left[row] + shares[row] / 2
                axes.text(middle, row, layer, ha="center", va="center", color=ink, size=8.5)
            left += shares
        axes.grid(visible=False)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1))


def _by_saving(rows: Sequence[MatchedRow]) -> list[str]:
    """Families, the one that saves most first, by the mean over targets."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row.policy, []).append(1.0 if row.wall_ratio is None else row.wall_ratio)
    return sorted(ratios, key=lambda family: float(np.mean(ratios[family])))


def _draw_family(axes: plt.Axes, family: str, points: Sequence[FrontierPoint]) -> None:
    x, y = ([getattr(p, axis).value for p in points] for axis in ("wall", "quality"))
    shade = colour(family)
    if family not in COLOURS:
        axes.plot(x, y, "o-", color=shade, ms=3.5, lw=0.9, zorder=1)
        return
    # Rounding may put a value a hair outside its interval, which errorbar refuses.
    errors = [
        np.maximum([[v.value - v.low for v in each], [v.high - v.value for v in each]], 0)
        for each in ([p.wall for p in points], [p.quality for p in points])
    ]
    axes.errorbar(
        x, y, xerr=errors[0], yerr=errors[1], fmt="none", ecolor=shade, elinewidth=0.8,
        alpha=0.45, zorder=2,
    )  # fmt: skip
    axes.plot(x, y, "o-", color=shade, ms=5, lw=1.8, zorder=4)


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
        ink = colour(family, MUTED)
        axes.annotate(
            family, (end.wall.value, end.quality.value), xytext=(left, height), ha="right",
            va="center", color=ink, size=9, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": ink, "lw": 0.5, "alpha": 0.5, "shrinkB": 4},
        )  # fmt: skip
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.spines["left"].set_visible(False)
    axes.spines["right"].set_visible(True)
