"""From texts with labels to a certified bundle, as it is typed; and what is refused on the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from offramp.agents.calibration.label_losses import Labels
from offramp.agents.classifying.class_training import ClassTrainConfig, train_classes
from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import tune_classes
from offramp.agents.placing.contenders import CHOSEN, load_contenders
from offramp.controller.adapters.adapter_folder import KEPT, read_description
from offramp.controller.release.bundle import PolicyBundle
from offramp.worker.classifying.sequence_model import SequenceModel
from support.classifying.labelled_files import encoder_folder, labelled_file


class Files:
    """A model, its heads, the texts that these were fitted to, and policies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = encoder_folder(folder / "model")
        self.train = labelled_file(folder / "train.csv")
        self.other = labelled_file(folder / "other.csv", texts=300, seed=9)
        self.heads, self.policies = folder / "heads", folder / "policies"
        tune_classes(ClassifyTuneConfig(model=str(self.model), data=self.train), self.heads)
        lesson = ClassTrainConfig(model=str(self.model), heads=self.heads, data=self.train, steps=0)
        self.training = train_classes(lesson, self.policies, lambda *_: None)

    def calibrate(self, *options: object) -> tuple[object, ...]:
        words = ("calibrate", "--policies", self.policies, "--heads", self.heads)
        return (*words, "--model", self.model, *options)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("files"))


def test_what_is_trained_is_a_bundle_that_names_the_heads(files: Files) -> None:
    heads = SequenceModel.load(files.model).classifier(files.heads).heads
    families = {each.family for each in load_contenders(files.policies)}
    assert {"full depth", "fixed exit", "entropy", "margin", "Q-exit", "p̂"} <= families
    chosen = PolicyBundle.load(files.policies / CHOSEN).manifest
    assert chosen.adapters == heads.digest
    assert chosen.training["task"] == "classify"
    assert chosen.training["family"] == files.training.chosen.family
    assert files.training.chosen.cost < 1


@pytest.mark.parametrize(("loss", "delta"), [("label-error", 0.3), ("lost-labels", 0.2)])
def test_a_certificate_bounds_what_is_lost_by_label(
    cli: Any, files: Files, tmp_path: Path, loss: str, delta: float
) -> None:
    out = tmp_path / "certified"
    status, said = cli(
        *files.calibrate("--data", files.other, "--loss", loss, "--delta", delta),
        "--family", "p̂", "--documents", 300, "--out", out,
    )  # fmt: skip
    assert status == 0, said
    certificate = PolicyBundle.load(out).manifest.certificate
    assert certificate is not None
    assert certificate.loss == loss.replace("-", " ")
    assert certificate.decode_mode == "classify"
    assert certificate.translators == PolicyBundle.load(out).manifest.adapters
    assert certificate.risk <= delta
    assert "classified" in certificate.statement
    report = json.loads((out / "calibration.json").read_text())
    assert report["n"] == 300
    assert read_description(out / KEPT)["digest"] == certificate.translators
    # It says nothing of tokens.
    assert "decode_mode" in certificate.gap(kv_mode="project", dtype="float32", translators="")


def test_texts_that_were_learned_from_certify_nothing(cli: Any, files: Files) -> None:
    message = cli.refused(*files.calibrate("--data", files.train))
    assert message.startswith("data: is the file that the heads were fitted to")
    copy = files.folder / "copy.csv"
    copy.write_text("\n".join(files.train.read_text().splitlines()[:-2]) + "\n")
    assert "documents: 0 unseen ones" in cli.refused(*files.calibrate("--data", copy))


