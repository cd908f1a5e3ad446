"""On-policy evaluation on the reference model, and the choice of what to publish."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offramp.agents.evaluation.archive import Archive
from offramp.agents.evaluation.assess import Assessment, assess, publishable, require_learned
from offramp.agents.evaluation.evaluation_rows import Measured
from offramp.agents.evaluation.measure import (
    HeldOut,
    PairedCosts,
    Protocol,
    Split,
    held_out,
    measure_quality,
)
from offramp.agents.evaluation.protocol import AssessConfig
from offramp.agents.evaluation.scores import AGREEMENT, EDIT_SIMILARITY, PERPLEXITY, Scores
from offramp.agents.placing.contenders import Contender
from offramp.agents.recording.corpus import load_corpus
from offramp.agents.recording.record_config import quarters
from offramp.agents.training.families import BEST_EXITS, JUMPS, ON_POLICY
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.worker import AdaptiveEngine
from offramp.worker.model.loading import load_model, load_tokenizer
from support.models import REFERENCE

PROTOCOL = Protocol(prompt_tokens=24, new_tokens=40, lines=2, line_context=32, timed_tokens=16)
CONTENDERS = [
    Contender(family="full depth", setting=None, offline_agreement=None, policy=NeverExit()),
    Contender(family="fixed exit", setting=12, offline_agreement=1.0, policy=FixedExit(12)),
    Contender(family="p̂", setting=6, offline_agreement=0.8, policy=FixedExit(6)),
    Contender(family="p̂", setting=3, offline_agreement=0.6, policy=FixedExit(3)),
]


def config(**changes: Any) -> AssessConfig:
    values: dict[str, Any] = {
        "model": str(REFERENCE), "corpus_limit": 60, "validation_documents": 3,
        "test_documents": 4, "timed_documents": 2, "protocol": PROTOCOL, "target_agreement": 0.7,
    }  # fmt: skip
    return AssessConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def engine() -> AdaptiveEngine:
    torch.set_num_threads(1)
    return AdaptiveEngine.from_pretrained(REFERENCE)


@pytest.fixture(scope="module")
def documents(engine: AdaptiveEngine) -> list[HeldOut]:
    corpus = load_corpus(None, limit=60)
    return held_out(str(REFERENCE), corpus, "test", 4, PROTOCOL, engine.tokenizer)


@pytest.fixture(scope="module")
def found(engine: AdaptiveEngine) -> Assessment:
    return assess(config(), engine, CONTENDERS)


def test_cut_off_it_keeps_what_was_measured_and_goes_on(
    engine: AdaptiveEngine, tmp_path: Path
) -> None:
    protocol = Protocol(prompt_tokens=8, new_tokens=8, lines=0, timed_tokens=4)
    small = config(protocol=protocol, validation_documents=2, test_documents=2, timed_documents=2)
    told: list[tuple[str, int]] = []

    def stop(stage: str, done: int, _: int) -> None:
        told.append((stage, done))
        if told[-1] == ("validation: time", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assess(small, engine, CONTENDERS, stop, Archive.open(tmp_path / "kept", {"a": 1}))
    kept = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*.json")}
    assert len(kept) == 1 + len(CONTENDERS) + 1, "settings, qualities, and one timed document"
    archive = Archive.open(tmp_path / "kept", {"a": 1})
    whole = assess(small, engine, CONTENDERS, archive=archive)
    assert {path: path.read_bytes() for path in kept} == kept
    again = assess(small, engine, CONTENDERS, archive=archive)
    assert again.validation == whole.validation, "times, too: nothing was measured twice"
    assert again.test == whole.test
    with pytest.raises(ConfigError, match=r"policies: .* was measured under another a"):
        Archive.open(tmp_path / "kept", {"a": 2}, "policies")


def test_full_depth_is_its_own_reference(found: Assessment) -> None:
    rows = found.test
    assert rows[0].agreement == rows[1].agreement == 1.0
    assert rows[0].wall_ratio == 1.0
    assert rows[0].mean_layers == 12
    assert rows[0].perplexity == pytest.approx(rows[1].perplexity)
    assert rows[0].edit_similarity == rows[1].edit_similarity


def test_earlier_exits_run_fewer_layers_and_agree_less(found: Assessment) -> None:
    rows = found.test
    assert [row.mean_layers for row in rows] == [12, 12, 6, 3]
    assert rows[3].agreement < rows[2].agreement < 1
    assert all(row.agreement_low <= row.agreement <= row.agreement_high for row in rows)
    assert rows[2].tokens == sum(rows[2].depths.values()) == 4 * 39
    assert rows[3].perplexity is not None
    assert rows[3].perplexity > (rows[0].perplexity or 0)


def test_both_splits_say_what_every_contender_takes_of_energy(found: Assessment) -> None:
    for rows in (found.validation, found.test):
        full, same, half, quarter = (row.energy_ratio for row in rows)
        assert full == 1.0
        assert None not in (same, half, quarter)
        assert 0 < (quarter or 0) < (half or 0) < 1
        assert len({row.energy_method for row in rows}) == 1
        assert rows[0].energy_method in ("measured_shared", "measured_device", "modelled")
    told = [ratio and ratio.value for ratio in found.energy.ratios]
    assert told == [row.energy_ratio for row in found.test[1:]]
    assert (found.energy.full_j or 0) > 0


def test_accuracy_and_perplexity_equal_an_independent_pass(
    engine: AdaptiveEngine, documents: list[HeldOut]
) -> None:
    right = tokens = 0
    surprisal = 0.0
    for document in documents:
        ids = torch.tensor([document.tokens])
        logprobs = engine.model(ids).logits[0].log_softmax(-1)[24:-1]
        targets = ids[0, 25:]
        right += int((logprobs.argmax(-1) == targets).sum())
        surprisal -= float(logprobs.gather(-1, targets[:, None]).sum())
        tokens += len(targets)
    split = Split.of(engine, documents, PROTOCOL)
    scores = measure_quality(engine, NeverExit(), split, PROTOCOL, "full depth")
    assert scores.right_D.sum() == pytest.approx(right, abs=1)
    assert scores.tokens_D.sum() == tokens
    assert PERPLEXITY.of([scores]) == pytest.approx(np.exp(surprisal / tokens), rel=1e-4)


def test_an_exits_log_probabilities_are_those_of_the_shorter_model(
    engine: AdaptiveEngine, documents: list[HeldOut]
) -> None:
    """Of the first decoded token: all before it is exact, so the truncated model says the same."""
    short = [HeldOut(document.tokens[:26], ()) for document in documents]
    split = Split.of(engine, short, PROTOCOL)
    scores = measure_quality(engine, FixedExit(6), split, PROTOCOL, "fixed exit")
    for document, surprisal in zip(short, scores.surprisal_D, strict=True):
        hidden = engine.model.model(torch.tensor([document.tokens[:25]]), output_hidden_states=True)
        logits = engine.model.lm_head(engine.model.model.norm(hidden.hidden_states[6][0, -1]))
        expected = -float(logits.log_softmax(-1)[document.tokens[25]])
        assert surprisal == pytest.approx(expected, abs=1e-3)


def test_the_choice_is_learned_and_every_family_has_its_matched_rows(found: Assessment) -> None:
    assert CONTENDERS[found.chosen].family == "p̂"
    keys = {(row.policy, row.metric, row.target_loss) for row in found.matched}
    assert len(keys) == len(found.matched) == 2 * 2 * 4
    assert found.documents == (3, 4)


def measured(family: Any, agreeing: float, ratio: float) -> Measured:
    ten, ones = np.full(3, 10.0), np.ones(3)
    scores = Scores(
        tokens_D=ten, agreeing_D=ten * agreeing, right_D=ten, surprisal_D=ones, lines_D=ones,
        exact_D=ones, similarity_D=ones * agreeing, depths={6: 30},
    )  # fmt: skip
    policy = FixedExit(6) if ratio < 1 else NeverExit()
    setting = ratio if ratio < 1 else None
    contender = Contender(family=family, setting=setting, offline_agreement=None, policy=policy)
    return Measured(contender, None, scores, PairedCosts(ones * ratio, ones))


def test_the_fastest_that_keeps_the_target_is_chosen() -> None:
    rows = [
        measured("full depth", 1.0, 1.0),
        measured("p̂", 0.99, 0.9),
        measured("PPO", 0.95, 0.7),
        measured("CALM", 1.0, 0.1),
        measured("p̂", 0.90, 0.5),
    ]
    assert publishable(rows, AGREEMENT, 0.07)[0] == 2
    assert publishable(rows, AGREEMENT, 0.02)[0] == 1
    assert publishable(rows, EDIT_SIMILARITY, 0.2)[0] == 4
    index, reason = publishable(rows, AGREEMENT, 0.001)
    assert index == 1
    assert "no learned policy kept" in reason
    with pytest.raises(ConfigError, match="policies: hold none that was learned"):
        publishable(rows[:1], AGREEMENT, 0.1)


def test_contenders_begin_with_full_depth(engine: AdaptiveEngine) -> None:
    for bad in ([], CONTENDERS[1:]):
        with pytest.raises(ConfigError, match="policies: do not begin with full depth"):
            assess(config(), engine, bad)


def test_a_split_of_one_document_is_refused(engine: AdaptiveEngine) -> None:
    protocol = replace(PROTOCOL, new_tokens=100_000)
    with pytest.raises(TraceError, match="corpus: 0 validation documents have 100024 tokens"):
        assess(config(protocol=protocol), engine, CONTENDERS)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"test_documents": 1}, "test_documents"),
        ({"timed_documents": 0}, "timed_documents"),
        ({"target_agreement": float("nan")}, "target_agreement"),
        ({"target_edit_loss": float("nan")}, "target_edit_loss"),
        ({"target_edit_loss": 0.1, "protocol": Protocol(lines=0)}, "lines"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        config(**changes)


def test_no_more_tokens_are_timed_than_decoded() -> None:
    with pytest.raises(ConfigError, match=r"timed_tokens: 32 exceed the 31 that are decoded"):
        Protocol(new_tokens=32, timed_tokens=32)


def test_probabilities_that_are_not_finite_are_refused(documents: list[HeldOut]) -> None:
    model = load_model(REFERENCE, torch.float32, "cpu")
    model.model.norm.weight.data[0] = float("nan")
    broken = AdaptiveEngine(model, load_tokenizer(REFERENCE))
    split = Split.of(broken, documents, PROTOCOL)
    with pytest.raises(ConfigError, match="model: gives surprisal that is not finite under x"):
        measure_quality(broken, NeverExit(), split, PROTOCOL, "x")


def test_quarters_of_a_depth() -> None:
    assert quarters(12) == (3, 6, 9)
    assert quarters(30) == (7, 15, 22)
    assert quarters(2) == (1,)


@pytest.mark.parametrize("family", ["PPO", BEST_EXITS, JUMPS, ON_POLICY])
def test_what_either_form_of_training_teaches_may_be_published(family: str) -> None:
    require_learned(["full depth", family])
