"""From texts with labels to a certified bundle, as it is typed; and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offramp.agents.classifying.class_training import ClassTrainConfig, train_classes
from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import tune_classes
from offramp.agents.placing.contenders import CHOSEN, load_contenders
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
    # It says nothing of tokens.
    assert "decode_mode" in certificate.gap(kv_mode="project", dtype="float32", translators="")


def test_texts_that_were_learned_from_certify_nothing(cli: Any, files: Files) -> None:
    message = cli.refused(*files.calibrate("--data", files.train))
    assert message.startswith("data: is the file that the heads were fitted to")
    copy = files.folder / "copy.csv"
    copy.write_text("\n".join(files.train.read_text().splitlines()[:-2]) + "\n")
    assert "documents: 0 unseen ones" in cli.refused(*files.calibrate("--data", copy))


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
    ],
)
def test_what_does_not_go_together_is_named(
    cli: Any, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    assert cli.refused(*words, "--out", tmp_path / "out").startswith(said)