def test_a_mistake_anywhere_in_the_file_is_told(cli: Any, files: Files, tmp_path: Path) -> None:
    lines = files.other.read_text().splitlines()
    for last, said in (("w5,c", "line 302 of .* has the label 'c'"), ("w6 " * 65 + ",a", "65 tok")):
        data = tmp_path / "texts.csv"
        data.write_text("\n".join([*lines, last]) + "\n")
        words = files.calibrate("--data", data, "--delta", 0.3, "--documents", 50)
        assert re.search(said, cli.refused(*words, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_texts_are_drawn_from_all_over_a_file_sorted_by_class(
    cli: Any, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = sorted(files.other.read_text().splitlines()[1:], key=lambda line: line[-1])
    data, drawn = tmp_path / "sorted.csv", []
    data.write_text("\n".join(["text,label", *lines]) + "\n")

    def noted(classifier: Any, sequences: Any, label_N: Any, loss: Any) -> Labels:
        drawn.append(label_N)
        return Labels(classifier, sequences, label_N, loss)

    monkeypatch.setattr("offramp.deploy.cli.classifying.Labels", noted)
    words = files.calibrate("--data", data, "--delta", 0.5, "--documents", 100, "--family", "p̂")
    status, said = cli(*words, "--out", tmp_path / "out")
    assert status == 0, said
    assert "100 of 300 texts" in said
    assert len(drawn[0]) == 100
    assert 0.3 < drawn[0].mean() < 0.7


def test_a_report_of_nothing_certified_gives_way_to_the_next_run(
    cli: Any, files: Files, tmp_path: Path
) -> None:
    out = tmp_path / "certified"
    words = files.calibrate("--data", files.other, "--documents", 300, "--out", out)
    status, said = cli(*words, "--delta", 0.02, "--epsilon", 0.2, "--family", "p̂")
    assert status == 3, said
    assert [each.name for each in out.iterdir()] == ["calibration.json"]
    assert cli(*words, "--delta", 0.3, "--family", "p̂")[0] == 0
    told = cli.refused(*words, "--delta", 0.3, "--family", "p̂")
    assert told.startswith(f"out: {out} is not a new or empty folder")


def test_too_few_texts_are_asked_for_where_they_come_from(cli: Any, files: Files) -> None:
    words = files.calibrate("--data", files.other, "--documents", 3, "--family", "p̂")
    told = cli.refused(*words)
    assert told.startswith("documents: 3 unseen ones")
    assert "Give more, in a larger --data" in told


def test_other_heads_are_refused_by_name(cli: Any, files: Files, tmp_path: Path) -> None:
    heads = tmp_path / "heads"
    tune_classes(ClassifyTuneConfig(model=str(files.model), data=files.train, seed=1), heads)
    words = ("calibrate", "--policies", files.policies, "--heads", heads, "--model", files.model)
    message = cli.refused(*words, "--data", files.other, "--family", "p̂", "--delta", 0.3)
    own = PolicyBundle.load(files.policies / CHOSEN).manifest.adapters
    assert message.startswith(f"heads: the policies were recorded through heads {own[:12]}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "--for", "classify"), "heads: is not given"),
        (("train", "--for", "classify", "--heads", "h"), "data: is not given"),
        (("train", "--for", "classify", "--traces", "t"), "traces: does not go with"),
        (("train", "--heads", "h", "--traces", "t"), "heads: means nothing without --for classify"),
        (("calibrate", "--policies", "p"), "traces: is not given"),
        (("calibrate", "--policies", "p", "--data", "d"), "data: means nothing without --heads"),
        (("calibrate", "--policies", "p", "--heads", "h", "--replay"), "replay: means nothing"),
        (("calibrate", "--policies", "p", "--heads", "h", "--kv-mode", "defer"), "kv_mode: means"),
        (("calibrate", "--policies", "p", "--heads", "h", "--slots", "4"), "slots: means nothing"),
        (("calibrate", "--policies", "p", "--heads", "h", "--quality", ".9"), "quality: means"),
        (("calibrate", "--policies", "p", "--heads", "h", "--unit", "token"), "unit: means"),
        (("train", "--for", "classify", "--targets", ".9"), "targets: does not go with --for cl"),
        (("train", "--for", "classify", "--config", "f"), "config: does not go with --for cl"),
        (("train", "--for", "drafting", "--targets", ".9"), "targets: does not go with --for dr"),
        (("train", "--for", "prompts", "--config", "f", "--model", "m"), "model: is a setting of"),
        (("train", "--config", "f", "--steps", "9"), "steps: is a setting of the file"),
        (
            ("train", "--for", "drafting", "--config", "f", "--heads", "h"),
            "heads: does not go with",
        ),
        (("train", "--for", "prompts", "--seed", "3", "--seeds", "0,1"), "seed: does not go with"),
        (("demo", "--task", "classify", "--port", "9"), "port: means nothing to --task classify"),
        (("demo", "--task", "classify", "--lossless"), "lossless: means nothing to --task"),
    ],
)
def test_what_does_not_go_together_is_named(
    cli: Any, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    assert cli.refused(*words, "--out", tmp_path / "out").startswith(said)
