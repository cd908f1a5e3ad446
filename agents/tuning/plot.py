"""The picture of a tuning run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from offramp.agents.tuning.quality import ExitQuality

mpl.use("Agg")
from matplotlib import pyplot as plt

BEFORE, AFTER = "#9a9a9a", "#1b6ca8"


def draw_tuning(
    before: Sequence[ExitQuality],
    after: Sequence[ExitQuality],
    curve: Sequence[Sequence[float]],
    path: Path,
) -> None:
    """Agreement and KL per exit (full depth last), before and after, and the training loss."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), dpi=130, layout="constrained")
    _draw_pair(panels[0], before[:-1], after[:-1], "agreement", "token agreement with full depth")
    panels[0].set_ylim(0, 1)
    _draw_pair(panels[1], before[:-1], after[:-1], "kl", "KL(full depth ‖ exit), nats per token")
    _draw_curve(panels[2], curve, [row.layer for row in before[:-1]])
    panels[0].set_title("Held-out documents, teacher-forced", loc="left", fontsize=10)
    panels[2].set_title("Training", loc="left", fontsize=10)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=2,
                  loc="outside lower left")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _draw_pair(
    axes: plt.Axes,
    before: Sequence[ExitQuality],
    after: Sequence[ExitQuality],
    name: str,
    label: str,
) -> None:
    x = np.arange(len(before))
    for rows, shift, colour, title in (
        (before, -0.2, BEFORE, "own norm and head alone"),
        (after, 0.2, AFTER, "with translator"),
    ):
        values = [getattr(row, name) for row in rows]
        bars = axes.bar(x + shift, values, 0.38, color=colour, label=title)
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=1)
    axes.set_xticks(x, [str(row.layer) for row in before])
    axes.set_xlabel("exit after layer")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_curve(axes: plt.Axes, curve: Sequence[Sequence[float]], layers: Sequence[int]) -> None:
    values = np.asarray(curve)
    colours = plt.get_cmap("viridis")
    for index, layer in enumerate(layers):
        shade = colours(0.85 * index / max(1, len(layers) - 1))
        axes.plot(values[:, 0], values[:, index + 1], color=shade, lw=1.2, label=f"exit {layer}")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("KL, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
