"""Jumps against a plain walk over invented states. Shape suffixes: B episodes, E exits."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1, STATE_V1
from offramp.envs import TokenExitCore
from support.probing import Invented, invent

COSINE = CANDIDATES_V1.index("cosine")


@pytest.fixture(scope="module")
def invented() -> Invented:
    return invent(straight=True)


@pytest.fixture(scope="module")
def core(invented: Invented, costs: CostTable) -> TokenExitCore:
    return TokenExitCore(
        invented.traces(), costs, num_envs=1, autoreset=False, actions="jump", asks_first=True
    )


def walk(core: TokenExitCore, path: list[int], **start: Any) -> tuple[list[Any], Any]:
    """Probe these exits, then leave (past the last: run to the end): observations, last step."""
    observations = [core.reset(**start)[0]]
    here = -1
    for exit_index in path:
        batch = core.step(np.array([exit_index - here]))
        observations.append(batch.obs_BD[0])
        here = exit_index
    return observations, batch if batch.terminated_B[0] else core.step(np.array([0]))


def slow_cost(costs: CostTable, exits: tuple[int, ...], path: list[int]) -> float:
    """Seconds of embedding, layers, fills, probes, decisions and head, added up one by one."""
    seconds = costs.step_s + costs.policy_s  # the decision before the first layer
    done = 0
    for exit_index in path:
        layer = exits[exit_index] if exit_index < len(exits) else costs.layers
        while done < layer:
            seconds += costs.layer_s
            done += 1
        if exit_index < len(exits):
            seconds += costs.probe_s + costs.policy_s
    while done < costs.layers:
        seconds += costs.fill_s
        done += 1
    return (seconds + costs.head_s) / costs.full_s


@settings(max_examples=80, deadline=None)
@given(
    path=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True).map(sorted),
    token=st.integers(0, 59),
    preference=st.floats(1e-3, 50),
)
def test_any_walk_sees_the_features_and_earns_the_return_of_a_plain_walk(
    invented: Invented,
    core: TokenExitCore,
    costs: CostTable,
    path: list[int],
    token: int,
    preference: float,
) -> None:
    observations, last = walk(core, path, tokens=token, lambdas=preference)
    assert (observations[0][:-1] == 0).all()
    probed = [exit_index for exit_index in path if exit_index < 4]
    for count in range(1, len(probed) + 1):
        expected_F = invented.features(token, probed[:count])
        np.testing.assert_allclose(observations[count][:-1], expected_F, atol=3e-6)
    info = last.finals.rows()[0]
    cost = slow_cost(costs, invented.exits, path)
    assert info["cost"] == pytest.approx(cost)
    assert info["probes"] == len(probed)
    assert info["exit_layer"] == (*invented.exits, 8)[path[-1]]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), asks_first=st.booleans(), jumps=st.integers(1, 4))
def test_returns_of_random_play_have_the_closed_form(
    invented: Invented, costs: CostTable, seed: int, asks_first: bool, jumps: int
) -> None:
    core = TokenExitCore(
        invented.traces(), costs, num_envs=9, actions="jump", jumps=jumps, asks_first=asks_first
    )
    core.reset(seed)
    rng = np.random.default_rng(seed)
    total_B, vector_BV = np.zeros(9), np.zeros((9, 2))
    for _ in range(12):
        batch = core.step(rng.integers(1 + jumps, size=9))
        total_B += batch.reward_B
        vector_BV += batch.vector_BV
        for place, info in zip(batch.finals.place_K, batch.finals.rows(), strict=True):
            value = info["quality"] - info["lambda"] * info["cost"]
            assert total_B[place] == pytest.approx(value / (1 + info["lambda"]), abs=1e-9)
            np.testing.assert_allclose(vector_BV[place], [info["quality"], -info["cost"]])
            total_B[place], vector_BV[place] = 0, 0


def test_the_cosine_of_a_jump_is_an_estimate_and_of_a_neighbour_exact(costs: CostTable) -> None:
    crooked = invent(straight=False)
    core = TokenExitCore(
        crooked.traces(), costs, num_envs=1, autoreset=False, actions="jump", asks_first=True
    )
    errors = {}
    for path in ([0, 1], [0, 3]):
        found = [walk(core, path, tokens=t)[0][-1][COSINE] for t in range(60)]
        exact = [crooked.features(t, path)[COSINE] for t in range(60)]
        errors[path[1]] = np.abs(np.subtract(found, exact)).max()
    assert errors[1] < 1e-6
    assert errors[3] > 0.1


def test_jumps_of_one_see_and_earn_what_gates_do(invented: Invented, costs: CostTable) -> None:
    gate = TokenExitCore(invented.traces(), costs, num_envs=40)
    jump = TokenExitCore(invented.traces(), costs, num_envs=40, actions="jump", jumps=1)
    np.testing.assert_array_equal(gate.reset(3), jump.reset(3))
    rng = np.random.default_rng(0)
    for _ in range(30):
        actions = rng.integers(2, size=40)
        a, b = gate.step(actions), jump.step(1 - actions)
        for left, right in zip((*a[:3], a.vector_BV), (*b[:3], b.vector_BV), strict=True):
            np.testing.assert_array_equal(left, right)


def test_masks_allow_one_way_to_each_place(core: TokenExitCore) -> None:
    core.reset(0)
    assert core.action_masks().tolist() == [[False, *[True] * 5]]
    core.step(np.array([3]))
    assert core.action_masks().tolist() == [[True, True, True, False, False, False]]


def test_masked_actions_are_full_depth_or_before_the_first_layer_the_first_exit(
    core: TokenExitCore,
) -> None:
    core.reset(tokens=3, lambdas=1.0)
    first = core.step(np.array([0]))
    assert not first.terminated_B[0]
    core.step(np.array([2]))
    last = core.step(np.array([5]))
    assert last.finals.info["exit_layer"].tolist() == [8]
    assert last.finals.info["probes"].tolist() == [2]
    assert last.finals.info["agree"].tolist() == [1]


def test_the_action_that_ends_runs_to_the_end_from_anywhere(
    invented: Invented, costs: CostTable
) -> None:
    core = TokenExitCore(
        invented.traces(), costs, num_envs=1, autoreset=False, actions="jump", jumps=1, ends=True
    )
    core.reset(0)
    assert core.action_masks().tolist() == [[True, True, True]]
    batch = core.step(np.array([2]))
    assert batch.finals.info["exit_layer"].tolist() == [8]
    assert batch.finals.info["probes"].tolist() == [1]
    core.reset(0)
    for _ in range(3):
        core.step(np.array([1]))
    assert core.action_masks().tolist() == [[True, True, False]]  # 1 leads to the end already


@pytest.mark.parametrize("action", [-1, 6])
def test_actions_that_are_none_are_refused(core: TokenExitCore, action: int) -> None:
    core.reset(0)
    with pytest.raises(ConfigError, match="Use 0 to leave and 1 to 5 to jump ahead"):
        core.step(np.array([action]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"actions": "jump", "jumps": 5}, "4 exits were recorded"),
        ({"actions": "jump", "jumps": 0}, "jumps: 0 is not from 1 to 4"),
        ({"actions": "jump", "jumps": 6, "asks_first": True}, "from 1 to 5"),
        ({"actions": "hop"}, "actions: 'hop' is unknown"),
        ({"jumps": 2}, "jumps: goes with jumps only"),
        ({"asks_first": True}, "asks_first: goes with jumps only"),
        ({"ends": True}, "ends: goes with jumps only"),
        ({"energy_range": (0.1, 1.0)}, "energy_range: weighs energy, of which the cost table"),
    ],
)
def test_unusable_options_are_named(
    invented: Invented, costs: CostTable, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        TokenExitCore(invented.traces(), costs, num_envs=1, **options)


def test_the_entropy_of_invented_features_is_that_of_their_softmax(invented: Invented) -> None:
    """The slow side is itself no copy of the engine's formulas: check one column by hand."""
    scores_K = invented.scores_TEK[0, 0]
    chances_K = [math.exp(s) / sum(math.exp(z) for z in scores_K) for s in scores_K]
    entropy = -sum(c * math.log(c) for c in chances_K) / math.log(5)
    found = invented.features(0, [0])[CANDIDATES_V1.index("entropy")]
    assert found == pytest.approx(entropy, rel=1e-6)


def test_a_schema_that_cannot_be_jumped_is_refused(costs: CostTable) -> None:
    traces = invent().traces()
    header = dataclasses.replace(traces.header, schema=STATE_V1.digest)
    other = dataclasses.replace(
        traces, header=header, features_NEF=traces.features_NEF[:, :, : STATE_V1.width]
    )
    TokenExitCore(other, costs, num_envs=1)
    with pytest.raises(TraceError, match="which is recorded for neighbours"):
        TokenExitCore(other, costs, num_envs=1, actions="jump")
