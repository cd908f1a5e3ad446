"""The demo's third act: texts are classified, and leave early."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.text import Text

from offramp.agents.classifying.class_timing import timed_in_turn
from offramp.agents.classifying.class_training import ClassTrainConfig, train_classes
from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import tune_classes
from offramp.agents.classifying.labelled_texts import LabelledTexts, encoded, read_labelled
from offramp.agents.placing.contenders import CHOSEN
from offramp.controller.policies.protocols import NeverExit
from offramp.controller.release.bundle import PolicyBundle
from offramp.deploy.cli.classifying import heads_table, placed_table
from offramp.deploy.cli.console import console, progress, say
from offramp.deploy.demo.demo_config import DemoConfig
from offramp.deploy.demo.show import DEPTH_STYLES
from offramp.worker.classifying.classifier import Classified, Classifier
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.sequence_stack import SequenceStack
from offramp.worker.model.loading import parse_dtype

DATA = Path(__file__).parent / "intents"
"""Texts with labels; their README says where they come from."""

SHARES = (0.1, 0.2, 0.35, 0.5, 0.75)
"""Depths of the exits, as shares of the model's layers: more where most texts leave."""

BATCHES = (1, 16)
ROWS = 16
"""Texts that run together while accuracy is measured."""

SHOWN = 6
"""Texts that are printed, with where they left."""


def classify_act(config: DemoConfig, number: str = "") -> dict[str, Any]:
    """Fit heads, learn policies, and classify other texts at full depth and under the chosen one.

    Args:
        config: The model, how many intents, and where files go.
        number: What stands before the title.

    Returns:
        What the report says of it.

    Raises:
        OfframpError: the model cannot be used.
    """
    begun = time.monotonic()
    console.rule(f"[bold]{number}Classify[/]: a text that leaves early is gone", align="left")
    torch.set_num_threads(config.threads)
    model = SequenceModel.load(config.model, parse_dtype(config.dtype))
    train, test = (_some(read_labelled(DATA / f"{s}.csv"), config) for s in ("train", "test"))
    data = config.out / "intents.csv"
    _write(data, train)
    classifier = _learn(config, model, data)
    bundle = PolicyBundle.load(config.out / "class_policies" / CHOSEN)
    chosen = bundle.policy()
    sequences = encoded(model, test)
    label_N = test.indices(classifier.heads.labels)
    contenders = [(classifier, policy) for policy in (NeverExit(), chosen)]
    runs = [_run(classifier, sequences, policy) for _, policy in contenders]
    accuracy = [float(np.mean(_labels(run) == label_N)) for run in runs]
    layers = [float(np.mean(np.concatenate([each.layers_N for each in run]))) for run in runs]
    ratios = {}
    for batch in BATCHES:
        full_s, chosen_s = timed_in_turn(contenders, sequences, batch).sum(0)
        ratios[batch] = float(chosen_s / full_s)
    _show(test, classifier, runs[1])
    family = str(bundle.manifest.training["family"])
    say(
        f"  {len(test)} other texts of {len(classifier.heads.labels)} intents: full depth finds "
        f"{accuracy[0]:.1%} with {layers[0]:.0f} layers, {family} {accuracy[1]:.1%} with "
        f"{layers[1]:.1f}, in "
        + " and ".join(f"{each:.2f} of its time at batch {b}" for b, each in ratios.items())
    )
    return {
        "family": family,
        "texts": len(test),
        "labels": len(classifier.heads.labels),
        "accuracy_full_depth": accuracy[0],
        "accuracy": accuracy[1],
        "layers": classifier.stack.layers,
        "mean_layers": layers[1],
        "wall_ratios": {str(batch): ratio for batch, ratio in ratios.items()},
        "seconds": time.monotonic() - begun,
    }


def _learn(config: DemoConfig, model: SequenceModel, data: Path) -> Classifier:
    """Fit heads to the data and learn policies of them; both are saved, and shown."""
    heads, policies = config.out / "heads", config.out / "class_policies"
    how = ClassifyTuneConfig(
        model=config.model,
        data=data,
        exits=_exits(model.stack),
        dtype=config.dtype,
        threads=config.threads,
        seed=config.seed,
    )
    with progress("states", "texts", heads="heads") as advance:
        report = tune_classes(
            how, heads, on_progress=lambda stage, done, total: advance(done, total, stage)
        )
    console.print(heads_table(report))
    # PPO would take as long as all else together, and ties with p̂ where labels are learned from.
    lesson = ClassTrainConfig(
        model=config.model,
        heads=heads,
        data=data,
        steps=0,
        dtype=config.dtype,
        threads=config.threads,
        seed=config.seed,
    )
    with progress("states", "texts", heads="heads") as advance:
        found = train_classes(
            lesson, policies, lambda stage, done, total: advance(done, total, stage)
        )
    console.print(placed_table(found))
    say(
        f"  {found.learned:,} texts learned from, settings chosen on {found.measured:,}: "
        f"{found.chosen.family} is the cheapest that loses half a point there at most"
    )
    return model.classifier(heads)


def _exits(stack: SequenceStack) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(share * stack.layers)) for share in SHARES}))


def _some(texts: LabelledTexts, config: DemoConfig) -> LabelledTexts:
    """The texts of the first intents."""
    names = texts.classes[: config.intents]
    return texts.of(np.array([n for n, label in enumerate(texts.labels) if label in names]))


def _write(path: Path, texts: LabelledTexts) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["text", "category"])
        lines.writerows(zip(texts.texts, texts.labels, strict=True))


def _run(classifier: Classifier, sequences: list[list[int]], policy: Any) -> list[Classified]:
    starts = range(0, len(sequences), ROWS)
    return [classifier.run(sequences[at : at + ROWS], policy) for at in starts]


def _labels(run: list[Classified]) -> Any:
    return np.concatenate([each.label_N for each in run])


def _show(texts: LabelledTexts, classifier: Classifier, run: list[Classified]) -> None:
    """Some texts, each coloured by the layers it took, with what was found."""
    layers_N = np.concatenate([each.layers_N for each in run])
    seen = classifier.heads.exits
    for place in np.linspace(0, len(texts) - 1, SHOWN).astype(int).tolist():
        depth, found = int(layers_N[place]), classifier.heads.labels[_labels(run)[place]]
        style = DEPTH_STYLES[min(seen.index(depth), len(DEPTH_STYLES) - 1)]
        line = Text(f"  {depth:>2} layers  ", style=style)
        line.append(texts.texts[place][:70], style="dim")
        is_right = found == texts.labels[place]
        say(line.append(f"  {found}", style="bold" if is_right else "strike"))
