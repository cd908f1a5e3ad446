"""Sequences against a plain loop, one row and one token at a time. Shape suffixes: B, E, D."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.controller.costs.table import CostTable
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1
from offramp.envs import SequenceExitCore, TokenTraces
from offramp.envs.adapters.sb3_vec_env import CoreVecEnv
from support.cost_tables import measured
from support.probing import Invented, invent

EXITS = 4
F = CANDIDATES_V1.width


@pytest.fixture(scope="module")
def invented() -> Invented:
    return invent(straight=True)


@pytest.fixture(scope="module")
def traces(invented: Invented) -> TokenTraces:
    return invented.traces()


@dataclass
class SlowRow:
    """One row, as slowly as it can be said. Layers are run one by one."""

    traces: TokenTraces
    costs: CostTable
    kv_mode: str
    token: int
    left: int
    loss: float = 0.3
    share: float = 0.25
    most: int = 2
    step: int = 0
    last: float = 1.0
    depths: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)  # depths of the pending tokens, oldest first

    def read(self, depth: int) -> float:
        """Layers skipped of those up to a depth, the k-th last token weighted 0.1 · 0.9^k."""
        skipped = [max(0, depth - each) for each in reversed(self.depths)]
        return sum(0.1 * 0.9**k * each for k, each in enumerate(skipped)) / self.costs.layers

    def layer_s(self, aboard: int) -> float:
        return self.costs.layer_s * (1 + self.share * aboard)

    def decode(self, path: list[int]) -> tuple[float, float]:
        """Quality and seconds of a token that is probed at these exits; [] is never asked."""
        exits, layers = self.traces.header.exits, self.costs.layers
        column = path[-1] if path else EXITS
        depth = exits[column] if column < EXITS else layers
        probes = sum(place < EXITS for place in path)
        seconds = self.costs.step_s + self.costs.head_s
        seconds += probes * (self.costs.probe_s + self.costs.policy_s)
        if probes:
            seconds += self.costs.build_s
        for layer in range(depth):
            riding = sum(stands <= layer for stands in self.open)
            seconds += self.layer_s(riding) if self.kv_mode == "defer" else self.costs.layer_s
        if self.kv_mode == "project":
            seconds += (layers - depth) * self.costs.fill_s
        kept = 1 - self.loss * self.read(depth) ** 0.5 if self.kv_mode == "project" else 1.0
        quality = kept * float(self.traces.quality("agreement")[self.token, column])
        if self.kv_mode == "defer":
            self.open = [max(stands, depth) for stands in self.open]
            if depth == layers:
                self.open = []
            else:
                self.open.append(depth)
        self.depths.append(depth)
        self.last = depth / layers
        self.step += 1
        self.left -= 1
        self.token += 1
        return quality, seconds / self.costs.full_s

    def outlook(self) -> list[float]:
        return [
            (self.step + 1) / 256,
            self.left / 256,
            len(self.open) / self.most,
            self.read(self.costs.layers),
            1.0,
            self.last,
            1.0,
            0.0,
        ]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_play_earns_and_sees_what_a_plain_loop_does(
    traces: TokenTraces, costs: CostTable, invented: Invented, data: st.DataObject
) -> None:
    modes: tuple[Literal["project", "defer"], ...] = ("project", "defer")
    mode = data.draw(st.sampled_from(modes))
    horizon = data.draw(st.integers(1, 25))
    start = data.draw(st.integers(0, 59))
    paths = st.lists(st.integers(0, EXITS), min_size=1, max_size=5, unique=True).map(sorted)
    core = SequenceExitCore(
        traces, costs, num_envs=1, horizon=horizon, kv_mode=mode, debt_loss=0.3, debt_power=0.5,
        max_pending=2,
        pending_share=0.25, autoreset=False, lambda_range=(0.5, 0.5), quality="agreement",
        asks_first=True,
    )  # fmt: skip
    row = SlowRow(traces, costs, mode, start, min(horizon, 20 - start % 20))
    obs_BD = core.reset(tokens=start)
    expected_quality = expected_cost = earned = 0.0
    tokens = unasked = 0
    ended = False
    while not ended:
        path = data.draw(paths)
        path = path[: path.index(EXITS) + 1] if EXITS in path else path
        np.testing.assert_allclose(obs_BD[0, F:-1], row.outlook(), atol=1e-6)
        here = -1
        token = row.token
        for place in path:
            batch = core.step(np.array([place - here]))
            earned += batch.reward_B[0]
            here = place
            if place < EXITS:
                seen_F = invented.features(token, [p for p in path if p <= place])
                np.testing.assert_allclose(batch.obs_BD[0, :F], seen_F, atol=3e-6)
        if path[-1] < EXITS:
            batch = core.step(np.array([0]))
            earned += batch.reward_B[0]
        for decoded in [path, []]:
            if decoded or (len(row.open) == row.most and row.left):
                quality, cost = row.decode(decoded)
                # The decision before the first layer is no probe.
                cost += costs.policy_s / costs.full_s if decoded else 0
                expected_quality, expected_cost = expected_quality + quality, expected_cost + cost
                tokens += 1
                unasked += not decoded
        ended = bool(batch.terminated_B[0])
        assert ended == (row.left == 0)
        obs_BD = batch.obs_BD
    info = batch.finals.rows()[0]
    weight = info["lambda"]
    value = expected_quality - weight * expected_cost
    assert earned == pytest.approx(value / (1 + weight), abs=1e-9)
    assert info["quality"] == pytest.approx(expected_quality / tokens)
    assert info["cost"] == pytest.approx(expected_cost / tokens)
    assert (info["tokens"], info["unasked"], info["token"]) == (tokens, unasked, start)


def test_debt_of_a_steady_exit_has_the_closed_form(traces: TokenTraces, costs: CostTable) -> None:
    core = SequenceExitCore(traces, costs, num_envs=1, horizon=12, autoreset=False, debt_loss=1.0)
    core.reset(tokens=0)
    column = F + OUTLOOK_V1.index("debt")
    for step in range(1, 12):
        debt = core.step(np.array([0])).obs_BD[0, column]
        assert debt == pytest.approx(0.75 * (1 - 0.9**step), abs=1e-6)  # exit 2 of 8 layers


def test_without_exits_the_modes_are_full_depth_and_cost_the_same(
    traces: TokenTraces, costs: CostTable
) -> None:
    for mode in ("project", "defer"):
        core = SequenceExitCore(
            traces, costs, num_envs=1, horizon=5, kv_mode=mode, pending_share=1.0, ends=True,
            asks_first=True, autoreset=False,
        )  # fmt: skip
        core.reset(tokens=0)
        for _ in range(5):
            batch = core.step(np.array([core.actions.count - 1]))
        info = batch.finals.rows()[0]
        assert info["quality"] == 1
        assert info["cost"] == pytest.approx(1 + costs.policy_s / costs.full_s)
        assert info["probes"] == 0


def test_pending_cost_what_the_spans_say_and_rows_share_a_launch(invented: Invented) -> None:
    costs = dataclasses.replace(measured(), layers=8, model="")
    one, eight = (
        SequenceExitCore(
            invented.traces(), costs, num_envs=1, horizon=3, kv_mode="defer", autoreset=False,
            rows=(rows,), max_pending=5,
        )
        for rows in (1, 8)
    )  # fmt: skip
    spent = {}
    for core, rows in ((one, 1), (eight, 8)):
        core.reset(tokens=0)
        core.step(np.array([0]))  # leaves after layer 2
        batch = core.step(np.array([EXITS]))  # all layers, with one rider from layer 3 on
        prices = costs.at(rows)
        riding = 6 * (costs.launch(2).layer_s - costs.launch(1).layer_s)
        whole = prices.full_s + prices.probe_s + prices.policy_s + prices.build_s
        spent[rows] = (whole / rows + riding) / costs.full_s
        assert -batch.vector_BV[0, 1] == pytest.approx(spent[rows])
        assert -batch.vector_BV[0, 2] > 0  # joules are known
    assert spent[8] < spent[1]


def test_runs_start_everywhere_they_fit_and_equally_often(
    traces: TokenTraces, costs: CostTable
) -> None:
    core = SequenceExitCore(traces, costs, num_envs=6000, horizon=18)
    batch = core.reset(0)
    assert (batch[:, F + OUTLOOK_V1.index("left")] == np.float32(18 / 256)).all()
    starts, counts = np.unique(core._start_B, return_counts=True)
    assert starts.tolist() == [0, 1, 2, 20, 21, 22, 40, 41, 42]
    assert (np.abs(counts - 6000 / 9) < 130).all()  # 5 standard deviations


def test_a_document_shorter_than_the_horizon_is_one_run(
    traces: TokenTraces, costs: CostTable
) -> None:
    core = SequenceExitCore(traces, costs, num_envs=50, horizon=100)
    core.reset(0)
    assert set(core._start_B.tolist()) == {0, 20, 40}
    assert set(core._history.left_B.tolist()) == {20}


def test_a_seed_fixes_everything_and_arrays_are_never_reused(
    traces: TokenTraces, costs: CostTable
) -> None:
    def play(seed: int) -> list[Any]:
        core = SequenceExitCore(
            traces, costs, num_envs=7, horizon=4, kv_mode="defer", pending_share=0.1, max_pending=1
        )
        rng = np.random.default_rng(1)
        out: list[Any] = [core.reset(seed)]
        for _ in range(40):
            batch = core.step(rng.integers(core.actions.count, size=7))
            new = [*batch[:3], batch.finals.obs_KD, *batch.finals.info.values(), batch.vector_BV]
            assert not any(np.shares_memory(a, b) for a in new for b in out)
            out += new
        return out

    first, again, other = play(3), play(3), play(4)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], other[0])


def test_rows_of_the_batch_are_drawn_and_shown(traces: TokenTraces) -> None:
    costs = dataclasses.replace(measured(), layers=8, model="")
    core = SequenceExitCore(traces, costs, num_envs=400, rows=(2, 4, 8))
    active_B = core.reset(0)[:, F + OUTLOOK_V1.index("active")]
    assert set(active_B.tolist()) == {0.25, 0.5, 1.0}


def test_a_vector_plays_what_single_rows_play(traces: TokenTraces, costs: CostTable) -> None:
    options: dict[str, Any] = {"horizon": 6, "kv_mode": "defer", "pending_share": 0.3}
    options |= {"max_pending": 2, "autoreset": False}
    starts = np.array([0, 7, 25, 41])
    many = SequenceExitCore(traces, costs, num_envs=4, **options)
    ones = [SequenceExitCore(traces, costs, num_envs=1, **options) for _ in starts]
    many.reset(tokens=starts, lambdas=0.3)
    for core, start in zip(ones, starts, strict=True):
        core.reset(tokens=start, lambdas=0.3)
    running = set(range(4))
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(many.actions.count, size=4)
        batch = many.step(actions)
        for place in sorted(running):
            single = ones[place].step(actions[place : place + 1])
            np.testing.assert_array_equal(single.obs_BD[0], batch.obs_BD[place])
            assert single.reward_B[0] == batch.reward_B[place]
            if single.terminated_B[0]:
                running.remove(place)
        if len(running) < 4:
            return  # beyond its end an episode that does not reset itself means nothing
    raise AssertionError("no run ended")


def test_sb3_sees_the_cores_episodes(traces: TokenTraces, costs: CostTable) -> None:
    vec_env = CoreVecEnv(SequenceExitCore(traces, costs, num_envs=5, horizon=3))
    core = SequenceExitCore(traces, costs, num_envs=5, horizon=3)
    vec_env.seed(2)
    np.testing.assert_array_equal(vec_env.reset(), core.reset(np.random.default_rng(2)))
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(30):
        masks = np.stack(vec_env.env_method("action_masks"))
        np.testing.assert_array_equal(masks, core.action_masks())
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        obs_BD, _, done_B, infos = vec_env.step(actions)
        batch = core.step(actions)
        np.testing.assert_array_equal(obs_BD, batch.obs_BD)
        ended += done_B.sum()
        assert all(("tokens" in info) == done for info, done in zip(infos, done_B, strict=True))
    assert ended > 10


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"horizon": 0}, "horizon: 0 is below 1"),
        ({"kv_mode": "verify"}, "kv_mode: 'verify' is unknown here. Use project or defer"),
        ({"debt_loss": 1.5}, "debt_loss: 1.5 is not from 0 to 1"),
        ({"debt_power": 0}, "debt_power: 0 is no positive power"),
        ({"max_pending": 0}, "max_pending: 0 is below 1"),
        ({"kv_mode": "defer"}, "pending_share: is needed"),
        ({"kv_mode": "defer", "pending_share": -0.1}, "pending_share: -0.1 is below 0"),
        ({"rows": ()}, "rows: "),
        ({"jumps": 5}, "4 exits were recorded"),
    ],
)
def test_unusable_arguments_are_named(
    traces: TokenTraces, costs: CostTable, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        SequenceExitCore(traces, costs, num_envs=1, **options)


def test_rows_that_were_not_measured_are_refused(traces: TokenTraces) -> None:
    costs = dataclasses.replace(measured(), layers=8, model="")
    with pytest.raises(ConfigError, match="rows: 9 is outside of the 1 to 8"):
        SequenceExitCore(traces, costs, num_envs=1, rows=(9,))


def test_unusable_traces_are_named(traces: TokenTraces, costs: CostTable) -> None:
    one = traces.select(traces.documents[:1])
    with pytest.raises(TraceError, match="documents: are a single one"):
        SequenceExitCore(one, costs, num_envs=1)
    skipping = dataclasses.replace(traces, position_N=traces.position_N * 2)
    with pytest.raises(TraceError, match="position_N: skips a token"):
        SequenceExitCore(skipping, costs, num_envs=1)
    mixed = dataclasses.replace(traces, document_N=(np.arange(60) % 3).astype(np.int32))
    with pytest.raises(TraceError, match="document_N: comes back"):
        SequenceExitCore(mixed, costs, num_envs=1)
