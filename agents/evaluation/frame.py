"""How the pictures of an evaluation look: few colours, thin frames, notes beside what they name."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

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


def colour(family: str) -> str:
    """Of a family, or the grey of all others."""
    return COLOURS.get(family, OTHER)


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
    """A text at a point, moved by an offset in points."""
    axes.annotate(text, at, offset, textcoords="offset points", color=ink, size=size, ha=ha)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a PNG and forget the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
