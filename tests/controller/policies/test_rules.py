"""Each rule against its paper's formula. Shape suffixes: N rows, F features, C outlook."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import PolicyFaultError, RequestError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, SOFTMAX_V2, STATE_V1, FloatArray
from offramp.controller.policies.protocols import ThresholdPolicy, Verdict
from offramp.controller.policies.rules.bandit import ThresholdBandit
from offramp.controller.policies.rules.beta import GRID, BetaThreshold, beta_parameters, moments_of
from offramp.controller.policies.rules.decay import DecayingThreshold
from offramp.controller.policies.rules.entropy_patience import EntropyExit, PatienceExit
from offramp.controller.policies.rules.optimal_stopping import StoppingPolicy, terms
from offramp.controller.policies.rules.position import PositionSchedule
from offramp.controller.policies.rules.stages import NEVER, StageThresholds

EXITS = (3, 6, 9)
ROWS = 40


@pytest.fixture
def features_NF() -> FloatArray:
    return np.random.default_rng(0).random((ROWS, SOFTMAX_V2.width), dtype=np.float32)


@pytest.fixture
def outlook_NC() -> FloatArray:
    outlook_NC = np.zeros((ROWS, OUTLOOK_V1.width), np.float32)
    steps = np.arange(ROWS)
    outlook_NC[:, OUTLOOK_V1.index("step")] = steps / 256
    outlook_NC[:, OUTLOOK_V1.index("left")] = (ROWS - steps) / 256
    return outlook_NC


@pytest.mark.parametrize("decay", [0.0, 4.0])
@pytest.mark.parametrize("column", ["top1", "margin"])
def test_calm_decays_as_equation_5_says(
    features_NF: FloatArray, outlook_NC: FloatArray, column: str, decay: float
) -> None:
    policy = DecayingThreshold(
        exits=EXITS, schema=SOFTMAX_V2, column=column, threshold=0.7, decay=decay
    )
    assert policy.start(outlook_NC).tolist() == [0] * ROWS
    route_N = policy.route(1, features_NF, outlook_NC)
    for step in range(ROWS):
        threshold = 0.7 * (9 / 10 + 1 / 10 * math.exp(-decay * step / ROWS))
        confidence = features_NF[step, ("top1", "margin").index(column)]
        assert route_N[step] == (1 if confidence >= threshold else 2)
    assert set(route_N.tolist()) == {1, 2}


def test_saturation_compares_the_cosine_of_successive_states() -> None:
    policy = DecayingThreshold(exits=EXITS, schema=STATE_V1, column="cosine", threshold=0.9)
    features_NF = np.zeros((2, STATE_V1.width), np.float32)
    features_NF[:, STATE_V1.index("cosine")] = [0.91, 0.85]
    late_NC = np.zeros((2, OUTLOOK_V1.width), np.float32)
    late_NC[:, OUTLOOK_V1.index("step")] = 1.0
    assert policy.route(0, features_NF, np.zeros_like(late_NC)).tolist() == [0, 1]
    # At the end the threshold has fallen to 0.9 · (0.9 + 0.1 · e⁻⁴) = 0.81.
    assert policy.route(0, features_NF, late_NC).tolist() == [0, 0]


def test_deebert_leaves_below_its_entropy() -> None:
    policy = EntropyExit(exits=EXITS, threshold=0.25)
    chances_NV = np.random.default_rng(1).dirichlet([0.2] * 8, size=ROWS)
    features_NF = np.zeros((ROWS, SOFTMAX_V2.width), np.float32)
    nats_N = [-sum(p * math.log(p) for p in row if p > 0) for row in chances_NV]
    features_NF[:, SOFTMAX_V2.index("entropy")] = np.asarray(nats_N) / math.log(8)
    expected = [nats < 0.25 * math.log(8) for nats in nats_N]
    assert policy.leave(features_NF).tolist() == expected
    assert 0 < sum(expected) < ROWS


@pytest.mark.parametrize("patience", [1, 2])
def test_pabee_counts_agreeing_exits(patience: int) -> None:
    rng = np.random.default_rng(2)
    policy = PatienceExit(exits=(1, 2, 3, 4), patience=patience)
    left_somewhere = set()
    for _ in range(50):
        tokens = rng.integers(2, size=4)
        counter, run, left = 0, 0, None
        for here in range(4):
            same = here > 0 and tokens[here] == tokens[here - 1]
            counter = counter + 1 if same else 0  # the paper's cnt
            run = run + 1 if same else 0  # the probe's run of probes
            features_NF = np.zeros((1, SOFTMAX_V2.width), np.float32)
            features_NF[0, SOFTMAX_V2.index("run_length")] = run / 4
            assert policy.leave(features_NF)[0] == (counter >= patience)
            if counter >= patience and left is None:
                left = here
        left_somewhere.add(left)
    assert len(left_somewhere) > 2
    with pytest.raises(RequestError, match="cannot be reached"):
        PatienceExit(exits=(1, 2), patience=2)


def test_skipdecode_falls_linearly_and_never_rises(outlook_NC: FloatArray) -> None:
    policy = PositionSchedule(exits=EXITS, deepest=12, shallowest=3)
    start_N = policy.start(outlook_NC)
    for step in range(ROWS):
        depth = 12 - (12 - 3) * step / ROWS
        expected = next((i for i, layer in enumerate(EXITS) if layer >= depth), 3)
        assert start_N[step] == expected
    layers = np.asarray([*EXITS, 12])[start_N]
    assert (np.diff(layers) <= 0).all()
    assert set(layers.tolist()) == {6, 9, 12}
    blank = np.empty((ROWS, 0), np.float32)
    assert policy.route(1, blank, outlook_NC).tolist() == [1] * ROWS


def test_eero_keeps_one_threshold_per_exit(features_NF: FloatArray, outlook_NC: FloatArray) -> None:
    policy = StageThresholds(
        exits=EXITS, schema=SOFTMAX_V2, column="top1", thresholds=(NEVER, 0.5, 0.2)
    )
    for here, threshold in enumerate(policy.thresholds):
        expected = [here if row[0] >= np.float32(threshold) else here + 1 for row in features_NF]
        assert policy.route(here, features_NF, outlook_NC).tolist() == expected
    with pytest.raises(RequestError, match="2, for 3 exits"):
        replace(policy, thresholds=(0.5, 0.5))


def beta_draws(rng: np.random.Generator) -> tuple[FloatArray, np.ndarray]:
    agreed_N = rng.random(4000) < 0.6
    confidence_N = np.where(agreed_N, rng.beta(6, 2, 4000), rng.beta(2, 3, 4000))
    return confidence_N.astype(np.float32), agreed_N


def make_beta(rng: np.random.Generator, **changes: float) -> BetaThreshold:
    moments_23 = moments_of(*beta_draws(rng))
    values: dict[str, Any] = {"zeta": 0.4, **changes}
    return BetaThreshold(
        exits=(6,), schema=SOFTMAX_V2, column="top1", moments_23=moments_23, **values
    )


def test_free_fits_beta_distributions_by_moments() -> None:
    rng = np.random.default_rng(3)
    confidence_N, agreed_N = beta_draws(rng)
    moments_23 = moments_of(confidence_N, agreed_N)
    for flag, (alpha, beta) in ((1, (6, 2)), (0, (2, 3))):
        x = confidence_N[agreed_N == flag].astype(np.float64)
        mean, variance = x.mean(), x.var()
        expected = mean * (mean * (1 - mean) / variance - 1)
        found = beta_parameters(moments_23[flag])
        assert found is not None
        assert found == pytest.approx((expected, expected * (1 - mean) / mean))
        assert found == pytest.approx((alpha, beta), rel=0.15)


def test_free_leaves_where_the_posterior_exceeds_zeta() -> None:
    policy = make_beta(np.random.default_rng(3))
    (a0, b0), (a1, b1) = (beta_parameters(each) for each in policy.moments_23)  # type: ignore[misc]

    def density(x: float, a: float, b: float) -> float:
        scale = math.gamma(a + b) / math.gamma(a) / math.gamma(b)
        return float(scale * x ** (a - 1) * (1 - x) ** (b - 1))

    posterior = [density(x, a1, b1) / (density(x, a1, b1) + density(x, a0, b0)) for x in GRID]
    place = list(GRID).index(policy.threshold)
    assert all(each > 0.4 for each in posterior[place:])
    assert posterior[place - 1] <= 0.4
    assert make_beta(np.random.default_rng(3), zeta=0.8).threshold > policy.threshold


def test_free_learns_from_verdicts() -> None:
    policy = make_beta(np.random.default_rng(3), memory=0.98)
    before = policy.threshold
    sure = np.zeros(SOFTMAX_V2.width, np.float32)
    rng = np.random.default_rng(4)
    for confidence in rng.beta(9, 2, 400):
        sure[0] = confidence
        policy.learn([Verdict(0, sure.copy(), agreed=False)])
    assert policy.threshold > before  # sure tokens turned out wrong
    empty = BetaThreshold(
        exits=(6,), schema=SOFTMAX_V2, column="top1", zeta=0.4, moments_23=np.zeros((2, 3))
    )
    assert empty.threshold == 0.9


def make_bandit(**changes: object) -> ThresholdBandit:
    values: dict[str, object] = {
        "exits": EXITS,
        "schema": SOFTMAX_V2,
        "column": "top1",
        "thresholds": (0.2, 0.5, 0.9),
        "trade_off": 0.5,
        "costs": (0.3, 0.6, 0.8, 1.1),
    }
    return ThresholdBandit(**(values | changes))  # type: ignore[arg-type]


def test_a_bandit_books_rewards_and_takes_the_highest_index() -> None:
    policy = make_bandit(explore=0.3)
    counts, sums = [0, 0, 0], [0.0, 0.0, 0.0]
    rng = np.random.default_rng(5)
    for _ in range(60):
        arm = policy.arm
        verdicts = [
            Verdict(
                int(rng.integers(3)),
                np.empty(0, np.float32),
                agreed=bool(rng.random() < 0.2 + 0.3 * arm),
            )
            for _ in range(int(rng.integers(4)))
        ]
        rewards = [v.agreed - 0.5 * (0.3, 0.6, 0.8)[v.exit_index] for v in verdicts]
        rewards.append(1 - 0.5 * 1.1)
        counts[arm] += 1
        sums[arm] += sum(rewards) / len(rewards)
        policy.learn(verdicts)
        if min(counts):
            total = sum(counts)
            index = [
                s / n + 0.3 * math.sqrt(math.log(total) / n)
                for s, n in zip(sums, counts, strict=True)
            ]
            assert policy.arm == int(np.argmax(index))
    assert policy.counts_A.tolist() == counts
    features_NF = np.full((1, SOFTMAX_V2.width), 0.6, np.float32)
    assert policy.leave(features_NF)[0] == (policy.arm < 2)


def test_a_bandit_settles_on_the_arm_that_pays() -> None:
    policy = make_bandit()
    for _ in range(800):
        agreed = policy.arm != 0  # the lowest threshold is always wrong
        early = 1 if policy.arm < 2 else 0  # the highest lets nobody leave
        policy.learn([Verdict(0, np.empty(0, np.float32), agreed=agreed)] * early)
    assert int(np.argmax(policy.counts_A)) == 1


def test_stopping_sums_its_polynomial(outlook_NC: FloatArray) -> None:
    rng = np.random.default_rng(6)
    policy = make_stopping(rng)
    features_NF = rng.normal(size=(ROWS, STATE_V1.width)).astype(np.float32)
    for row in features_NF[:5]:
        z = [1.0, *np.clip((row - policy.mean_F) / policy.std_F, -4, 4).tolist()]
        pairs = [z[i] * z[j] for i in range(len(z)) for j in range(i, len(z))]
        expected = sum(w * p for w, p in zip(policy.weights_EP[1], pairs, strict=True))
        found = policy.advantages(1, row[None])[0]
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert policy.route(1, row[None], outlook_NC[:1])[0] == (1 if expected > 0 else 2)
    assert terms(features_NF, policy.mean_F, policy.std_F).shape == (ROWS, 55)
    features_NF[0] = np.nan
    with pytest.raises(PolicyFaultError):
        policy.route(1, features_NF, outlook_NC)


def make_stopping(rng: np.random.Generator) -> StoppingPolicy:
    width = STATE_V1.width
    return StoppingPolicy(
        exits=EXITS,
        schema=STATE_V1,
        mean_F=rng.normal(size=width).astype(np.float32),
        std_F=1 + rng.random(width, dtype=np.float32),
        weights_EP=rng.normal(size=(3, 55)).astype(np.float32),
    )


def test_a_threshold_that_nothing_can_be_compared_with_is_refused() -> None:
    nan = math.nan
    margin: dict[str, Any] = {"exits": EXITS, "schema": SOFTMAX_V2, "column": "margin"}
    for make in (
        lambda: EntropyExit(exits=EXITS, threshold=nan),
        lambda: DecayingThreshold(threshold=nan, **margin),
        lambda: ThresholdPolicy(threshold=nan, **margin),
        lambda: StageThresholds(thresholds=(0.5, nan, 0.5), **margin),
    ):
        with pytest.raises(RequestError, match="threshold: is nan"):
            make()
    with pytest.raises(RequestError, match="decay: nan"):
        DecayingThreshold(threshold=0.5, decay=nan, **margin)


def test_columns_that_a_schema_lacks_are_refused() -> None:
    with pytest.raises(RequestError, match="no column 'entropy'"):
        EntropyExit(exits=EXITS, threshold=0.5, schema=STATE_V1)
    with pytest.raises(RequestError, match="no column 'margin'"):
        DecayingThreshold(exits=EXITS, schema=STATE_V1, column="margin", threshold=0.5)
    with pytest.raises(RequestError, match="is not from 1 to deepest"):
        PositionSchedule(exits=EXITS, deepest=3, shallowest=4)
    assert EntropyExit(exits=EXITS, threshold=0.5, schema=CANDIDATES_V1).threshold == 0.5
