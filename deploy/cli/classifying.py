"""Run what ``tune``, ``train`` and ``calibrate`` do for a classification, with its heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from offramp.agents.calibration.calibrate import MeasuredWith, Promise, require_enough, require_read
from offramp.agents.calibration.calibration_documents import CalibrationDocument
from offramp.agents.calibration.label_losses import LABEL_LOSSES, Labels
from offramp.agents.classifying.class_training import ClassTrainConfig, ClassTraining, train_classes
from offramp.agents.classifying.classify_config import (
    HEADS,
    JOINT,
    MODEL,
    ONLY_WITH,
    ClassifyTuneConfig,
)
from offramp.agents.classifying.classify_tuning import GATES, tune_classes
from offramp.agents.classifying.head_task import ClassifyReport
from offramp.agents.classifying.labelled_texts import (
    TEXTS,
    encoded,
    known_texts,
    read_labelled,
    text_digest,
    unknown_among,
)
from offramp.controller.adapters.adapter_folder import OF_HEADS, read_description
from offramp.controller.errors import ConfigError
from offramp.deploy.cli import options
from offramp.deploy.cli.console import console, keeping, progress, say
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.model.loading import parse_dtype

TOKENS, CLASSIFY = "tokens", "classify"
"""What ``offramp tune`` fits exits for."""

Heads = Annotated[
    Path | None, typer.Option(help="To classify: folder that `offramp tune --task classify` wrote.")
]
Data = Annotated[Path | None, typer.Option(help="With --heads: texts with labels, .csv or .jsonl.")]


def tune_heads(given: dict[str, Any], out: Path, resume: bool) -> None:
    """Fit heads from what was typed of the options that mean something to them.

    Raises:
        ConfigError: there is no data, or an option is unusable.
        TraceError, ModelError: the data or the model are.
    """
    given = {"model": options.DEFAULT_MODEL} | given
    given["exits"] = options.parse_layers("exits", given.get("exits", ""))
    if given.get("data") is None:
        raise ConfigError("data", "is missing", "Name a .csv or .jsonl file of texts with labels")
    for way, only in ONLY_WITH.items():
        if given.get("fit", HEADS) != way:
            typed = {name: name in given for name in only}
            options.require_unused(typed, f"means nothing without --fit {way}")
    names = given.keys() - {"out", "task", "resume"}
    config = ClassifyTuneConfig(**{name: given[name] for name in names})
    if not resume:
        options.require_new_folder("out", out)
    units = {"heads": "heads", "train": "steps"}
    with keeping(out, "--resume goes on"), progress("states", "texts", **units) as advance:
        report = tune_classes(
            config,
            out,
            resume=resume,
            on_progress=lambda stage, done, total: advance(done, total, stage),
        )
    console.print(heads_table(report))
    console.print(
        f"{report.classes} classes, {report.learned:,} texts learned from, "
        f"{report.measured:,} measured on → {out}"
    )
    if config.fit == MODEL:
        console.print(f"the model that they are of → {out / MODEL}")
    if config.fit == JOINT:
        console.print(f"the policy of their gates → {out / GATES}")


def heads_table(report: ClassifyReport) -> Table:
    """Each exit's accuracy and calibration error, before → after its temperature."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("exit", "accuracy", "calibration error", "temperature"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, row in enumerate(report.rows):
        table.add_row(
            "full" if place == len(report.rows) - 1 else str(row.layer),
            f"{row.accuracy:.3f}",
            f"{row.error_before:.3f} → {row.error_after:.3f}",
            f"{row.temperature:.2f}",
        )
    return table


def teach_classes(asked: Mapping[str, Any], out: Path) -> None:
    """Train policies for the heads of a folder, and show where they stand.

    Raises:
        ConfigError: no heads or no data, or others' heads.
        TraceError, ModelError: the data or the model are unusable.
    """
    for name in ("heads", "data"):
        if asked[name] is None:
            raise ConfigError(name, f"is not given, and --for {CLASSIFY} needs it", "Name it")
    names = ("model", "heads", "data", "steps", "threads", "seed")
    lesson = ClassTrainConfig(
        **{name: asked[name] for name in names}, dtype=asked["dtype"] or "float32"
    )
    options.require_new_folder("out", out)
    with progress("states", "texts", heads="heads") as advance:
        found = train_classes(lesson, out, lambda stage, done, total: advance(done, total, stage))
    console.print(placed_table(found))
    say(
        f"{found.learned:,} texts learned from, settings chosen on {found.measured:,}; "
        f"chosen: {found.chosen.family} → {out}"
    )


