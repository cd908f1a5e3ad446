"""The best of several texts by one class's score: layers, regret and time against full depth.

Heads are fitted to SST-2's training file, which also gives the bounds; the score is the chance that
a sentence is positive; groups of test sentences are drawn, and each is raced, then scored whole.

    PYTHONPATH=benchmarks python benchmarks/learning/best_of_many.py --model FOLDER --data FOLDER
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from classify import Data, load
from rich.console import Console

from offramp.agents.classifying.classify_config import ClassifyTuneConfig, exits_of_stack
from offramp.agents.classifying.head_task import fit_heads
from offramp.worker.classifying.best_of import BestOf
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_model import SequenceModel

RESAMPLES = 2000


def one_seed(data: Data, model: SequenceModel, seed: int, groups: int, size: int) -> np.ndarray:
    """Share of the layers, regret, whether it is the best, seconds raced and whole, by group."""
    stack = model.stack
    config = ClassifyTuneConfig(model="", data=Path(), seed=seed)
    exits = exits_of_stack(stack, ())
    heads, _ = fit_heads(data.train, data.states_NED, exits, stack.best_pool, config)
    classifier, positive = Classifier(stack, heads), heads.labels.index("1")
    race = BestOf(classifier, positive)
    rng = np.random.default_rng(seed)
    rows = []
    for group in range(groups + 1):
        picked = rng.choice(len(data.test), size, replace=False).tolist()
        texts = [data.test_sequences[place] for place in picked]
        began_s = time.perf_counter()
        best, raced = race.run(texts)
        middle_s = time.perf_counter()
        whole_N = classifier.run(texts).probs_NC[:, positive]
        ended_s = time.perf_counter()
        if group:  # the first warms up
            layers = raced.row_layers / (size * stack.layers)
            regret = float(whole_N.max() - whole_N[best])
            hit = float(best == whole_N.argmax())
            rows.append([layers, regret, hit, middle_s - began_s, ended_s - middle_s])
    return np.array(rows)


def main(
    model: Annotated[str, typer.Option(help="Encoder or causal LM, in Hugging Face format.")],
    data: Annotated[Path, typer.Option(help="Folder of the data sets.")],
    size: Annotated[int, typer.Option(help="Texts of a group.")] = 16,
    groups: Annotated[int, typer.Option(help="Groups per seed.")] = 200,
    seeds: Annotated[int, typer.Option(help="Splits, fits and draws.")] = 5,
    states: Annotated[Path | None, typer.Option(help="As in classify.py.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="The figures.")] = None,
) -> None:
    """Measure and print; write figures."""
    torch.set_num_threads(1)
    console = Console(width=110, highlight=False)
    loaded = SequenceModel.load(model)
    read = load(data, "sst2", loaded, console, states)
    rows = np.concatenate([one_seed(read, loaded, n, groups, size) for n in range(seeds)])
    drawn = rows[np.random.default_rng(0).integers(0, len(rows), (RESAMPLES, len(rows)))].mean(1)
    found: dict[str, Any] = {"model": Path(model).name, "size": size, "groups": len(rows)}
    for place, name in enumerate(("layers", "regret", "hits")):
        low, high = np.quantile(drawn[:, place], [0.025, 0.975]).tolist()
        found[name] = [float(rows[:, place].mean()), low, high]
    low, high = np.quantile(drawn[:, 3] / drawn[:, 4], [0.025, 0.975]).tolist()
    found["wall_ratio"] = [float(rows[:, 3].sum() / rows[:, 4].sum()), low, high]
    for name in ("layers", "regret", "hits", "wall_ratio"):
        console.print(
            f"{name:<10} {found[name][0]:.4f} [{found[name][1]:.4f}, {found[name][2]:.4f}]"
        )
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
