"""Trust in open drafts, and the rule that stops by it.

Shape suffixes: N rows, F features, C columns of outlook.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from offramp.controller.features import OUTLOOK_V1, SOFTMAX_V2, FloatArray
from offramp.controller.policies.drafts import TrustedDraft
from offramp.controller.policies.drafts.draft_trust import DraftChances, chances_of
from offramp.controller.policies.drafts.leads import leads_of

LINE = (0.5, 8.0)


def seen(logits: tuple[float, ...]) -> FloatArray:
    """SOFTMAX_V2 of one row of logits, [1, F]."""
    chances = np.sort(np.exp(logits) / np.exp(logits).sum())
    row = np.zeros((1, SOFTMAX_V2.width), np.float32)
    row[0, :2] = chances[-1], chances[-1] - chances[-2]
    return row


def pending(drafts: int, acceptance: float = 1.0) -> FloatArray:
    row = np.zeros((1, OUTLOOK_V1.width), np.float32)
    row[0, OUTLOOK_V1.index("pending")] = drafts / 8
    row[0, OUTLOOK_V1.index("acceptance")] = acceptance
    return row


def test_a_lead_is_the_distance_of_the_two_best_logits() -> None:
    for logits, lead in (((1.0, 0.75, -3.0), 0.25), ((2.0, 2.0, 2.0), 0.0), ((30.0, 0.0), 8.0)):
        features_F = seen(logits)[0]
        assert leads_of(features_F[0], features_F[1]) == pytest.approx(lead, abs=1e-5)


def test_chances_are_logistic_and_alike_for_one_and_many() -> None:
    chances = DraftChances((LINE, (0.0, 0.0)), (3, 6))
    features_NF = np.concatenate([seen((lead, 0.0, -1.0)) for lead in (0.0, 0.1, 0.5, 3.0, 20.0)])
    many_N = chances_of(chances.odds(0, features_NF))
    odds = [chances.odds_of_one(0, *map(float, features_F[:2])) for features_F in features_NF]
    each = chances_of(np.array(odds))
    np.testing.assert_allclose(many_N, each, atol=1e-6)
    assert many_N[1] == pytest.approx(1 / (1 + math.exp(-0.5 - 0.8)), abs=1e-5)
    assert chances.odds(1, np.array([[0.9, 0.8, 0.5]], np.float32)) == 0.0


def test_drafting_ends_once_some_open_draft_is_likely_wrong() -> None:
    policy = TrustedDraft(3, LINE, 0.7)
    decided = []
    for drafts, lead in enumerate((3.0, 3.0, 0.1, 3.0)):
        decided.append(int(policy.start(pending(drafts))[0]))
        assert policy.route(0, seen((lead, 0.0)), pending(drafts)).tolist() == [0]
    # The third draft's chance is 0.79, above the threshold; of the fourth, too, nothing is known
    # before it is drafted, and together they are at 0.79 still: it is verified as the eighth.
    assert decided == [0, 0, 0, 0]
    policy.start(pending(0))
    policy.route(0, seen((0.1, 0.0)), pending(0))
    policy.route(0, seen((0.1, 0.0)), pending(1))
    assert policy.start(pending(2)).tolist() == [1]  # 0.79 squared is 0.62


def test_a_cycle_has_a_first_draft_and_a_last() -> None:
    policy = TrustedDraft(3, LINE, 1.0, length=2)
    assert policy.start(pending(0)).tolist() == [0]
    assert TrustedDraft(3, LINE, 0.0, length=2).start(pending(2)).tolist() == [1]


def test_who_follows_trust_may_say_it() -> None:
    policy = TrustedDraft(3, LINE, 0.7)
    rows_NC = np.concatenate([pending(2)] * 3)
    assert policy.start(rows_NC, np.array([0.9, 0.7, 0.1])).tolist() == [0, 1, 1]
    # Without, several rows are held by what of theirs was accepted: 0.8 squared is 0.64.
    shown_NC = np.concatenate([pending(2, 0.9), pending(2, 0.8)])
    assert policy.start(shown_NC).tolist() == [0, 1]