def placed_table(found: ClassTraining) -> Table:
    """Every saved policy, as replay finds it on the texts that settings were chosen on."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("policy", "setting", "accuracy", "layers", "cost / full depth"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for each in found.placed:
        table.add_row(
            each.family,
            "" if each.setting is None else f"{each.setting:.3g}",
            f"{each.accuracy:.3f}",
            f"{each.mean_layers:.2f}",
            f"{each.cost:.3f}",
        )
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSource:
    """What labels are lost with, and on which texts.

    Attributes:
        heads: Folder of the heads.
        data: File of texts with labels that nothing was fitted to or chosen on.
        model, dtype, device: The model.
        policies: Folder of the policies, which says what they learned from.
        documents: Texts at most.
    """

    heads: Path
    data: Path | None
    model: str
    dtype: str
    device: str
    policies: Path
    documents: int

    def open(
        self, loss: str, promise: Promise, named: str
    ) -> tuple[MeasuredWith, list[CalibrationDocument], Labels]:
        """Read the texts that were not learned from, and load what classifies them.

        Args:
            loss: Name of the loss; "" for the first of LABEL_LOSSES.
            promise: What is to be guaranteed of it.
            named: Digest of the heads that the policies name.

        Raises:
            ConfigError: no data, unknown loss, too few texts, or the heads' own.
            TraceError, ModelError: the data or the model are unusable.
        """
        loss = loss or next(iter(LABEL_LOSSES))
        if loss not in LABEL_LOSSES:
            raise ConfigError("loss", f"{loss!r} is unknown", f"Use {', '.join(LABEL_LOSSES)}")
        if self.data is None:
            raise ConfigError("data", "is missing", "Name a .csv or .jsonl file of other texts")
        texts, facts = read_labelled(self.data), read_description(self.heads, OF_HEADS)
        require_read(named, str(facts.get("digest")), "heads")
        if facts.get("data") == texts.digest:
            raise ConfigError("data", "is the file that the heads were fitted to", "Give others")
        if not (self.policies / TEXTS).exists():
            raise ConfigError(
                "policies", f"{self.policies} does not say which texts it knows", "Train it again"
            )
        known = known_texts(self.policies) | known_texts(self.heads)
        places = unknown_among(texts, known)
        require_enough(promise, min(len(places), self.documents), "data")
        texts = texts.of(places)
        model = SequenceModel.load(self.model, parse_dtype(self.dtype), self.device)
        classifier = model.classifier(self.heads)
        # Of the whole file, though few may be drawn: a mistake in it is one whatever is drawn.
        label_N, whole = texts.indices(classifier.heads.labels), encoded(model, texts)
        # A file may be sorted by class, digests are not.
        by_digest = sorted(range(len(texts)), key=lambda place: text_digest(texts.texts[place]))
        drawn = np.array(by_digest[: self.documents])
        texts, sequences = texts.of(drawn), [whole[place] for place in drawn.tolist()]
        labels = Labels(classifier, sequences, label_N[drawn], LABEL_LOSSES[loss])
        say(
            f"{len(texts)} of {len(places)} texts (--documents); full depth does not find "
            f"{labels.full_error:.1%} of the labels"
        )
        windows = [
            CalibrationDocument(text_digest(text), tuple(tokens))
            for text, tokens in zip(texts.texts, sequences, strict=True)
        ]
        measured = MeasuredWith(
            model=model.fingerprint,
            tokenizer=model.tokenizer_fingerprint,
            adapters=classifier.heads.digest,
            dtype=self.dtype,
            layers=classifier.stack.layers,
            option="heads",
        )
        return measured, windows, labels
