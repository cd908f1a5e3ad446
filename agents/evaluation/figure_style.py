"""How figures look: few colours, thin frames, notes beside what they name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from offramp.agents.evaluation.statistics import Estimate

COLOURS = {
    "fixed exit": "#4d4d4d",
    "CALM": "#d95f02",
    "p̂": "#1b6ca8",
    "p̂ on best exits": "#0a8f6c",
    "PPO": "#7b3294",
    "PPO with jumps": "#c2185b",
    "PPO jumps": "#c2185b",
    "PPO on-policy": "#e69f00",
}
"""Families that are followed by eye; every other one is grey."""

OTHER = "#a8a8a8"
MUTED = "#777777"
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


def colour(family: str, other: str = OTHER) -> str:
    """The colour of a family, or the grey of all others."""
    return COLOURS.get(family, other)


def note(
    axes: plt.Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    ink: str,
    *,
    ha: str = "left",
    size: float = 9,
) -> None:
    """Write a text at a point, moved by an offset in points."""
    axes.annotate(text, at, offset, textcoords="offset points", color=ink, size=size, ha=ha)


@contextmanager
def one_row_each(
    names: Sequence[str], path: Path, *, title: str, label: str, height: float = 0.3
) -> Iterator[plt.Axes]:
    """Yield axes with a row per name, the first on top, and write them to a PNG afterwards."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 1.8 + height * len(names)))
        bare_rows(axes)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel(label)
        axes.set_title(title)
        yield axes
        save(figure, path)


def bare_rows(axes: plt.Axes) -> None:
    """Take away the frame and the ticks on the left of named rows."""
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def dot_with_interval(
    axes: plt.Axes, estimate: Estimate, row: int, shade: str, *, is_hollow: bool = False
) -> None:
    """Draw an estimate in a row: a dot on the line of its interval."""
    axes.plot([estimate.low, estimate.high], [row, row], color=shade, lw=1.6)
    fill = "white" if is_hollow else shade
    axes.plot(estimate.value, row, "o", color=shade, mfc=fill, ms=7, mew=1.5)


def mark_full_depth(axes: plt.Axes) -> None:
    """Draw full depth's own time or energy, a dashed line at 1."""
    axes.axvline(1, color="#bbbbbb", lw=1, ls="--", zorder=0)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG and forget the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
