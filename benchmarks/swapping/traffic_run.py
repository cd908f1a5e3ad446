"""What happened while traffic changed, second by second, and its picture.

Shape suffixes: N looks, T tokens, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

MARKED = {
    "drifted": "drift",
    "moves to": "setting moves",
    "as a canary": "canary",
    "serves everybody": "takes over",
}
"""Stories that the picture shows, by words in them."""


@dataclass(slots=True)
class TrafficRun:
    """What happened, by seconds since the beginning.

    Attributes:
        tokens: Time, layers executed and generation of each token after a request's first.
        settings: Time, generation and certified setting (NaN: none) that new requests run at.
        audits: Time, audited and disagreeing tokens so far, over all releases.
        stories: What was said, and when.
        ended, errors: Requests that ended, and those that failed.
    """

    tokens: list[tuple[float, int, int]] = field(default_factory=list)
    settings: list[tuple[float, int, float]] = field(default_factory=list)
    audits: list[tuple[float, int, int]] = field(default_factory=list)
    stories: list[tuple[float, str]] = field(default_factory=list)
    ended: int = 0
    errors: list[str] = field(default_factory=list)


def draw(run: TrafficRun, changed_s: float, path: Path) -> None:
    """Draw disagreement, layers and certified setting over time."""
    mpl.use("Agg")
    figure, axes = plt.subplots(3, 1, figsize=(8, 6), sharex=True, layout="constrained")
    at_N, audited_N, disagreed_N = np.asarray(run.audits).T
    window = 10.0
    back_N = np.searchsorted(at_N, at_N - window)
    more_N = audited_N - audited_N[back_N]
    # Counts begin anew with each step of a canary, and at full depth nothing is audited.
    is_told_N = (more_N > 0) & (disagreed_N >= disagreed_N[back_N])
    share_N = np.where(
        is_told_N, (disagreed_N - disagreed_N[back_N]) / np.maximum(more_N, 1), np.nan
    )
    axes[0].plot(at_N, 100 * share_N)
    axes[0].set(ylabel="disagreement, %", ylim=(0, 40))
    when_T, layer_T, generation_T = np.asarray(sorted(run.tokens)).T
    for generation in np.unique(generation_T):
        own = generation_T == generation
        edges = np.arange(0, when_T[-1] + 5, 5.0)
        count_B, _ = np.histogram(when_T[own], edges)
        layers_B, _ = np.histogram(when_T[own], edges, weights=layer_T[own])
        mean_B = np.where(count_B > 0, layers_B / np.maximum(count_B, 1), np.nan)
        axes[1].plot(edges[:-1] + 2.5, mean_B, marker=".", label=f"generation {generation:.0f}")
    axes[1].set(ylabel="layers per token")
    axes[1].legend(frameon=False, fontsize=8)
    at_N, _, setting_N = np.asarray(run.settings).T
    axes[2].step(at_N, setting_N, where="post")
    axes[2].set(ylabel="certified setting\n(logit; higher is safer)", xlabel="seconds")
    marks = [(changed_s, "code → prose")]
    marks += [
        (at, label) for at, story in run.stories for said, label in MARKED.items() if said in story
    ]
    for number, (at, label) in enumerate(marks):
        axes[0].text(at, 39 - 6 * (number % 3), f" {label}", va="top", fontsize=8)
        for each in axes:
            each.axvline(at, color="grey", linestyle=":")
    figure.savefig(path, dpi=110)
