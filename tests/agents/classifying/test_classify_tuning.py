"""Heads are fitted, tempered, measured, saved; a run that was cut off goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import tune_classes
from offramp.agents.classifying.exit_states import exit_states
from offramp.agents.classifying.head_fitting import calibration_error, fit_head, temper
from offramp.agents.classifying.head_task import ClassifyReport, three_ways
from offramp.agents.classifying.labelled_texts import read_labelled
from offramp.controller.errors import ConfigError, TraceError
from offramp.worker.classifying.class_heads import ClassHeads
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_model import SequenceModel
from offramp.worker.classifying.sequence_stack import SequenceBatch


@pytest.fixture(scope="module")
def tuned(
    encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ClassifyReport, list[tuple[str, int, int]]]:
    out = tmp_path_factory.mktemp("heads")
    told: list[tuple[str, int, int]] = []
    config = ClassifyTuneConfig(model=str(encoder), data=labelled)
    report = tune_classes(config, out, on_progress=lambda *count: told.append(count))
    return out, report, told


def test_heads_find_what_separates_the_classes(tuned: Any) -> None:
    out, report, told = tuned
    assert [row.layer for row in report.rows] == [1, 2, 3, 4, 5]
    assert (report.classes, report.learned, report.measured) == (2, 168, 36)
    assert max(row.accuracy for row in report.rows) > 0.8
    assert told[0] == ("states", 240, 240)
    assert told[-1] == ("heads", 5, 5)
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.pt",
        "texts.txt",
        "translators.safetensors",
        "tune.json",
    }
    facts = json.loads((out / "tune.json").read_text())
    assert facts["report"]["rows"][0]["accuracy"] == report.rows[0].accuracy


def test_the_saved_heads_classify_as_they_were_measured(
    tuned: Any, encoder: Path, labelled: Path
) -> None:
    model = SequenceModel.load(encoder)
    heads = ClassHeads.load(tuned[0], model.fingerprint, 5, 48)
    texts = read_labelled(labelled)
    _, _, measured = three_ways(texts, 0.3, 0)
    part = texts.of(measured)
    found = Classifier(model.stack, heads).run(model.encode(part.texts))
    right = (found.label_N == part.indices(heads.labels)).mean()
    assert right == pytest.approx(tuned[1].rows[-1].accuracy)


def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    tuned: Any, encoder: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ClassifyTuneConfig(model=str(encoder), data=labelled)
    monkeypatch.setattr("offramp.agents.classifying.exit_states.PART", 100)

    def cut_off(stage: str, done: int, total: int) -> None:
        if done == 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_classes(config, tmp_path, on_progress=cut_off)
    assert len(list((tmp_path / "states").iterdir())) == 2
    ran: list[int] = []
    inner = SequenceBatch.run_layer

    def counting(batch: SequenceBatch, index: int) -> None:
        ran.append(len(batch.rows))
        inner(batch, index)

    monkeypatch.setattr(SequenceBatch, "run_layer", counting)
    tune_classes(config, tmp_path, resume=True)
    # Only the last forty texts went through the layers again.
    assert sum(ran) == 40 * 5
    resumed = (tmp_path / "translators.safetensors").read_bytes()
    tune_classes(config, tmp_path / "fresh")
    assert resumed == (tmp_path / "fresh" / "translators.safetensors").read_bytes()


def test_other_settings_are_not_resumed(tuned: Any, encoder: Path, labelled: Path) -> None:
    config = ClassifyTuneConfig(model=str(encoder), data=labelled, seed=7)
    with pytest.raises(ConfigError, match="in the checkpoint") as raised:
        tune_classes(config, tuned[0], resume=True)
    assert raised.value.field == "seed"


def test_a_text_over_the_context_is_named(encoder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    lines = [f"w{number},{'ab'[number % 2]}\n" for number in range(5, 21)]
    path.write_text("text,label\n" + "".join(lines) + "w6 " * 65 + ",b\n")
    config = ClassifyTuneConfig(model=str(encoder), data=path)
    with pytest.raises(TraceError, match=r"line 18 of .*long\.csv has 65 tokens"):
        tune_classes(config, tmp_path / "out")


def test_too_few_texts_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("text,label\nw5,a\nw6,b\n")
    config = ClassifyTuneConfig(model=str(tmp_path / "no model"), data=path)
    with pytest.raises(TraceError, match="2 texts of 2 classes, too few to hold some out"):
        tune_classes(config, tmp_path / "out")


def test_exits_beyond_the_model_are_refused(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    config = ClassifyTuneConfig(model=str(encoder), data=labelled, exits=(2, 5))
    with pytest.raises(ConfigError, match="do not ascend within 1 to 4"):
        tune_classes(config, tmp_path / "out")


def test_states_do_not_depend_on_who_ran_beside(encoder: Path) -> None:
    stack = SequenceModel.load(encoder).stack
    sequences = [[5, 6, 7, 8, 9], [10], [11, 12]]
    together = exit_states(stack, sequences, (2, 5), "mean")
    for place, tokens in enumerate(sequences):
        alone = exit_states(stack, [tokens], (2, 5), "mean")
        assert np.allclose(together[place], alone[0], atol=1e-5)


def test_calibration_error_of_known_probabilities() -> None:
    probs_NC = np.array([[0.9, 0.1]] * 10 + [[0.6, 0.4]] * 10, np.float32)
    label_N = np.array([0] * 8 + [1] * 2 + [0] * 6 + [1] * 4)
    # Sure to .9 and right for .8 of one half; sure to .6 and right for .6 of the other.
    assert calibration_error(probs_NC, label_N) == pytest.approx(0.05, abs=1e-6)


def test_a_temperature_undoes_a_known_one() -> None:
    generator = torch.Generator().manual_seed(0)
    states_ND = torch.randn(4000, 6, generator=generator)
    true_CD = torch.randn(3, 6, generator=generator)
    label_N = torch.multinomial((states_ND @ true_CD.T).softmax(-1), 1, generator=generator)[:, 0]
    head, _ = fit_head(states_ND[:2000], label_N[:2000], states_ND[2000:], label_N[2000:])
    sharp = type(head)(head.weight_CD * 3, head.bias_C * 3)
    _, temperature = temper(sharp, states_ND[2000:], label_N[2000:])
    assert temperature == pytest.approx(3.0, rel=0.15)
