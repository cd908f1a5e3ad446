"""The router against an independent forward pass. Shape suffixes: N rows, A actions."""

from __future__ import annotations

import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize

from offramp.controller.errors import PolicyFaultError, RequestError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, FloatArray
from offramp.controller.policies.kinds import pack_policy
from offramp.controller.policies.protocols import RoutingPolicy
from offramp.controller.policies.router import MlpRouter
from offramp.controller.policies.weights import unpack_policy
from offramp.controller.release.bundle import PolicyBundle

EXITS = (2, 4, 6, 8)
INPUTS = CANDIDATES_V1.width + OUTLOOK_V1.width


def make_weights(seed: int, *sizes: int) -> list[tuple[FloatArray, FloatArray]]:
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(size=(wide, narrow)).astype(np.float32),
            rng.normal(size=narrow).astype(np.float32),
        )
        for wide, narrow in pairwise(sizes)
    ]


def rows(count: int, seed: int = 0) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, CANDIDATES_V1.width)).astype(np.float32)
    return features, rng.normal(size=(count, OUTLOOK_V1.width)).astype(np.float32)


def forward(weights: list[tuple[FloatArray, FloatArray]], x: FloatArray) -> FloatArray:
    for weight, bias in weights[:-1]:
        x = np.tanh(x.astype(np.float64) @ weight + bias)
    return np.asarray(x @ weights[-1][0] + weights[-1][1])


@pytest.mark.parametrize("ends", [False, True])
def test_routes_are_the_best_valid_action_of_an_independent_pass(ends: bool) -> None:
    weights = make_weights(1, INPUTS, 16, 8, 4 + ends)
    router = MlpRouter(EXITS, CANDIDATES_V1, weights, ends=ends)
    features_NF, outlook_NC = rows(2500)
    logits_NA = forward(weights, np.concatenate([features_NF, outlook_NC], axis=1))
    for here in range(len(EXITS)):
        expected = []
        for logits_A in logits_NA:
            reach = {here + k: logits_A[k] for k in range(4) if here + k <= len(EXITS)}
            if ends:
                reach[len(EXITS)] = max(logits_A[-1], reach.get(len(EXITS), -np.inf))
            expected.append(max(reach, key=lambda exit_: reach[exit_]))
        np.testing.assert_array_equal(router.route(here, features_NF, outlook_NC), expected)
        one_by_one = [
            int(router.route(here, features_NF[n : n + 1], outlook_NC[n : n + 1])[0])
            for n in range(300)
        ]
        assert one_by_one == expected[:300]
        assert len(set(expected)) > 1


def test_the_start_is_fixed_or_read_off_the_outlook() -> None:
    weights = make_weights(2, INPUTS, 8, 3)
    _, outlook_NC = rows(1500)
    fixed = MlpRouter(EXITS, CANDIDATES_V1, weights, first=2)
    assert isinstance(fixed, RoutingPolicy)
    assert fixed.start(outlook_NC).tolist() == [2] * 1500
    first = make_weights(3, OUTLOOK_V1.width, 8, 3)
    learned = MlpRouter(EXITS, CANDIDATES_V1, weights, first=first)
    best_N = forward(first, outlook_NC).argmax(1)
    np.testing.assert_array_equal(learned.start(outlook_NC), np.asarray([0, 1, 4])[best_N])
    assert set(best_N) == {0, 1, 2}


def test_inputs_that_are_not_finite_are_a_fault() -> None:
    first = make_weights(3, OUTLOOK_V1.width, 8, 3)
    router = MlpRouter(EXITS, CANDIDATES_V1, make_weights(2, INPUTS, 8, 3), first=first)
    features_NF, outlook_NC = rows(4)
    features_NF[0, 3] = np.nan
    for count in (1, 4):
        with pytest.raises(PolicyFaultError):
            router.route(0, features_NF[:count], outlook_NC[:count])
    outlook_NC[1, 0] = np.inf
    with pytest.raises(PolicyFaultError):
        router.start(np.full_like(outlook_NC, np.nan))


def test_jumps_and_starts_beyond_the_exits_are_refused() -> None:
    with pytest.raises(RequestError, match="jumps of up to 5 exits"):
        MlpRouter(EXITS, CANDIDATES_V1, make_weights(0, INPUTS, 8, 6))
    with pytest.raises(RequestError, match="jumps of up to 0 exits"):
        MlpRouter(EXITS, CANDIDATES_V1, make_weights(0, INPUTS, 8, 1))
    fitting = make_weights(0, INPUTS, 8, 3)
    with pytest.raises(RequestError, match="first"):
        MlpRouter(EXITS, CANDIDATES_V1, fitting, first=5)
    with pytest.raises(RequestError, match="first: has 6 outputs"):
        MlpRouter(EXITS, CANDIDATES_V1, fitting, first=make_weights(0, OUTLOOK_V1.width, 6))
    with pytest.raises(RequestError, match=r"weights\[0\]"):
        MlpRouter(EXITS, CANDIDATES_V1, make_weights(0, INPUTS + 1, 8, 3))


def test_a_router_sent_to_another_process_decides_the_same() -> None:
    first = make_weights(3, OUTLOOK_V1.width, 8, 3)
    router = MlpRouter(EXITS, CANDIDATES_V1, make_weights(2, INPUTS, 8, 3), first=first)
    copy = pickle.loads(pickle.dumps(router))
    features_NF, outlook_NC = rows(50)
    for n in range(50):
        one = features_NF[n : n + 1], outlook_NC[n : n + 1]
        assert copy.route(1, *one).tolist() == router.route(1, *one).tolist()
    assert copy.start(outlook_NC).tolist() == router.start(outlook_NC).tolist()


@pytest.mark.parametrize("first", [1, make_weights(3, OUTLOOK_V1.width, 8, 3)])
def test_a_packed_router_comes_back_and_decides_the_same(first: Any) -> None:
    weights = make_weights(2, INPUTS, 8, 4)
    router = MlpRouter(EXITS, CANDIDATES_V1, weights, first=first, ends=True)
    features_NF, outlook_NC = rows(200)
    packed = pack_policy(router, features_NF)
    bundle = PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )
    again = unpack_policy(bundle.manifest, bundle.blob)
    assert isinstance(again, MlpRouter)
    np.testing.assert_array_equal(again.start(outlook_NC), router.start(outlook_NC))
    for here in range(len(EXITS)):
        routed = router.route(here, features_NF, outlook_NC)
        np.testing.assert_array_equal(again.route(here, features_NF, outlook_NC), routed)
    kept = deserialize(packed.blob)  # type: ignore[no-untyped-call]  # ships no types
    recorded = {name: entry["shape"] for name, entry in kept}["canned.route"]
    assert 0 < recorded[1] <= 200  # narrow decisions were left out
    assert recorded[0] == len(EXITS) + 1
