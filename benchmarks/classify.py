"""Classify with early exits: accuracy by label and wall time against full depth, paired.

Heads, p̂, PPO and budgets are fitted to the training file; settings are chosen on a part of it that
nothing was fitted to; the test file is classified once. Texts are timed in turn under all policies.

    python benchmarks/classify.py --model FOLDER --data FOLDER --quick --json classify.json

``--data`` holds ``banking77/train.csv``, ``test.csv``, and ``sst2/train.tsv``, ``test.tsv``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from offramp.agents.classifying.class_policies import (
    AGENT,
    ClassPolicy,
    better_of,
    cheapest,
    learn_families,
    place_families,
    replayed,
)
from offramp.agents.classifying.class_timing import timed_in_turn
from offramp.agents.classifying.class_training import halves
from offramp.agents.classifying.classify_config import ClassifyTuneConfig, exits_of_stack
from offramp.agents.classifying.cross_fitting import cross_fitted_traces
from offramp.agents.classifying.exit_states import exit_states
from offramp.agents.classifying.head_task import fit_heads
from offramp.agents.classifying.labelled_texts import LabelledTexts, read_labelled
from offramp.agents.classifying.sequence_traces import read_texts, sequence_traces
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.fitting.backward_induction import fit_stopping
from offramp.research.fitting.budget import fit_kept_budget
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_costs import measure_costs
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.model.loading import parse_dtype

BUDGETS = np.linspace(0.2, 1.0, 33)
TRADE_OFFS = np.geomspace(0.02, 2.0, 41)
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


@dataclass
class Data:
    """One data set, with the states of all its texts."""

    name: str
    train: LabelledTexts
    test: LabelledTexts
    sequences: list[list[int]]
    test_sequences: list[list[int]]
    states_NED: NDArray[np.float32]
    test_NED: NDArray[np.float32]


def read(folder: Path, name: str) -> tuple[LabelledTexts, LabelledTexts]:
    if name == "banking77":
        return read_labelled(folder / name / "train.csv"), read_labelled(folder / name / "test.csv")
    found = []
    for split in ("train", "test"):
        lines = (folder / name / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        texts, labels = zip(*(line.split("\t") for line in lines if line.strip()), strict=True)
        found.append(LabelledTexts(tuple(texts), tuple(labels)))
    return found[0], found[1]


def load(
    folder: Path, name: str, model: SequenceModel, console: Console, states_in: Path | None
) -> Data:
    train, test = read(folder, name)
    exits = exits_of_stack(model.stack, ())
    parts: list[Any] = []
    for split, texts in (("train", train), ("test", test)):
        sequences = model.encode(texts.texts)
        kept = None if states_in is None else states_in / f"{name}-{split}"
        states = exit_states(model.stack, sequences, exits, model.stack.best_pool, kept)
        parts.append((sequences, states))
        console.print(f"{name}: {len(texts):,} texts read")
    (sequences, states_NED), (test_sequences, test_NED) = parts
    return Data(name, train, test, sequences, test_sequences, states_NED, test_NED)


@dataclass
class Seed:
    """What one seed came to: policies on the test traces, and their times by batch."""

    tested: list[ClassPolicy]
    better: float
    times: dict[int, NDArray[np.float64]]


def one_seed(
    data: Data, model: SequenceModel, seed: int, timed: int, batches: Sequence[int], steps: int
) -> Seed:
    exits = exits_of_stack(model.stack, ())
    config = ClassifyTuneConfig(model="", data=Path(), seed=seed)
    heads, _ = fit_heads(data.train, data.states_NED, exits, model.stack.best_pool, config)
    classifier = Classifier(model.stack, heads)
    rng = np.random.default_rng(seed)
    picked = rng.permutation(len(data.test))[:timed].tolist()
    costs = measure_costs(classifier, [data.test_sequences[place] for place in picked[:64]])
    read = read_texts(model, data.train, data.sequences)
    fit, choose = halves(cross_fitted_traces(heads, data.states_NED, read, seed), seed)
    agent = replace(AGENT, steps=steps) if steps else None
    families = learn_families(fit, costs, seed=seed, agent=agent)
    placed = place_families(families, choose, costs)
    placed += placed_fitted(fit, choose, costs, placed)
    test = sequence_traces(heads, data.test_NED, read_texts(model, data.test, data.test_sequences))
    tested = [replayed(each.family, each.setting, each.policy, test, costs) for each in placed]
    fixed = [replayed("", layer, FixedExit(layer), test, costs) for layer in exits[:-1]]
    better = max(tested[0].accuracy, *(each.accuracy for each in fixed))
    sequences = [data.test_sequences[place] for place in picked]
    policies = [each.policy for each in tested]
    times = {batch: timed_in_turn(classifier, policies, sequences, batch) for batch in batches}
    return Seed([*tested, oracle(test)], better, times)


def placed_fitted(
    fit: TokenTraces, choose: TokenTraces, costs: CostTable, placed: list[ClassPolicy]
) -> list[ClassPolicy]:
    """EERO's budget and backward induction, each at its cheapest setting within the loss."""
    fixed = [replayed("", layer, FixedExit(layer), choose, costs) for layer in choose.header.exits]
    better = better_of(placed[0], max(fixed, key=lambda each: each.accuracy))
    found = []
    for name, fitting, settings in (
        ("budget", fit_kept_budget, BUDGETS),
        ("backward induction", fit_stopping, TRADE_OFFS),
    ):
        tried = []
        for setting in settings.tolist():
            try:
                policy = fitting(fit, costs, setting, quality="label")
            except ConfigError:  # less than the cheapest exit takes
                continue
            tried.append(replayed(name, setting, policy, choose, costs))
        best = cheapest(tried, better)
        found += [best] if best else []
    return found


