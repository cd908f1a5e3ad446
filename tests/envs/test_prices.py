"""What episodes are charged: measured tables, energy, and tables that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1, SKETCH_V1, SOFTMAX_V2
from offramp.envs import SequenceExitCore, TokenExitCore, TokenExitEnv, TokenTraces
from offramp.envs.charges.token_costs import TokenCosts
from support.cost_tables import leaving, measured
from support.probing import Invented, invent

EXITS = (2, 4, 5, 7)


@pytest.fixture(scope="module")
def invented() -> Invented:
    return invent(layers=12)


@pytest.fixture(scope="module")
def traces(invented: Invented) -> TokenTraces:
    return invented.traces()


@pytest.fixture(scope="module")
def table() -> CostTable:
    return measured(model="tiny")


def test_gates_cost_what_the_table_says_of_leaving(traces: TokenTraces, table: CostTable) -> None:
    core = TokenExitCore(traces, table, num_envs=1, autoreset=False)
    for leave_at in range(5):
        core.reset(tokens=0)
        for step in range(min(leave_at + 1, 4)):
            batch = core.step(np.array([int(step == leave_at)]))
        info = batch.finals.rows()[0]
        assert info["cost"] == pytest.approx(leaving(table, EXITS)[leave_at])
        assert info["energy"] == pytest.approx(leaving(table, EXITS, unit="j")[leave_at])


def test_a_probe_whose_joules_are_unknown_is_priced_in_seconds_alone(table: CostTable) -> None:
    softmax = TokenCosts.under(SOFTMAX_V2, table, EXITS)
    assert softmax.objectives == ("quality", "latency")
    assert TokenCosts.under(CANDIDATES_V1, table, EXITS).objectives[-1] == "energy"
    prices = table.at(1)
    # The head that the probe computed gives the token, too: leaving pays for none.
    leave = prices.step_s + 4 * prices.layer_s + 8 * prices.fill_s
    assert softmax.leave_E1[1] == pytest.approx(leave / prices.full_s)


def test_energy_is_weighed_observed_and_told(traces: TokenTraces, table: CostTable) -> None:
    env = TokenExitEnv(traces=traces, costs=table, energy_range=(0.1, 10), actions="jump")
    assert env.objectives == ("quality", "latency", "energy")
    assert env.reward_space.shape == (3,)
    obs, _ = env.reset(seed=0, options={"token": 4, "lambda": 0.5, "mu": 2.0})
    np.testing.assert_allclose(obs[-2:], np.log([0.5, 2.0]), rtol=1e-6)
    total, vector_V, ended = 0.0, np.zeros(3), False
    for action in (2, 1, 0):
        obs, reward, ended, _, info = env.step(action)
        assert env.reward_space.contains(info["reward_vector"].astype(np.float32))
        total, vector_V = total + reward, vector_V + info["reward_vector"]
    assert ended
    weights = np.array([1, info["lambda"], info["mu"]])
    assert total == pytest.approx(weights @ vector_V / weights.sum())
    np.testing.assert_allclose(vector_V, [info["quality"], -info["cost"], -info["energy"]])


def test_unknown_energy_is_absent_and_never_zero(traces: TokenTraces, table: CostTable) -> None:
    parts = {part: dataclasses.replace(each, joules=None) for part, each in
             table.batches[0].parts.items()}  # fmt: skip
    partly = dataclasses.replace(
        table, batches=(dataclasses.replace(table.batches[0], parts=parts), *table.batches[1:])
    )
    env = TokenExitEnv(traces=traces, costs=partly)
    assert env.objectives == ("quality", "latency")
    env.reset(seed=0)
    *_, info = env.step(1)
    assert len(info["reward_vector"]) == 2
    assert "energy" not in info
    with pytest.raises(ConfigError, match="energy_range: weighs energy, of which the cost table"):
        TokenExitEnv(traces=traces, costs=partly, energy_range=(0.1, 1.0))


def test_options_name_weights_that_are_weighed(traces: TokenTraces, table: CostTable) -> None:
    with pytest.raises(ConfigError, match="mu: is no weight here"):
        TokenExitEnv(traces=traces, costs=table).reset(options={"mu": 1.0})


def test_rows_share_a_launch(table: CostTable) -> None:
    alone, eight = TokenCosts.of(table, EXITS), TokenCosts.of(table, EXITS, 8)
    share = table.at(8).layer_s / 8 / table.full_s
    np.testing.assert_allclose(np.diff(eight.leave_OP[0, 1:3]), 2 * (share - fill(table, 8)))
    assert (eight.leave_OP[:, 1:] < alone.leave_OP[:, 1:]).all()
    assert (
        TokenCosts.of(table, EXITS, fills=False).leave_OP[0, 1:5] < alone.leave_OP[0, 1:5]
    ).all()


def fill(table: CostTable, rows: int) -> float:
    return table.at(rows).fill_s / rows / table.full_s


@pytest.mark.parametrize("make", [TokenExitCore, SequenceExitCore])
def test_tables_that_do_not_fit_are_refused(
    make: Any, traces: TokenTraces, table: CostTable
) -> None:
    other = dataclasses.replace(table, model="f" * 64)
    with pytest.raises(ConfigError, match="costs: were measured on model ffffffffffff, not on"):
        make(traces, other, num_envs=1)
    with pytest.raises(ConfigError, match="costs: are of a model with 5 layers"):
        make(traces, dataclasses.replace(table, layers=5), num_envs=1)
    sketched = dataclasses.replace(traces.header, schema=SKETCH_V1.digest)
    features_NEF = traces.features_NEF[:, :, : SKETCH_V1.width]
    other_probe = dataclasses.replace(traces, header=sketched, features_NEF=features_NEF)
    with pytest.raises(ConfigError, match="schema: the costs of 'sketch' probes were not measured"):
        make(other_probe, table, num_envs=1)


def test_traces_of_another_schema_are_refused(traces: TokenTraces, costs: CostTable) -> None:
    table = dataclasses.replace(costs, layers=12)
    unknown = dataclasses.replace(traces.header, schema="0" * 64)
    with pytest.raises(TraceError, match="schema: '000000000000' is unknown"):
        TokenExitCore(dataclasses.replace(traces, header=unknown), table, num_envs=1)
    narrow = dataclasses.replace(traces, features_NEF=traces.features_NEF[:, :, :5])
    with pytest.raises(TraceError, match="features_NEF: have 5 columns, 'candidates' has 11"):
        TokenExitCore(narrow, table, num_envs=1)


def test_a_token_pays_the_adapter_layers_it_comes_by() -> None:
    table = measured()
    plain = TokenCosts.of(table, EXITS)
    adapted = TokenCosts.of(table, EXITS, adapters=EXITS[1:2])
    layer = table.at(1).layer_s / table.at(1).full_s
    more = (adapted.leave_OP - plain.leave_OP)[0]
    np.testing.assert_allclose(more, [0, 0, *[layer] * len(EXITS)], atol=1e-12)
    under = TokenCosts.under(SOFTMAX_V2, table, EXITS, EXITS[1:2])
    np.testing.assert_allclose(
        under.leave_E1 - TokenCosts.under(SOFTMAX_V2, table, EXITS).leave_E1, more[1:], atol=1e-12
    )
