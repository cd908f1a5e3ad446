"""Every rule packed and rebuilt. Shape suffixes: N rows, F features, C outlook columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from offramp.controller.errors import PolicyRefusedError, Refusal
from offramp.controller.features import OUTLOOK_V1
from offramp.controller.policies.kinds import digest_of, pack_policy
from offramp.controller.policies.protocols import ExitPolicy, LearningPolicy, Policy, RoutingPolicy
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import Manifest
from support.releases.packable import RULES, make_stopping

ROWS = 40


def bundled(policy: Policy) -> PolicyBundle:
    width = 0 if policy.schema is None else policy.schema.width
    canned_NF = np.random.default_rng(9).random((64, width), dtype=np.float32)
    packed = pack_policy(policy, canned_NF)
    return PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )


@pytest.mark.parametrize("policy", RULES, ids=lambda policy: type(policy).__name__)
def test_a_rule_comes_back_and_decides_the_same(policy: Policy) -> None:
    bundle = bundled(policy)
    assert Manifest.from_bytes(bundle.manifest.to_bytes()) == bundle.manifest
    found = bundle.policy()
    assert type(found) is type(policy)
    assert (found.exits, found.schema) == (policy.exits, policy.schema)
    assert bundled(found).manifest.params == bundle.manifest.params
    rng = np.random.default_rng(10)
    width = 0 if policy.schema is None else policy.schema.width
    features_NF = rng.random((ROWS, width), dtype=np.float32)
    outlook_NC = rng.random((ROWS, OUTLOOK_V1.width), dtype=np.float32)
    if isinstance(policy, RoutingPolicy):
        assert isinstance(found, RoutingPolicy)
        np.testing.assert_array_equal(found.start(outlook_NC), policy.start(outlook_NC))
        for here in range(len(policy.exits)):
            one, other = (each.route(here, features_NF, outlook_NC) for each in (found, policy))
            np.testing.assert_array_equal(one, other)
    else:
        assert isinstance(found, ExitPolicy)
        np.testing.assert_array_equal(found.leave(features_NF), policy.leave(features_NF))


def test_which_rules_route_and_which_learn() -> None:
    routing = {type(each).__name__ for each in RULES if isinstance(each, RoutingPolicy)}
    learning = {type(each).__name__ for each in RULES if isinstance(each, LearningPolicy)}
    assert routing == {
        "DecayingThreshold", "KeptStages", "PositionSchedule", "StageThresholds", "StoppingPolicy",
    }  # fmt: skip
    assert learning == {"BetaThreshold", "ThresholdBandit"}


@pytest.mark.parametrize("policy", RULES, ids=lambda policy: type(policy).__name__)
def test_other_parameters_than_packed_are_refused(policy: Policy) -> None:
    bundle = bundled(policy)
    spoilt = replace(bundle.manifest, params={**bundle.manifest.params, "more": 1})
    with pytest.raises(PolicyRefusedError, match=r"unknown field 'params\.more'"):
        Manifest.from_bytes(spoilt.to_bytes())
    with pytest.raises(PolicyRefusedError) as caught:
        PolicyBundle(spoilt, bundle.blob).policy()
    assert caught.value.reason is Refusal.BAD_FORMAT


def test_routes_that_differ_from_those_recorded_are_refused() -> None:
    # The same kind and parameters, but tensors of another policy: only its decisions tell.
    one, other = (bundled(make_stopping(np.random.default_rng(seed))) for seed in (8, 11))
    mixed = load(one.blob) | {"weights": load(other.blob)["weights"]}
    blob = save(dict(sorted(mixed.items())))
    manifest = replace(one.manifest, digest=digest_of(blob), size=len(blob))
    with pytest.raises(PolicyRefusedError) as caught:
        PolicyBundle(manifest, blob).policy()
    assert caught.value.reason is Refusal.CANNED_INPUTS
