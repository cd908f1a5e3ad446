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
from rich.console import Console
from shared.classify_rows import ClassifyRow, Seed, rows_of, show

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
from offramp.agents.classifying.head_task import HeadTask, fit_heads, three_ways
from offramp.agents.classifying.joint_heads import fit_joint
from offramp.agents.classifying.labelled_texts import LabelledTexts, read_labelled
from offramp.agents.classifying.sequence_traces import read_texts, sequence_traces
from offramp.controller.adapters.adapter_folder import read_description
from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.envs.traces.tokens import TokenTraces
from offramp.research.fitting.backward_induction import fit_stopping
from offramp.research.fitting.budget import fit_kept_budget
from offramp.worker.classifying.class_heads import ClassHeads
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_costs import measure_costs
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.model.loading import parse_dtype

BUDGETS = np.linspace(0.2, 1.0, 33)
TRADE_OFFS = np.geomspace(0.02, 2.0, 41)


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


@dataclass(frozen=True)
class Asked:
    """What is measured of each data set.

    Attributes:
        timed: Test texts timed per seed.
        batches: Texts that run together.
        steps: PPO's.
        heads: Folder of heads that are taken as they are; None fits them, anew for each seed.
        joint: Costs of depth at which gates are fitted with heads of their own.
    """

    timed: int
    batches: tuple[int, ...]
    steps: int
    heads: Path | None
    joint: tuple[float, ...]


def heads_and_traces(
    data: Data, model: SequenceModel, seed: int, folder: Path | None
) -> tuple[ClassHeads, TokenTraces]:
    """Heads, and what they say of texts of the training file that they were not fitted to."""
    read = read_texts(model, data.train, data.sequences)
    if folder is not None:
        heads, facts = model.heads(folder), read_description(folder)
        held = np.concatenate(three_ways(data.train, facts["held_out"], facts["seed"])[1:])
        return heads, sequence_traces(heads, data.states_NED[held], read.of(held))
    config = ClassifyTuneConfig(model="", data=Path(), seed=seed)
    exits = exits_of_stack(model.stack, ())
    heads, _ = fit_heads(data.train, data.states_NED, exits, model.stack.best_pool, config)
    return heads, cross_fitted_traces(heads, data.states_NED, read, seed)


def one_seed(data: Data, model: SequenceModel, seed: int, asked: Asked) -> Seed:
    heads, traces = heads_and_traces(data, model, seed, asked.heads)
    exits = heads.exits
    classifier = Classifier(model.stack, heads)
    rng = np.random.default_rng(seed)
    picked = rng.permutation(len(data.test))[: asked.timed].tolist()
    costs = measure_costs(classifier, [data.test_sequences[place] for place in picked[:64]])
    fit, choose = halves(traces, seed)
    agent = replace(AGENT, steps=asked.steps) if asked.steps else None
    families = learn_families(fit, costs, seed=seed, agent=agent)
    placed = place_families(families, choose, costs)
    placed += placed_fitted(fit, choose, costs, placed)
    read = read_texts(model, data.test, data.test_sequences)
    test = sequence_traces(heads, data.test_NED, read)
    tested = [replayed(each.family, each.setting, each.policy, test, costs) for each in placed]
    fixed = [replayed("", layer, FixedExit(layer), test, costs) for layer in exits[:-1]]
    fixed.append(replayed("", None, NeverExit(), test, costs))
    runs = [(classifier, each.policy) for each in tested]
    if asked.joint and (found := joint_heads(data, model, seed, costs, asked.joint)):
        own, gates = found
        told = sequence_traces(own, data.test_NED, read)
        tested.append(replayed(gates.family, gates.setting, gates.policy, told, costs))
        runs.append((Classifier(model.stack, own), gates.policy))
    sequences = [data.test_sequences[place] for place in picked]
    times = {batch: timed_in_turn(runs, sequences, batch) for batch in asked.batches}
    return Seed([*tested, oracle(test)], fixed, times)


def joint_heads(
    data: Data, model: SequenceModel, seed: int, costs: CostTable, at: Sequence[float]
) -> tuple[ClassHeads, ClassPolicy] | None:
    """Gates with their heads, at the cost of depth that is cheapest within the loss."""
    parts = three_ways(data.train, ClassifyTuneConfig(model="", data=Path()).held_out, seed)
    read = read_texts(model, data.train, data.sequences)
    exits, pool, unseen = exits_of_stack(model.stack, ()), model.stack.best_pool, parts[2]
    task = HeadTask(texts=data.train, sequences=(), exits=exits, pool=pool, parts=parts)
    # What the loss is below: heads that were fitted alone, on the same texts.
    alone, _ = task.finish(
        task.plain_heads(data.states_NED, lambda *_: None), data.states_NED[task.held]
    )
    traces = sequence_traces(alone, data.states_NED[unseen], read.of(unseen))
    fixed = [replayed("", layer, FixedExit(layer), traces, costs) for layer in exits[:-1]]
    full = replayed("", None, NeverExit(), traces, costs)
    better = better_of(full, max(fixed, key=lambda each: each.accuracy))
    tried: list[tuple[ClassHeads, ClassPolicy]] = []
    for cost in at:
        plain, gates = fit_joint(
            data.states_NED, read, exits, pool, *parts[:2], cost, seed, lambda *_: None
        )
        own, _ = task.finish(plain, data.states_NED[task.held])
        told = sequence_traces(own, data.states_NED[unseen], read.of(unseen))
        tried.append((own, replayed("JEI-DNN", cost, gates, told, costs)))
    best = cheapest([each for _, each in tried], better)
    return next((each for each in tried if each[1] is best), None)


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
    heads: Annotated[
        Path | None, typer.Option(help="Heads taken as they are; with one of --sets alone.")
    ] = None,
    joint: Annotated[
        str, typer.Option(help="Costs of depth, nats, that gates are fitted at with own heads.")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 288 texts timed.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Rows.")] = None,
) -> None:
    """Measure and print; write rows."""
    torch.set_num_threads(1)
    console = Console(width=110, highlight=False)
    if quick:
        seeds, timed = 2, 288
    loaded = SequenceModel.load(model, parse_dtype(dtype))
    sizes = tuple(int(each) for each in batches.split(","))
    at = tuple(float(each) for each in joint.split(",") if each)
    asked = Asked(timed, sizes, steps, heads, at)
    rows: list[ClassifyRow] = []
    for name in sets.split(","):
        one = load(data, name, loaded, console, states)
        found = [one_seed(one, loaded, seed, asked) for seed in range(seeds)]
        for batch in sizes:
            rows += rows_of(name, Path(model).name, found, batch)
        show(rows, console)
        if json_path is not None:  # after each set: the next may take an hour
            json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
