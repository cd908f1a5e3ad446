"""Every rule is placed, packs into a bundle, and decides offline as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from offramp.agents.placing.contenders import Contender, load_contenders, nearest, save_contenders
from offramp.agents.placing.replay import replay, walk
from offramp.agents.recording.training_data import TrainingData
from offramp.agents.training.families import BEST_EXITS, JUMPS, place_all
from offramp.agents.training.train_config import TrainConfig
from offramp.agents.training.trained_parts import TrainedParts
from offramp.controller.errors import TraceError
from offramp.controller.policies.protocols import NeverExit
from offramp.envs import TokenTraces
from offramp.research.fitting.greencode import GreenCodeConfig
from offramp.research.rulebook import GREEN_CODE, PUBLISHED, cheapest_variant, green_code

TARGETS = (0.9, 0.97)
CONFIG = TrainConfig(traces="unread", targets=TARGETS)

FAMILIES = {
    "full depth", "fixed exit", "CALM", "CALM decaying", "softmax max decaying",
    "CALM on candidates", "CALM saturation", "DeeBERT entropy", "SkipDecode", "PABEE patience",
    "FREE", "UCB bandit", "EERO budget", "SpecEE predictor", "p̂", "backward induction",
    "p̂ on best exits", "GREEN-CODE",
}  # fmt: skip


def with_states(traces: TokenTraces) -> TokenTraces:
    state_NED = np.repeat(traces.agree_NE[:, :, None], 8, axis=2).astype(np.float16)
    return replace(traces, header=replace(traces.header, width=8), state_NED=state_NED)


@pytest.fixture(scope="module")
def states(data: TrainingData) -> TrainingData:
    """A quarter of the data, with states."""
    train, validation = (
        with_states(each.select(each.documents[:2])) for each in (data.train, data.validation)
    )
    return replace(data, train=train, validation=validation)


@pytest.fixture(scope="module")
def contenders(states: TrainingData) -> list[Contender]:
    parts = TrainedParts(CONFIG, states, Path("unused"))
    families = [each for each in PUBLISHED if each not in ("PPO", JUMPS)]
    return [*place_all(families, parts), *green_code(parts, GreenCodeConfig(steps=20_000, envs=64))]


def test_every_family_is_there_and_meets_a_target_if_it_can(
    contenders: Sequence[Contender],
) -> None:
    assert {each.family for each in contenders} == FAMILIES
    assert contenders[0].setting is None
    assert len({each.name for each in contenders}) == len(contenders)
    meets = {
        each.family
        for each in contenders
        if each.offline_agreement and min(abs(each.offline_agreement - t) for t in TARGETS) < 0.02
    }
    for family in ("CALM", "DeeBERT entropy", "EERO budget", "p̂", "backward induction"):
        assert family in meets


def test_every_rule_goes_through_a_bundle(
    contenders: Sequence[Contender], states: TrainingData, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("policies")
    save_contenders(folder, list(contenders), states, {})
    found = load_contenders(folder)
    assert [each.name for each in found] == [each.name for each in contenders]
    for mine, theirs in zip(contenders, found, strict=True):
        taken = [walk(each.policy, states.validation).taken_N for each in (mine, theirs)]
        assert (taken[0] == taken[1]).mean() > 0.999, mine.name
        # Where exits are skipped, features are recomputed; replay shows those that were recorded.
        if mine.setting is not None and mine.family != BEST_EXITS:
            replayed = replay(mine.policy, states.validation, states.costs)
            assert replayed.agreement == pytest.approx(mine.offline_agreement)
            assert replayed.cost == pytest.approx(mine.offline_cost)


def test_hidden_states_are_asked_for_when_needed(data: TrainingData) -> None:
    with pytest.raises(TraceError, match="--states"):
        place_all([GREEN_CODE], TrainedParts(CONFIG, data, Path("unused")))


def contender(agreement: float, cost: float) -> Contender:
    return Contender(
        family="x", setting=cost, offline_agreement=agreement, policy=NeverExit(),
        offline_cost=cost,
    )  # fmt: skip


def test_variants_compete_on_cost_where_they_meet_the_target() -> None:
    dear, cheap, far = contender(0.95, 0.8), contender(0.945, 0.6), contender(0.8, 0.1)
    assert nearest([cheap, dear, far], [0.95]) == [dear]
    assert cheapest_variant([[dear, far], [cheap, far]], 0.95) is cheap
    assert cheapest_variant([[far], [dear]], 0.5) is far