def oracle(traces: TokenTraces) -> ClassPolicy:
    """Leaves at the first exit that finds the label; at the first of all where none does."""
    right_NE = traces.quality("label") > 0
    depth_E = np.array([*traces.header.exits, traces.header.layers])
    return ClassPolicy(
        family="label oracle",
        setting=None,
        policy=FixedExit(1),
        accuracy=float(right_NE.any(-1).mean()),
        mean_layers=float(depth_E[right_NE.argmax(-1)].mean()),
        cost=0.0,
        right_N=np.asarray(right_NE.any(-1)),
    )


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
        rows.append(
            ClassifyRow(data, model, name, batch, accuracy, loss, layers, *ratio, len(found), error)
        )
    return rows


def show(rows: list[ClassifyRow], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("data", "batch", "policy", "accuracy", "loss", "layers", "wall ratio", "seeds"):
        table.add_column(name)
    for row in rows:
        wall = (
            "–"
            if row.wall_ratio is None
            else f"{row.wall_ratio:.2f} [{row.wall_ratio_low:.2f}, {row.wall_ratio_high:.2f}]"
        )
        table.add_row(
            row.data, str(row.batch), row.policy, f"{row.accuracy:.3f}",
            f"{100 * row.accuracy_loss:+.1f}", f"{row.mean_layers:.2f}", wall, str(row.seeds),
        )  # fmt: skip
    console.print(table)


def main(
    model: Annotated[str, typer.Option(help="Encoder or causal LM, in Hugging Face format.")],
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")],
    sets: Annotated[str, typer.Option(help="Data sets, with commas.")] = "banking77,sst2",
    batches: Annotated[str, typer.Option(help="Texts per batch, with commas.")] = "1,16",
    seeds: Annotated[int, typer.Option(help="Splits and fits.")] = 5,
    timed: Annotated[int, typer.Option(help="Test texts timed per seed.")] = 960,
    steps: Annotated[int, typer.Option(help="PPO's; 0 leaves it out.")] = AGENT.steps,
    dtype: str = "float32",
    states: Annotated[
        Path | None, typer.Option(help="Where this model's states are kept, to be found again.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 288 texts timed.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Rows.")] = None,
) -> None:
    """Measure and print; write rows."""
    torch.set_num_threads(1)
    console = Console(width=110, highlight=False)
    if quick:
        seeds, timed = 2, 288
    loaded = SequenceModel.load(model, parse_dtype(dtype))
    sizes = [int(each) for each in batches.split(",")]
    rows: list[ClassifyRow] = []
    for name in sets.split(","):
        one = load(data, name, loaded, console, states)
        found = [one_seed(one, loaded, seed, timed, sizes, steps) for seed in range(seeds)]
        for batch in sizes:
            rows += rows_of(name, Path(model).name, found, batch)
        show(rows, console)
        if json_path is not None:  # after each set: the next may take an hour
            json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
