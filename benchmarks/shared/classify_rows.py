"""Rows of the classification benchmark: made of what seeds came to, and shown as a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from offramp.agents.classifying.class_policies import ClassPolicy

RESAMPLES = 2000


@dataclass
class ClassifyRow:
    data: str
    model: str
    policy: str
    batch: int
    accuracy: float
    accuracy_loss: float
    mean_layers: float
    wall_ratio: float | None
    wall_ratio_low: float | None
    wall_ratio_high: float | None
    seeds: int
    budget_error: float | None
    """Of a budget: mean cost of the test texts over it, less 1, of the seed that keeps it least."""
    elue: float
    """Accuracy above that of fixed exits at as many layers, in the mean over seeds: ELUE's score
    (Liu et al. 2022), with this model's own exits in the place of ElasticBERT's."""


@dataclass
class Seed:
    """What one seed came to: policies on the test traces, and their times by batch."""

    tested: list[ClassPolicy]
    fixed: list[ClassPolicy]
    times: dict[int, NDArray[np.float64]]

    @property
    def better(self) -> float:
        """Accuracy of full depth or the best fixed exit, whichever is more."""
        return max(each.accuracy for each in self.fixed)

    def above_fixed(self, policy: ClassPolicy) -> float:
        """Accuracy above the line through the fixed exits, at the policy's layers."""
        layers, accuracies = zip(
            *((each.mean_layers, each.accuracy) for each in self.fixed), strict=True
        )
        return policy.accuracy - float(np.interp(policy.mean_layers, layers, accuracies))


def rows_of(data: str, model: str, seeds: list[Seed], batch: int) -> list[ClassifyRow]:
    rows = []
    rng = np.random.default_rng(0)
    for name in dict.fromkeys(each.family for seed in seeds for each in seed.tested):
        found = [
            (seed, place)
            for seed in seeds
            for place, each in enumerate(seed.tested)
            if each.family == name
        ]
        at = [seed.tested[place] for seed, place in found]
        ratio: tuple[float | None, float | None, float | None] = (None, None, None)
        if name != "label oracle":
            pairs = np.concatenate([seed.times[batch][:, [place, 0]] for seed, place in found])
            drawn = pairs[rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))].sum(1)
            low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]).tolist()
            ratio = (float(pairs[:, 0].sum() / pairs[:, 1].sum()), low, high)
        accuracy = float(np.mean([each.accuracy for each in at]))
        loss = float(np.mean([seed.better - seed.tested[place].accuracy for seed, place in found]))
        layers = float(np.mean([each.mean_layers for each in at]))
        errors = [each.cost / each.setting - 1 for each in at if name == "budget" and each.setting]
        error = max(errors, key=abs, default=None)
        elue = float(np.mean([seed.above_fixed(seed.tested[place]) for seed, place in found]))
        beside = (len(found), error, elue)
        rows.append(ClassifyRow(data, model, name, batch, accuracy, loss, layers, *ratio, *beside))
    return rows


def show(rows: list[ClassifyRow], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    heads = ("data", "batch", "policy", "accuracy", "loss", "ELUE", "layers", "wall ratio", "seeds")
    for name in heads:
        table.add_column(name)
    for row in rows:
        wall = (
            "–"
            if row.wall_ratio is None
            else f"{row.wall_ratio:.2f} [{row.wall_ratio_low:.2f}, {row.wall_ratio_high:.2f}]"
        )
        table.add_row(
            row.data, str(row.batch), row.policy, f"{row.accuracy:.3f}",
            f"{100 * row.accuracy_loss:+.1f}", f"{100 * row.elue:+.1f}", f"{row.mean_layers:.2f}",
            wall, str(row.seeds),
        )  # fmt: skip
    console.print(table)
