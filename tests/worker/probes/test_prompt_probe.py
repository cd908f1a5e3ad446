"""PROMPT_V1 against plain loops over the hidden states of a real chunk, and its rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from offramp.controller.errors import RequestError
from offramp.controller.features import PROMPT_V1, STATE_V1, FloatArray, schema_of
from offramp.controller.policies.rules.prompt_rules import RandomShare, WindowedExit
from offramp.worker.probes.prompt_probe import PromptProbe

PROMPT = [7, 3, 7, 3, 9, 7, 3, 9, 4]
FIRST, LAYERS, WIDTH = 2, 6, 16


def states(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(PROMPT) - FIRST, WIDTH, generator=generator)


def column(features_NF: FloatArray, name: str) -> FloatArray:
    return features_NF[:, PROMPT_V1.index(name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_column_is_what_a_loop_over_the_tokens_says(dtype: torch.dtype) -> None:
    start_TD, third_TD, fifth_TD = (states(seed).to(dtype) for seed in range(3))
    probe = PromptProbe(start_TD.clone(), PROMPT, FIRST, LAYERS)
    probe.features(3, given := third_TD.clone())
    given.zero_()  # as a layer may, that writes in place
    stay_T = np.array([True, False, True, True, False, True, True])
    probe.keep(stay_T)
    found_NF = probe.features(5, fifth_TD[torch.from_numpy(stay_T)])
    assert found_NF.dtype == np.float32
    for row, place in zip(found_NF, np.flatnonzero(stay_T), strict=True):
        h, last = (each[place].double().tolist() for each in (fifth_TD, third_TD))
        norm, before = math.hypot(*h), math.hypot(*last)
        position = FIRST + int(place)
        earlier = PROMPT[:position]
        pairs = list(zip(PROMPT, earlier[1:], strict=False))
        rms = norm / math.sqrt(WIDTH)
        expected = [
            sum(map(float.__mul__, h, last)) / norm / before,
            math.log(norm / before),
            math.dist(h, last) / norm,
            math.log(rms),
            math.log(max(map(abs, h)) / rms),
            PROMPT[position] in earlier,
            (PROMPT[position - 1], PROMPT[position]) in pairs,
            position / 256,
            (len(PROMPT) - 1 - position) / 256,
            5 / 6,
        ]
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)
    assert column(found_NF, "seen").tolist() == [1, 0, 1, 1, 0]
    assert column(found_NF, "pair_seen").tolist() == [0, 0, 0, 1, 0]


def test_a_token_whose_state_is_zero_has_features_too() -> None:
    """As a padding token at a prompt's beginning, whose embedding is 0."""
    third_TD = states(1)
    third_TD[0] = 0
    found_NF = PromptProbe(third_TD.clone(), PROMPT, FIRST, LAYERS).features(3, third_TD)
    assert np.isfinite(found_NF).all()
    assert column(found_NF, "cosine").tolist() == pytest.approx([0, *[1] * 6])


def prompt_of(tokens: int, depth: float = 0.5) -> FloatArray:
    features_NF = np.zeros((tokens, PROMPT_V1.width), np.float32)
    column(features_NF, "place")[:] = np.arange(tokens) / 256
    column(features_NF, "depth")[:] = depth
    return features_NF


def test_every_second_window_leaves_however_the_prompt_is_cut() -> None:
    policy, features_NF = WindowedExit(exits=(3,), window=3), prompt_of(1000)
    leave_N = policy.leave(features_NF)
    assert leave_N.tolist() == [place // 3 % 2 == 1 for place in range(1000)]
    assert policy.leave(features_NF[7:300]).tolist() == leave_N[7:300].tolist()


def test_a_random_share_is_that_share_and_the_same_tokens_again() -> None:
    features_NF = prompt_of(4000)
    leave_N = RandomShare(exits=(3, 6), share=0.3).leave(features_NF)
    assert abs(leave_N.mean() - 0.3) < 0.03
    again_N = RandomShare(exits=(3, 6), share=0.3).leave(features_NF[11:])
    assert again_N.tolist() == leave_N[11:].tolist()
    for other in (
        RandomShare(exits=(3, 6), share=0.3, seed=1).leave(features_NF),
        RandomShare(exits=(3, 6), share=0.3).leave(prompt_of(4000, depth=0.75)),
    ):
        assert abs((other & leave_N).mean() - 0.09) < 0.02  # drawn apart
    for share, expected in ((0.0, False), (1.0, True)):
        assert (RandomShare(exits=(3,), share=share).leave(features_NF) == expected).all()


def test_rules_for_prompts_refuse_what_makes_none() -> None:
    for make, field in (
        (lambda: WindowedExit(exits=(3,), window=0), "window"),
        (lambda: WindowedExit(exits=(3, 6), window=8), "exits"),
        (lambda: RandomShare(exits=(3,), share=1.5), "share"),
        (lambda: RandomShare(exits=(3,), share=0.5, seed=-1), "seed"),
        (lambda: RandomShare(exits=(3,), share=0.5, schema=STATE_V1), "schema"),
    ):
        with pytest.raises(RequestError) as refused:
            make()
        assert refused.value.field == field


def test_bundles_may_name_the_schema_of_prompts() -> None:
    assert schema_of(PROMPT_V1.digest, PROMPT_V1.width) is PROMPT_V1
