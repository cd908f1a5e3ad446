"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np

from offramp.agents.evaluate import EvaluationRow

mpl.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "full depth": "#222222",
    "fixed exit": "#9a9a9a",
    "CALM": "#d95f02",
    "CALM on candidates": "#e6ab02",
    "p̂": "#1b6ca8",
    "PPO": "#7b3294",
}


def draw_frontier(rows: Sequence[EvaluationRow], chosen: str, path: Path) -> None:
    """Agreement with full depth against wall time, with 95 % intervals; higher and left is better.

    Args:
        rows: Timed rows.
        chosen: Name of the published policy, which is ringed.
        path: PNG to write.
    """
    figure, axes = plt.subplots(figsize=(8, 5), dpi=130)
    for family in dict.fromkeys(row.family for row in rows):
        points = sorted(
            (row for row in rows if row.family == family), key=lambda row: row.agreement
        )
        _draw_family(axes, family, points)
    for row in rows:
        if row.policy == chosen:
            axes.plot(
                row.wall_ratio, row.agreement, "o", ms=15, mfc="none", mec="#c00000", mew=1.6,
                label="published",
            )  # fmt: skip
    axes.set_xlabel("wall time per token, relative to KV-cached full depth (batch 1)")
    axes.set_ylabel("token agreement with full depth")
    axes.set_title("Held-out documents, on-policy", loc="left")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def draw_exit_depths(depths_by_policy: dict[str, dict[int, int]], layers: int, path: Path) -> None:
    """Share of tokens by layers executed, one bar of shares per policy."""
    height = 1.2 + 0.42 * len(depths_by_policy)
    figure, axes = plt.subplots(figsize=(8, height), dpi=130, layout="constrained")
    colours = plt.get_cmap("viridis_r")
    names = list(depths_by_policy)
    seen = sorted({layer for depths in depths_by_policy.values() for layer in depths})
    left = np.zeros(len(names))
    for layer in seen:
        shares = np.asarray(
            [depths.get(layer, 0) / sum(depths.values()) for depths in depths_by_policy.values()]
        )
        axes.barh(names, shares, left=left, color=colours(layer / layers), label=f"{layer} layers")
        left += shares
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of tokens")
    axes.set_title("Layers executed per token", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=len(seen), loc="outside lower center")
    _save(figure, path)


def _draw_family(axes: plt.Axes, family: str, points: Sequence[EvaluationRow]) -> None:
    x = np.asarray([row.wall_ratio for row in points], float)
    y = np.asarray([row.agreement for row in points])
    low_high = [
        (x - [row.wall_ratio_low for row in points], [row.wall_ratio_high for row in points] - x),
        (y - [row.agreement_low for row in points], [row.agreement_high for row in points] - y),
    ]
    x_error, y_error = (np.maximum(np.stack(pair), 0) for pair in low_high)
    axes.errorbar(
        x, y, xerr=x_error, yerr=y_error, fmt="o-" if len(points) > 1 else "o",
        color=COLOURS.get(family, "#555555"), ms=5, lw=1.4, elinewidth=0.7, label=family,
    )  # fmt: skip


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
