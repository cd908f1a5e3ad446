"""Pictures with a line per policy: promises, exit depths, energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from offramp.agents.evaluation.frame import INK, STYLE, colour, note, save
from offramp.agents.evaluation.statistics import Estimate


@dataclass(frozen=True, slots=True)
class Gap:
    """Agreement that replaying traces had promised, and what decoding kept."""

    name: str
    family: str
    promised: float
    kept: float


@dataclass(frozen=True, slots=True)
class Take:
    """Joules per token that a policy takes, over full depth's."""

    name: str
    family: str
    ratio: Estimate


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
            note(axes, text, (leftmost, place), (-8, -3), "#555555", ha="right", size=8.5)
        axes.set_yticks(range(len(ordered)), [gap.name for gap in ordered])
        axes.set_ylim(len(ordered) - 0.4, -0.9)
        axes.margins(x=0.12)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("token agreement with full depth: ○ replay promised, ● decoding kept")
        axes.set_title("Offline promise against on-policy fact, in points")
        save(figure, path)


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
        save(figure, path)


def draw_energy(takes: Sequence[Take], method: str, path: Path) -> None:
    """Joules per token over full depth's, a dot with its interval per policy."""
    order = sorted(takes, key=lambda take: take.ratio.value)
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.8 + 0.3 * len(order)))
        for place, take in enumerate(order):
            each, shade = take.ratio, colour(take.family)
            axes.plot([each.low, each.high], [place, place], color=shade, lw=1.6)
            axes.plot(each.value, place, "o", color=shade, ms=7)
        axes.axvline(1, color="#bbbbbb", lw=1, ls="--", zorder=0)
        axes.set_yticks(range(len(order)), [take.name for take in order])
        axes.set_ylim(len(order) - 0.4, -0.6)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(f"joules per token ÷ full depth, {method}")
        axes.set_title(f"Energy ({method})")
        save(figure, path)
