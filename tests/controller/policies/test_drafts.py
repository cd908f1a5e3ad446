"""Drafting policies against their papers' formulas.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from offramp.controller.errors import PolicyFaultError, PolicyRefusedError, RequestError
from offramp.controller.features import CANDIDATES_V1, OUTLOOK_V1, SOFTMAX_V2, FloatArray
from offramp.controller.policies import weights
from offramp.controller.policies.drafts import (
    ConfidentDraft,
    DelDraft,
    DraftRouter,
    StaticDraft,
    ThompsonDraft,
    TrustedDraft,
)
from offramp.controller.policies.drafts.del_rule import tokens_per_layer
from offramp.controller.policies.drafts.draft_trust import DraftChances
from offramp.controller.policies.kinds import KINDS, kind_of, pack_policy
from offramp.controller.policies.protocols import (
    LearningPolicy,
    RoutingPolicy,
    Verdict,
    is_headless,
)
from offramp.controller.release.bundle import PolicyBundle
from offramp.controller.release.manifest import Manifest
from support.releases.packable import DRAFTS, LAST, SEEN, TABLE_VK, drafter, net


def outlook(drafts: int, acceptance: float = 1.0) -> FloatArray:
    row = np.zeros((1, OUTLOOK_V1.width), np.float32)
    row[0, OUTLOOK_V1.index("pending")] = drafts / 8
    row[0, OUTLOOK_V1.index("acceptance")] = acceptance
    return row


def features(top1: float) -> FloatArray:
    row = np.zeros((1, SOFTMAX_V2.width), np.float32)
    row[0, SOFTMAX_V2.index("top1")] = top1
    return row


def judged(*agreed: bool, exit_index: int = 0) -> list[Verdict]:
    return [Verdict(exit_index, features(0.5)[0], each) for each in agreed]


@pytest.mark.parametrize("policy", DRAFTS, ids=lambda policy: type(policy).__name__)
def test_all_route_and_only_the_adaptive_learn(policy: Any) -> None:
    assert isinstance(policy, RoutingPolicy)
    assert isinstance(policy, LearningPolicy) == isinstance(policy, ThompsonDraft | DelDraft)


@pytest.mark.parametrize("policy", DRAFTS, ids=lambda policy: type(policy).__name__)
def test_all_are_packed_and_built_again(policy: Any) -> None:
    kind = kind_of(policy)
    assert kind is KINDS[kind.name]
    width = 0 if policy.schema is None else policy.schema.width
    rows_NF = np.random.default_rng(0).random((32, width), np.float32)
    packed = pack_policy(policy, rows_NF)
    bundle = PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )
    signed = Manifest.from_bytes(bundle.manifest.to_bytes())
    assert signed.exits == policy.exits
    again = replace(bundle, manifest=signed).policy()  # decides the canned inputs anew
    weights.require_quick(again, packed.blob, 9.0)  # and a worker does so again
    assert type(again) is type(policy)
    assert again.exits == policy.exits
    for mine, other in zip(kind.describe_policy(again), kind.describe_policy(policy), strict=True):
        assert str(mine) == str(other)
    assert again.schema == policy.schema
    assert is_headless(again) == is_headless(policy) == (policy.candidates_VK is not None)


def test_static_drafts_so_many_and_verifies() -> None:
    policy = StaticDraft(layer=3, length=2)
    assert [int(policy.start(outlook(n))[0]) for n in range(4)] == [0, 0, 1, 1]
    assert policy.route(0, features(0.0), outlook(1)).tolist() == [0]


def test_confident_goes_on_while_top1_exceeds_eta() -> None:
    policy = ConfidentDraft(layer=3, threshold=0.5, length=2)
    decided = [int(policy.route(0, features(p), outlook(0))[0]) for p in (0.4, 0.5, 0.6)]
    assert decided == [1, 1, 0]
    assert policy.start(outlook(2)).tolist() == [1]


def test_tpl_is_expected_tokens_over_loaded_layers() -> None:
    alpha, exit_layer, layers = 0.8, 3, 12
    for drafts in range(9):
        # 1 + Σ P(the first i drafts are all right), tokens of a cycle, by hand.
        expected = sum(alpha**i for i in range(drafts + 1)) / (drafts * exit_layer + layers)
        found = tokens_per_layer(np.array([alpha]), (exit_layer,), layers, 8)[0, drafts]
        assert found == pytest.approx(expected)


def test_del_takes_the_best_exit_and_length_of_what_it_has_seen() -> None:
    policy = DelDraft((3, 6), 12, (0.7, 0.9), (0.4, 0.5), omega=0.5)
    gain = tokens_per_layer(np.array([0.7, 0.9]), (3, 6), 12, 8)
    best = np.unravel_index(gain.argmax(), gain.shape)
    assert (policy.exit_index, policy.length) == best
    assert policy.start(outlook(0)).tolist() == [policy.exit_index]
    assert policy.start(outlook(policy.length)).tolist() == [2]
    for _ in range(20):  # the other exit, now always wrong
        policy.learn(judged(False, exit_index=policy.exit_index))
        if policy.length == 0:
            break
    assert policy.length == 0  # both exits are useless now: verify each token
    assert policy.route(1, features(0.49), outlook(0)).tolist() == [2]
    assert policy.route(1, features(0.51), outlook(0)).tolist() == [1]


def test_del_weighs_a_copy_by_what_its_layers_were_measured_to_cost() -> None:
    exits, acceptance = (LAST, 3), (0.9, 0.6)
    taken = []
    for load in (12 * 0.1, 12 * 0.9):
        policy = DelDraft(exits, 12, acceptance, (0.4, 0.5), (load, 3))
        taken.append(policy.exit_index)
    assert taken == [0, 1]


def test_thompson_counts_right_drafts_and_one_failure() -> None:
    policy = ThompsonDraft(3, alpha=2.0, beta=1.0)
    policy.learn(judged(True, True, False, True))
    assert (policy.alpha, policy.beta) == (4, 2)
    policy.learn(judged(True, True))
    assert (policy.alpha, policy.beta) == (6, 2)


def test_thompson_goes_on_with_the_posterior_mean() -> None:
    policy = ThompsonDraft(3, alpha=30.0, beta=10.0, seed=1)
    went_on = np.mean([policy.start(outlook(1))[0] == 0 for _ in range(4000)])
    # A Bernoulli(θ) with θ ~ Beta(α, β) is 1 with chance α / (α + β); ± 4 standard errors.
    assert abs(went_on - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 4000)
    assert policy.start(outlook(0)).tolist() == [0]
    assert policy.start(outlook(8)).tolist() == [1]


def test_a_router_follows_the_trust_in_its_own_drafts() -> None:
    policy = drafter()
    policy.start(outlook(0))
    trusts = []
    for drafts, top1 in enumerate((0.9, 0.5)):
        policy._targets = [[0] * 3] * 2  # whatever the logits say: leave
        policy.route(0, features(top1), outlook(drafts))
        trusts.append(float(policy.trust.of(outlook(drafts + 1))[0]))
    np.testing.assert_allclose(trusts, [0.9, 0.45], rtol=1e-6)
    assert policy.trust.of(outlook(5, 0.5))[0] == 0.5**5  # another row's drafts
    assert policy.trust.of(outlook(0))[0] == 1


def test_one_row_is_decided_as_it_is_among_many() -> None:
    policy = drafter()
    rng = np.random.default_rng(2)
    rows_NF = rng.random((40, SOFTMAX_V2.width), np.float32)
    outlooks_NC = rng.random((40, OUTLOOK_V1.width), np.float32)
    outlooks_NC[:, OUTLOOK_V1.index("pending")] = 1.0
    for here in range(2):
        many = policy.route(here, rows_NF, outlooks_NC)
        each = [
            policy.route(here, rows_NF[n : n + 1], outlooks_NC[n : n + 1])[0] for n in range(40)
        ]
        assert many.tolist() == each
        assert (many >= here).all()


def test_bad_arguments_are_refused() -> None:
    for build in (
        lambda: StaticDraft(layer=0, length=1),
        lambda: StaticDraft(layer=3, length=9),
        lambda: ConfidentDraft(layer=3, threshold=1.5),
        lambda: ThompsonDraft(3, alpha=0.0),
        lambda: DelDraft((3, 6), 12, (0.5,), (0.5, 0.5)),
        lambda: DelDraft((3, 6), 12, (0.5, 0.5), (0.5, 0.5), (3,)),
        lambda: DelDraft((3, 6), 12, (0.5, 0.5), (0.5, 0.5), (3, 0)),
        lambda: DelDraft((6, 3), 12, (0.5, 0.5), (0.5, 0.5)),
        lambda: DelDraft((3, LAST), 12, (0.5, 0.5), (0.5, 0.5)),
        lambda: TrustedDraft(3, (0.5, 8.0), 1.5),
        lambda: TrustedDraft(3, (0.5, np.nan), 0.5),
        lambda: drafter(chances=DraftChances(((0.5, 8.0),), (3,))),
        lambda: DraftRouter((3,), net(SEEN, 3, 0), net(SOFTMAX_V2.width + SEEN, 2, 0)),
    ):
        with pytest.raises(RequestError):
            build()
    with pytest.raises(PolicyFaultError):
        drafter().route(0, features(float("nan")), outlook(0))


def test_a_manifest_that_names_other_features_is_refused() -> None:
    policy = ConfidentDraft(layer=3, threshold=0.4, candidates_VK=TABLE_VK)
    rows_NF = np.random.default_rng(0).random((32, CANDIDATES_V1.width), np.float32)
    packed = pack_policy(policy, rows_NF)

    class Liar(ConfidentDraft):
        schema = SOFTMAX_V2

    lying = replace(KINDS["draft-confident"], build=lambda parts: Liar(layer=3, threshold=0.4))
    bundle = PolicyBundle.draft(
        packed, model="aa", tokenizer="bb", training={}, metrics={}, created_at=0.0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "KINDS", {**KINDS, "draft-confident": lying})
        with pytest.raises(PolicyRefusedError, match="reads other features"):
            bundle.policy()
