"""Rows leave a batch, the batch shrinks, and what is left is as if it were alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS, read_description
from offramp.controller.errors import ConfigError, RequestError
from offramp.controller.features import CANDIDATES_V1, SOFTMAX_V2, BoolArray, FloatArray
from offramp.controller.policies.protocols import FixedExit, IndexArray, NeverExit, ThresholdPolicy
from offramp.controller.policies.rules.entropy_patience import PatienceExit
from offramp.worker.classifying.best_of import BestOf
from offramp.worker.classifying.class_heads import ClassHeads, labels_in
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.model.translators import exits_of, save_exits
from support.classifying.sequence_models import (
    LABELS,
    RAGGED,
    ByLength,
    encoder_stack,
    like_heads,
    random_heads,
)
from support.releases.readers import bundled


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(encoder_stack(), random_heads())


def test_rows_leave_and_are_gone(classifier: Classifier) -> None:
    policy = ByLength({1: 2, 3: 5})
    found = classifier.run(RAGGED, policy)
    assert found.layers_N.tolist() == [5, 1, 3]
    assert policy.asked == [3, 2]
    assert (found.launches, found.row_layers) == (5, 3 + 2 * 2 + 1 * 2)
    assert found.row_layers == found.layers_N.sum()
    for row, layer in enumerate(found.layers_N.tolist()):
        alone = classifier.run(
            RAGGED[row : row + 1], FixedExit(layer) if layer < 5 else ByLength({})
        )
        assert np.allclose(found.probs_NC[row], alone.probs_NC[0], atol=1e-5)
        assert found.label_N[row] == alone.label_N[0] == found.probs_NC[row].argmax()


def test_layers_behind_the_last_row_are_never_run(classifier: Classifier) -> None:
    found = classifier.run(RAGGED, FixedExit(2))
    assert (found.launches, found.row_layers) == (2, 6)


def test_patience_counts_a_rows_own_answers_while_others_leave(classifier: Classifier) -> None:
    policy = PatienceExit(exits=(1, 2, 3, 4), patience=1)
    together = classifier.run(RAGGED, policy)
    alone = [classifier.run(RAGGED[row : row + 1], policy) for row in range(3)]
    assert together.layers_N.tolist() == [int(each.layers_N[0]) for each in alone]
    # It is a real decision here: they do not all leave at one depth.
    assert len(set(together.layers_N.tolist())) > 1


class JumpByLength:
    """Sends short sequences to the second exit, the others to the third; they leave there."""

    exits = (1, 2, 4)
    schema = None
    candidates_VK = None

    def start(self, outlook_NC: FloatArray) -> IndexArray:
        return np.arange(len(outlook_NC)) % 2 + 1

    def route(self, here: int, features_NF: FloatArray, outlook_NC: FloatArray) -> IndexArray:
        return np.full(len(outlook_NC), here)


def test_full_depth_is_an_exit_where_nobody_is_asked(classifier: Classifier) -> None:
    found = classifier.run([*RAGGED, [3, 4]], FixedExit(5))
    assert found.layers_N.tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize("label", [3, -1, "red", None])
def test_the_best_is_sought_of_a_class_that_there_is(label: Any) -> None:
    with pytest.raises(RequestError, match=r"label: .* is no index of 3 classes"):
        BestOf(Classifier(encoder_stack(), like_heads([torch.ones(3, 2)] * 4)), label)


def test_a_router_says_where_rows_are_asked(classifier: Classifier) -> None:
    assert classifier.run(RAGGED, JumpByLength()).layers_N.tolist() == [2, 4, 2]


class FailsForWholeBatches(ByLength):
    """Fails whenever it is asked."""

    def leave(self, features_NF: FloatArray) -> BoolArray:
        raise RuntimeError("no")


def test_a_policy_that_fails_costs_nobody_the_answer() -> None:
    own = Classifier(encoder_stack(), random_heads())
    found = own.run(RAGGED, FailsForWholeBatches({1: 9, 2: 9}))
    assert found.layers_N.tolist() == [5, 5, 5]
    assert own.guard.failures == 1


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (ThresholdPolicy((1,), CANDIDATES_V1, "top1", 0.5), "another task"),
        (FixedExit(9), "where no head was fitted"),
        ("margin", "'margin' is no exit policy"),
        (FixedExit, "is no exit policy"),
        (ThresholdPolicy((4, 3), SOFTMAX_V2, "margin", 0.5), "do not ascend"),
    ],
)
def test_a_policy_for_another_task_is_refused(
    classifier: Classifier, policy: Any, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        classifier.run(RAGGED, policy)


@pytest.mark.parametrize(
    ("sequences", "field", "said"),
    [
        ([], "input", "is empty"),
        ([[5], []], "input[1]", "has no token"),
        ([[5] * 65], "input[0]", "has 65 tokens, and the model's context is 64"),
        ([[5], [-1]], "input[1]", "token -1 at index 0"),
        ([[5, 97]], "input[0]", "token 97 at index 1"),
        ([["w5"]], "input[0]", "holds a str"),
        (["w5 w6"], "input[0]", "holds a str"),
        ([[5.0]], "input[0]", "holds a float"),
        ([[True]], "input[0]", "holds a bool"),
        ([[np.array([5, 6])]], "input[0]", "holds a ndarray"),
        (torch.tensor([[5, 6]]), "input", "is no list"),
        (iter([[5]]), "input", "is no list"),
        (None, "input", "None is no list"),
        ({"text": [5]}, "input", "is no list"),
        ([b"w5"], "input[0]", "is no list"),
        ([5, 6], "input[0]", "5 is no list"),
    ],
)
def test_what_cannot_be_run_is_named_by_its_place(
    classifier: Classifier, sequences: Any, field: str, said: str
) -> None:
    bounds = [torch.tensor([[1.0, 1.5]] * 3)] * 4
    for run in (classifier.run, BestOf(Classifier(encoder_stack(), like_heads(bounds)), 0).run):
        with pytest.raises(RequestError, match=re.escape(said)) as raised:
            run(sequences)
        assert raised.value.field == field


class CountsChecks(Classifier):
    """Counts how often a policy is checked."""

    checks = 0

    def require_policy(self, policy: Any) -> None:
        self.checks += 1
        super().require_policy(policy)


def test_a_bundle_is_checked_against_the_heads(tmp_path: Path) -> None:
    random_heads().save(tmp_path, {"model": "m", "layers": 5, "width": 48})
    heads = ClassHeads.load(tmp_path, "m", 5, 48)
    own = Classifier(encoder_stack(), heads)
    under = own.run(RAGGED, bundled(FixedExit(2), adapters=heads.digest))
    assert under.layers_N.tolist() == [2, 2, 2]
    counting = CountsChecks(encoder_stack(), heads)
    for policy in (FixedExit(2), bundled(FixedExit(2), adapters=heads.digest)):
        for _ in range(3):
            assert counting.run(RAGGED, policy).layers_N.tolist() == [2, 2, 2]
    assert counting.checks == 2, "each batch checked its policy anew"
    assert own.run(RAGGED, bundled(NeverExit())).layers_N.tolist() == [5, 5, 5]
    for adapters, said in (("", "made for no heads"), ("a" * 64, "made for heads aaaaaaaaaaaa")):
        with pytest.raises(RequestError, match=said):
            own.run(RAGGED, bundled(FixedExit(2), adapters=adapters))


def test_heads_come_back_as_they_were_saved(tmp_path: Path) -> None:
    heads = random_heads()
    heads.save(tmp_path, {"model": "m", "layers": 5, "width": 48})
    back = ClassHeads.load(tmp_path, "m", 5, 48)
    assert (back.labels, back.pool, back.exits) == (heads.labels, heads.pool, heads.exits)
    assert back.digest
    stack = encoder_stack()
    found = [Classifier(stack, each).run(RAGGED, FixedExit(2)).probs_NC for each in (heads, back)]
    assert (found[0] == found[1]).all()


def test_classes_are_what_the_weights_say_wherever_they_were_sent(tmp_path: Path) -> None:
    """A release names weights by their digest; the description is put together by each worker."""
    random_heads().save(tmp_path, {"model": "m", "layers": 5, "width": 48})
    file = tmp_path / DESCRIPTION
    facts = json.loads(file.read_text())
    del facts["pool"]
    file.write_text(json.dumps(facts | {"labels": ["x", "y", "z"]}))
    assert labels_in(tmp_path) == ClassHeads.load(tmp_path, "m", 5, 48).labels == LABELS
    (tmp_path / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"heads: .* holds no readable"):
        labels_in(tmp_path)


def test_heads_that_hold_more_or_name_nothing_are_refused(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"model": "m", "layers": 5, "width": 48}
    random_heads().save(tmp_path, facts)
    tensors = load_file(tmp_path / WEIGHTS)
    found = json.loads((tmp_path / DESCRIPTION).read_text())
    save_exits(tmp_path, tensors | {"kv.2.A": torch.zeros(1)}, found)
    with pytest.raises(ConfigError, match=r"heads: .* should not have \['kv.2.A'\]"):
        ClassHeads.load(tmp_path, "m", 5, 48)
    for labels in (["", "b", "c"], ["a", "a", "c"], ["a"], [1, 2, 3], None):
        save_exits(tmp_path, tensors, found | {"labels": labels})
        with pytest.raises(ConfigError, match=r"heads: .* names no two classes or more"):
            labels_in(tmp_path)


def test_a_folder_that_is_none_is_called_heads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"heads: .* `offramp tune --task classify` wrote"):
        labels_in(tmp_path)
    random_heads().save(tmp_path, {"model": "m", "layers": 5, "width": 48})
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"heads: .* holds no readable"):
        labels_in(tmp_path)
    facts = read_description(tmp_path)
    with pytest.raises(ConfigError, match=r"translators: .* holds heads of a classification"):
        exits_of(tmp_path, facts, "m", 5)


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (lambda folder: ClassHeads.load(folder, "other", 5, 48), "another model"),
        (lambda folder: ClassHeads.load(folder, "m", 6, 48), "do not ascend to 6"),
        (lambda folder: ClassHeads.load(folder, "m", 5, 32), "has shapes"),
    ],
)
def test_heads_of_another_model_are_refused(
    tmp_path: Path, load: Callable[[Path], ClassHeads], said: str
) -> None:
    random_heads().save(tmp_path, {"model": "m", "layers": 5, "width": 48})
    with pytest.raises(ConfigError, match=said):
        load(tmp_path)
