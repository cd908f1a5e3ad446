"""Drawing tokens. Shape suffix: V vocabulary."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.controller.errors import RequestError
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.sampling import draw, new_generator

LOGITS_V = torch.tensor([0.3, -1.2, 2.5, 0.9, 2.4, -3.0, 1.1])


def draws(count: int, **options: Any) -> list[int]:
    sampling = SamplingParams(**options)
    generator = new_generator(sampling)
    return [draw(LOGITS_V, sampling, generator) for _ in range(count)]


def softmax(logits_V: np.ndarray) -> np.ndarray:
    powers_V = np.exp(logits_V - logits_V.max())
    return np.asarray(powers_V / powers_V.sum())


def nucleus(probabilities_V: np.ndarray, top_p: float) -> set[int]:
    """Token by token: the most likely ones, until they hold top_p."""
    kept: set[int] = set()
    mass = 0.0
    while mass < top_p and len(kept) < len(probabilities_V):
        left = [token for token in range(len(probabilities_V)) if token not in kept]
        best = max(left, key=lambda token: probabilities_V[token])
        kept.add(best)
        mass += float(probabilities_V[best])
    return kept


def test_greedy_takes_the_most_likely_token_and_needs_no_generator() -> None:
    assert new_generator(SamplingParams()) is None
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits_V = torch.randn(100, generator=generator)
        assert draw(logits_V, SamplingParams(), None) == int(np.argmax(logits_V.numpy()))


def test_a_seed_decides_every_draw() -> None:
    first = draws(50, temperature=1.0, seed=7)
    assert first == draws(50, temperature=1.0, seed=7)
    assert first != draws(50, temperature=1.0, seed=8)
    assert draws(50, temperature=1.0) != draws(50, temperature=1.0)


def test_frequencies_follow_the_probabilities() -> None:
    count = 20_000
    for temperature in (0.5, 1.0, 2.0):
        seen = np.bincount(draws(count, temperature=temperature, seed=1), minlength=len(LOGITS_V))
        expected_V = softmax(LOGITS_V.double().numpy() / temperature)
        sigma_V = np.sqrt(count * expected_V * (1 - expected_V))
        assert (np.abs(seen - count * expected_V) <= 4 * sigma_V + 1).all()


@settings(deadline=None, max_examples=60)
@given(
    ranks=st.permutations(range(12)),
    spread=st.floats(0.05, 1.0),
    top_p=st.floats(0.01, 0.999),
    temperature=st.floats(0.2, 3.0),
)
def test_top_p_keeps_exactly_the_nucleus(
    ranks: list[int], spread: float, top_p: float, temperature: float
) -> None:
    logits_V = np.asarray(ranks, np.float64) * spread
    probabilities_V = softmax(logits_V / temperature)
    edges = np.cumsum(np.sort(probabilities_V)[::-1])
    if np.abs(edges - top_p).min() < 1e-5:
        return  # float32 may count the token at the very edge to either side
    kept = nucleus(probabilities_V, top_p)
    expected_V = np.where(np.isin(np.arange(12), list(kept)), probabilities_V, 0.0)

    given_V: list[torch.Tensor] = []

    def multinomial(p: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        given_V.append(p)
        return torch.zeros(1)

    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", multinomial)
        draw(torch.tensor(logits_V, dtype=torch.float32), sampling, new_generator(sampling))
    assert set(np.flatnonzero(given_V[0].numpy())) == kept
    np.testing.assert_allclose(given_V[0].numpy(), expected_V, rtol=1e-4)


def test_nothing_outside_the_nucleus_is_ever_drawn() -> None:
    assert set(draws(3_000, temperature=1.0, top_p=0.7, seed=3)) == {2, 4}


@pytest.mark.parametrize("top_p", [1e-3, 1e-30, 1e-50, 5e-324])
def test_however_small_the_nucleus_holds_the_best_token(top_p: float) -> None:
    assert set(draws(20, temperature=1.0, top_p=top_p, seed=0)) == {2}


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-50, 5e-324])
def test_very_cold_is_greedy(temperature: float) -> None:
    assert set(draws(20, temperature=temperature, seed=0)) == {2}


@pytest.mark.parametrize("temperature", [1e30, 1e50, 1e308])
def test_very_hot_is_uniform(temperature: float) -> None:
    assert set(draws(500, temperature=temperature, seed=0)) == set(range(len(LOGITS_V)))


def test_bfloat16_logits_are_drawn_in_float32() -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=5)
    logits_V = LOGITS_V.bfloat16()
    first = [draw(logits_V, sampling, new_generator(sampling)) for _ in range(3)]
    assert first == [draw(logits_V.float(), sampling, new_generator(sampling))] * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("max_tokens", math.nan),
        ("max_tokens", math.inf),
        ("max_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", math.nan),
        ("seed", 1.5),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{field: value})
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")


def test_the_ends_of_the_ranges_are_allowed() -> None:
    sampling = SamplingParams(max_tokens=1, temperature=0.0, top_p=1.0, seed=2**63 - 1)
    assert sampling.greedy
    assert new_generator(SamplingParams(temperature=1.0, seed=2**63 - 1)) is not None


def test_rows_of_one_batch_draw_from_generators_of_their_own(reference: AdaptiveEngine) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=1.0, seed=11, ignore_eos=True)
    alone = reference.generate("import os\n", sampling)[0].token_ids
    together = reference.generate(["import os\n"] * 3, sampling)
    assert [each.token_ids for each in together] == [alone] * 3
    other = SamplingParams(max_tokens=10, temperature=1.0, seed=12, ignore_eos=True)
    assert reference.generate("import os\n", other)[0].token_ids != alone
