"""Models are trained with their heads, by all exits; gates and heads are fitted to each other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from offramp.agents.classifying import whole_model
from offramp.agents.classifying.class_training import ClassTrainConfig, unseen_traces
from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.classify_tuning import tune_classes
from offramp.agents.classifying.head_task import ClassifyReport, three_ways
from offramp.agents.classifying.joint_heads import fit_joint, leaving
from offramp.agents.classifying.labelled_texts import (
    LabelledTexts,
    encoded,
    known_texts,
    read_labelled,
    text_digest,
)
from offramp.agents.classifying.sequence_traces import ReadTexts, sequence_traces
from offramp.agents.placing.contenders import load_saved
from offramp.controller.adapters.adapter_folder import kept_in
from offramp.controller.errors import ConfigError
from offramp.worker.classifying.class_heads import ClassHead, ClassHeads
from offramp.worker.classifying.sequence_model import SequenceModel

WEIGHTS = ("translators.safetensors", "model/model.safetensors")


def whole(encoder: Path, labelled: Path, **given: Any) -> ClassifyTuneConfig:
    asked: dict[str, Any] = {"lr": 3e-3, "epochs": 4, "batch_tokens": 128, **given}
    return ClassifyTuneConfig(model=str(encoder), data=labelled, fit="model", **asked)


@pytest.fixture(scope="module")
def trained(
    encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ClassifyReport, int]:
    out, steps = tmp_path_factory.mktemp("whole"), 0

    def count(stage: str, done: int, total: int) -> None:
        nonlocal steps
        steps = total if stage == "train" else steps

    return out, tune_classes(whole(encoder, labelled), out, on_progress=count), steps


def test_every_exit_of_a_trained_model_is_better_than_of_the_frozen_one(
    trained: Any, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    out, report, steps = trained
    before = (encoder / "model.safetensors").read_bytes()
    frozen = tune_classes(ClassifyTuneConfig(model=str(encoder), data=labelled), tmp_path)
    gained = [
        ours.accuracy - theirs.accuracy
        for ours, theirs in zip(report.rows, frozen.rows, strict=True)
    ]
    assert steps > 20
    assert np.mean(gained) > 0.05
    assert (encoder / "model.safetensors").read_bytes() == before
    model = SequenceModel.load(out / "model")
    assert model.fingerprint != SequenceModel.load(encoder).fingerprint
    texts = read_labelled(labelled)
    part = texts.of(three_ways(texts, 0.3, 0)[2])
    found = model.classifier(out).run(model.encode(part.texts))
    right = (found.label_N == part.indices(("a", "b"))).mean()
    assert right == pytest.approx(report.rows[-1].accuracy)
    with pytest.raises(ConfigError, match="another model"):
        SequenceModel.load(encoder).classifier(out)


def test_a_training_that_was_cut_off_goes_on_to_the_same_bytes(
    trained: Any, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    config = whole(encoder, labelled, checkpoint_every=5)

    def cut_off(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("train", 13):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_classes(config, tmp_path, on_progress=cut_off)
    told: list[tuple[str, int]] = []
    tune_classes(
        config, tmp_path, resume=True, on_progress=lambda stage, done, _: told.append((stage, done))
    )
    assert told[0] == ("train", 11)  # no state is computed again, and ten steps are not run again
    assert (tmp_path / "checkpoint.pt").stat().st_size < 100_000  # it went with the training
    for name in WEIGHTS:
        assert (tmp_path / name).read_bytes() == (trained[0] / name).read_bytes(), name


def test_a_run_that_has_ended_is_not_begun_again(
    trained: Any, encoder: Path, labelled: Path
) -> None:
    with pytest.raises(ConfigError, match="has ended") as raised:
        tune_classes(whole(encoder, labelled), trained[0], resume=True)
    assert raised.value.field == "resume"


def test_a_text_that_comes_twice_is_in_one_part() -> None:
    names = tuple(f"text {number % 150}" for number in range(400))
    texts = LabelledTexts(names, tuple("ab"[number % 2] for number in range(400)))
    parts = [{names[place] for place in part.tolist()} for part in three_ways(texts, 0.5, 0)]
    assert all(parts)
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_exits_count_as_much_as_they_have_layers(encoder: Path) -> None:
    model, sequences = SequenceModel.load(encoder), [[5, 6, 7], [8]]
    heads = {
        layer: ClassHead(torch.randn(2, 48) / 10, torch.randn(2))
        for layer in (2, model.stack.layers)
    }
    linears = torch.nn.ModuleDict(
        {str(layer): whole_model._linear(head) for layer, head in heads.items()}
    )
    label_B = torch.tensor([0, 1])
    found = whole_model._loss(model, linears, sequences, label_B, "first").detach()
    states = {}
    hidden = model.module(
        input_ids=torch.tensor([[5, 6, 7], [8, 0, 0]]),
        attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]),
        output_hidden_states=True,
    ).hidden_states
    for layer in heads:
        states[layer] = cross_entropy(heads[layer](hidden[layer][:, 0]), label_B)
    last = model.stack.layers
    assert float(found) == pytest.approx(
        float((2 * states[2] + last * states[last]) / (2 + last)), abs=1e-5
    )


def test_a_pass_reads_every_text_once_in_batches_of_so_many_tokens() -> None:
    lengths_N = np.random.default_rng(0).integers(1, 40, 500)
    first, second = (whole_model._batches(lengths_N, 128, seed) for seed in (0, 1))
    for batches in (first, second):
        assert sorted(np.concatenate(batches).tolist()) == list(range(500))
        assert max(len(each) * lengths_N[each].max() for each in batches) <= 128
        assert sum(len(each) * lengths_N[each].max() for each in batches) < 1.2 * lengths_N.sum()
    assert [each.tolist() for each in first] != [each.tolist() for each in second]
    # One that is longer than all tokens of a step goes alone.
    assert sorted(map(len, whole_model._batches(np.array([200, 3]), 128, 0))) == [1, 1]


@pytest.fixture(scope="module")
def joint(encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("joint")
    tune_classes(ClassifyTuneConfig(model=str(encoder), data=labelled, fit="joint"), out)
    return out


def test_gates_are_saved_as_a_policy_of_their_heads(
    joint: Path, encoder: Path, labelled: Path
) -> None:
    model = SequenceModel.load(encoder)
    [(contender, bundle)] = load_saved(joint / "gates")
    assert (contender.family, contender.setting) == ("JEI-DNN", 0.1)
    assert bundle.manifest.adapters == model.heads(joint).digest
    assert kept_in(joint / "gates") is not None
    assert (joint / "gates" / "chosen" / "manifest.json").exists()
    assert len(known_texts(joint / "gates")) == len(set(read_labelled(labelled).texts))
    texts = read_labelled(labelled)
    part = texts.of(three_ways(texts, 0.3, 0)[2])
    found = model.classifier(joint).run(model.encode(part.texts), contender.policy)
    right = float((found.label_N == part.indices(("a", "b"))).mean())
    assert right == pytest.approx(contender.offline_agreement)
    assert right > 0.7


@pytest.mark.parametrize(("cost", "left"), [(0.0, 0.5), (0.3, 0.5), (100.0, 1.0)])
def test_gates_let_leave_who_is_known_and_all_if_depth_costs_too_much(
    cost: float, left: float
) -> None:
    # After layer 1 the states of every second text say nothing of its class, after 2 all do.
    rng, texts = np.random.default_rng(0), 4800
    label_N, is_easy_N = rng.integers(0, 2, texts), np.arange(texts) % 2 == 0
    says_N = np.where(label_N, 3.0, -3.0)
    states_NED = rng.normal(size=(texts, 2, 4)).astype(np.float32)
    states_NED[:, 0, 0] += says_N * is_easy_N
    states_NED[:, 1, 1] += says_N
    names = tuple(f"text {number}" for number in range(texts))
    read = ReadTexts(
        texts=LabelledTexts(names, tuple("ab"[each] for each in label_N)),
        lengths_N=np.full(texts, 5),
        model="m",
        context=64,
    )
    learned, chosen, unseen = np.split(np.arange(texts), (3000, 4000))
    plain, gates = fit_joint(
        states_NED, read, (1, 2), "mean", learned, chosen, cost, 0, lambda *_: None
    )
    heads = ClassHeads(("a", "b"), "mean", plain)
    traces = sequence_traces(heads, states_NED[unseen], read.of(unseen))
    leaves_N = gates.leave(traces.features_NEF[:, 0])
    assert leaves_N.mean() == pytest.approx(left, abs=0.1 if cost else 0.5)
    assert (leaves_N & ~is_easy_N[unseen]).mean() < (1.0 if left == 1 else 0.1)
    # The first head is fitted to those that it can tell, so it tells them better than all.
    known_N = label_N[unseen] == np.asarray(
        plain[1](torch.from_numpy(states_NED[unseen, 0])).argmax(-1)
    )
    assert known_N[is_easy_N[unseen]].mean() > 0.98


def test_chances_of_leaving_are_all_there_is() -> None:
    chance_NE1 = leaving(torch.randn(20, 4) * 3)
    assert torch.allclose(chance_NE1.sum(-1), torch.ones(20))
    assert leaving(torch.tensor([[-50.0, 50.0]])).tolist() == [[pytest.approx(0, abs=1e-6), 1, 0]]


def test_policies_of_a_trained_model_learn_from_texts_that_it_never_saw(
    trained: Any, joint: Path, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    texts = read_labelled(labelled)
    _, chosen, measured = three_ways(texts, 0.3, 0)
    held = texts.of(np.concatenate((chosen, measured)))
    for folder, heads in ((trained[0] / "model", trained[0]), (encoder, joint)):
        model = SequenceModel.load(folder)
        sequences = encoded(model, texts)
        config = ClassTrainConfig(model=str(folder), heads=heads, data=labelled)
        classifier = model.classifier(heads)
        traces = unseen_traces(config, model, classifier, texts, sequences, lambda *_: None)
        assert set(traces.documents) == set(map(text_digest, held.texts))
    # A file that holds more is another, and yet the texts that it shares were seen.
    shutil.copy(labelled, other := tmp_path / "other.csv")
    other.write_text(other.read_text() + "w5 w6 w7,a\n")
    texts = read_labelled(other)
    more = unseen_traces(config, model, classifier, texts, encoded(model, texts), lambda *_: None)
    assert more.documents == (text_digest("w5 w6 w7"),)
    few = texts.of(np.arange(5))
    ids = encoded(model, few)
    with pytest.raises(ConfigError, match="no text that the heads do not know"):
        unseen_traces(config, model, classifier, few, ids, print)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"fit": "all"}, "fit"),
        ({"fit": "model", "dtype": "bfloat16"}, "dtype"),
        ({"fit": "joint", "cost": -1.0}, "cost"),
        ({"fit": "model", "lr": 0.0}, "lr"),
        ({"fit": "model", "epochs": 0}, "epochs"),
        ({"fit": "model", "batch_tokens": 0}, "batch_tokens"),
    ],
)
def test_what_cannot_be_fitted_is_refused(given: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ClassifyTuneConfig(model="x", data=Path("x.csv"), **given)
    assert raised.value.field == field
