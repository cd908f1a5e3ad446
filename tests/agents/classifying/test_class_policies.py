"""Recorded texts replay as the classifier runs them, and families keep the accuracy they must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offramp.agents.classifying.class_policies import (
    AGENT,
    cheapest,
    learn_families,
    place_families,
    replayed,
)
from offramp.agents.classifying.classify_config import ClassifyTuneConfig
from offramp.agents.classifying.cross_fitting import cross_fitted_traces
from offramp.agents.classifying.exit_states import exit_states
from offramp.agents.classifying.head_task import fit_heads
from offramp.agents.classifying.labelled_texts import LabelledTexts
from offramp.agents.classifying.sequence_traces import ReadTexts, sequence_traces
from offramp.agents.placing.replay import walk
from offramp.controller.features import SOFTMAX_V2
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.controller.policies.rules.kept_stages import KeptStages
from offramp.envs.traces.tokens import TokenTraces
from offramp.worker.classifying.classifier import Classifier
from offramp.worker.classifying.sequence_costs import measure_costs
from support.classifying.sequence_models import encoder_stack, random_heads

TEXTS = 512


@pytest.fixture(scope="module")
def recorded() -> tuple[Classifier, list[list[int]], TokenTraces]:
    """Texts whose labels layer 2 knows best: the classes that its own head finds."""
    classifier = Classifier(encoder_stack(), random_heads())
    rng = np.random.default_rng(1)
    sequences = [rng.integers(5, 97, rng.integers(2, 12)).tolist() for _ in range(TEXTS)]
    states_NED = exit_states(classifier.stack, sequences, classifier.heads.exits, "mean")
    names = tuple(str(tokens) for tokens in sequences)

    def read(labels: Sequence[str]) -> ReadTexts:
        return ReadTexts(
            texts=LabelledTexts(names, tuple(labels)),
            lengths_N=np.array([len(tokens) for tokens in sequences]),
            model="m",
            context=classifier.stack.context,
        )

    first = sequence_traces(classifier.heads, states_NED, read(["red"] * TEXTS))
    labels = [classifier.heads.labels[token] for token in first.exit_token_NE[:, 1].tolist()]
    traces = sequence_traces(classifier.heads, states_NED, read(labels))
    return classifier, sequences, traces


@pytest.mark.parametrize(
    "policy",
    [EntropyExit(exits=(1, 2, 3, 4), threshold=0.2), PatienceExit(exits=(1, 2, 3, 4), patience=1)],
)
def test_replay_takes_the_exits_that_the_classifier_takes(recorded: Any, policy: Any) -> None:
    classifier, sequences, traces = recorded
    walked = walk(policy, traces)
    live = classifier.run(sequences, policy)
    depth_E1 = np.array([1, 2, 3, 4, 5])
    assert depth_E1[walked.taken_N].tolist() == live.layers_N.tolist()
    assert len(set(live.layers_N.tolist())) > 1


def test_shares_are_kept_in_replay_as_the_classifier_keeps_them(recorded: Any) -> None:
    classifier, sequences, traces = recorded
    scores_EQ = np.tile(np.linspace(0.3, 1, 9), (4, 1))
    policy = KeptStages(
        exits=(1, 2, 3, 4), schema=SOFTMAX_V2, column="top1", shares=(0.3,) * 4, scores_EQ=scores_EQ
    )
    taken_N = walk(policy, traces).taken_N
    live = [int(classifier.run([each], policy).layers_N[0]) for each in sequences]
    assert (1 + taken_N).tolist() == live
    assert abs(live.count(1) - 0.3 * TEXTS) <= 1 / policy.gain + 1


def test_families_keep_accuracy_by_label_and_not_by_agreement(recorded: Any) -> None:
    classifier, sequences, traces = recorded
    costs = measure_costs(classifier, sequences[:4])
    full = replayed("full depth", None, NeverExit(), traces, costs)
    agent = replace(AGENT, steps=4096, envs=64, batch=512)
    families = learn_families(traces, costs, agent=agent)
    placed = place_families(families, traces, costs, loss=0.3)
    by_family = {each.family: each for each in placed}
    assert by_family["full depth"] == full
    # Layer 2 knows the labels, full depth does not: a policy may disagree and be more right.
    assert by_family["fixed exit"].setting == 2
    assert by_family["fixed exit"].accuracy > full.accuracy + 0.2
    best = by_family["fixed exit"]
    assert {"full depth", "fixed exit", "p̂"} <= by_family.keys()
    for each in placed[2:]:
        lost_N = best.right_N.astype(float) - each.right_N
        error = lost_N.std() / TEXTS**0.5
        assert best.accuracy - each.accuracy + error == pytest.approx(each.lost_below(best))
        assert each.lost_below(best) <= 0.3
        assert error > 0


def test_what_chance_alone_may_have_given_is_not_taken_for_kept_accuracy(recorded: Any) -> None:
    """A setting that loses just as much as it may is not sure to lose no more."""
    classifier, sequences, traces = recorded
    costs = measure_costs(classifier, sequences[:4])
    full, first, second = (
        replayed("", None, each, traces, costs)
        for each in (NeverExit(), FixedExit(1), FixedExit(2))
    )
    lost = second.accuracy - full.accuracy
    assert cheapest([full], second, lost) is None
    assert cheapest([full], second, lost + 0.05) is full
    assert cheapest([full, second, first], second, 0.0) is second  # nothing is compared with itself


def test_costs_have_no_fill_and_a_probe_takes_a_head(recorded: Any) -> None:
    classifier, sequences, _ = recorded
    costs = measure_costs(classifier, sequences[:4])
    assert (costs.fill_s, costs.layers) == (0.0, 5)
    assert costs.probe_s > costs.head_s > 0


def test_texts_are_read_by_heads_that_never_saw_them() -> None:
    """States that say nothing of labels drawn at random: who saw a text is right, others guess."""
    rng = np.random.default_rng(0)
    width, layers = 160, 3
    labels = [str(each) for each in rng.integers(0, 2, 240)]
    texts = LabelledTexts(tuple(f"text {number}" for number in range(240)), tuple(labels))
    states_NED = rng.normal(size=(240, layers, width)).astype(np.float32)
    read = ReadTexts(texts=texts, lengths_N=np.full(240, 5), model="m", context=64)
    config = ClassifyTuneConfig(model="", data=Path(), held_out=0.1)
    heads, _ = fit_heads(texts, states_NED, (1, 2, 3), "mean", config)
    seen = sequence_traces(heads, states_NED, read)
    unseen = cross_fitted_traces(heads, states_NED, read, seed=0)
    assert seen.right_NE.mean() > 0.9
    assert abs(unseen.right_NE.mean() - 0.5) < 0.1
    assert unseen.header == seen.header
    assert (unseen.documents, len(unseen)) == (seen.documents, 240)
