"""Drawing tokens, against Hugging Face's processors and plain loops. Shape suffix: V vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.sampler import Draw, Sampler

LOGITS_V = torch.tensor([0.3, -1.2, 2.5, 0.9, 2.4, -3.0, 1.1])
V = 60
PROMPT = (3, 9, 9, 27, 50)
EMITTED = (4, 9, 4, 4, 33, 59)


def sampler(prompt: Sequence[int] = (), eos: Sequence[int] = (), **options: Any) -> Sampler:
    return Sampler(SamplingParams(**options), prompt, frozenset(eos), V)


def draws(count: int, **options: Any) -> list[int]:
    one = Sampler(SamplingParams(**options), (), frozenset(), len(LOGITS_V))
    return [one.draw(LOGITS_V, ()).token for _ in range(count)]


def distribution(logits_V: Tensor, emitted: Sequence[int] = EMITTED, **options: Any) -> np.ndarray:
    options = {"temperature": 1.0} | options
    one = sampler(PROMPT, **options)
    return one.distribution(logits_V, emitted).double().numpy()


def random_logits(seed: int) -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(seed)) * 3


def softmax(logits_V: np.ndarray) -> np.ndarray:
    powers_V = np.exp(logits_V - logits_V.max())
    return np.asarray(powers_V / powers_V.sum())


def hf_distribution(logits_V: Tensor, *processors: Any) -> np.ndarray:
    """Probabilities after some of Hugging Face's processors, in this order."""
    ids_1T = torch.tensor([[*PROMPT, *EMITTED]])
    scores_1V = logits_V[None].double()
    for processor in processors:
        scores_1V = processor(ids_1T, scores_1V)
    return np.asarray(scores_1V[0].softmax(-1).numpy())


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


def test_plain_greedy_is_one_argmax_of_the_logits_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = sampler()
    assert one.is_plain_greedy
    logits = [random_logits(seed).bfloat16() for seed in range(20)]
    expected = [Draw(int(logits_V.float().argmax())) for logits_V in logits]
    for name in ("float", "to", "clone"):
        monkeypatch.setattr(Tensor, name, lambda *_, **__: pytest.fail("the logits were copied"))
    assert [one.draw(logits_V, ()) for logits_V in logits] == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"logprobs": 0},
        {"min_tokens": 1},
        {"logit_bias": {1: 1.0}},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
    ],
)
def test_what_needs_more_than_an_argmax_is_not_plain(options: dict[str, Any]) -> None:
    assert not sampler(**options).is_plain_greedy


def test_what_truncates_alone_leaves_greedy_plain() -> None:
    assert sampler(top_k=3, top_p=0.5, min_p=0.5, seed=3, stop_token_ids=(4,)).is_plain_greedy


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("penalty", [0.3, 0.9, 1.2, 5.0])
def test_the_repetition_penalty_is_hugging_faces(seed: int, penalty: float) -> None:
    logits_V = random_logits(seed)
    expected = hf_distribution(logits_V, hf.RepetitionPenaltyLogitsProcessor(penalty))
    ours = distribution(logits_V, repetition_penalty=penalty)
    np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, -0.7), (-2.0, 2.0)])
def test_presence_and_frequency_count_the_output_alone(
    seed: int, presence: float, frequency: float
) -> None:
    logits_V = random_logits(seed)
    expected_V = logits_V.double().numpy().copy()
    for token in range(V):
        count = sum(each == token for each in EMITTED)
        expected_V[token] -= count * frequency + (presence if count else 0.0)
    ours = distribution(logits_V, presence_penalty=presence, frequency_penalty=frequency)
    np.testing.assert_allclose(ours, softmax(expected_V), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_bias_is_added(seed: int) -> None:
    logits_V = random_logits(seed)
    bias = {(3,): 2.5, (7,): -100.0, (59,): 0.5}
    processor = hf.SequenceBiasLogitsProcessor([[list(key), value] for key, value in bias.items()])
    ours = distribution(logits_V, logit_bias={key[0]: value for key, value in bias.items()})
    np.testing.assert_allclose(ours, hf_distribution(logits_V, processor), rtol=2e-5, atol=1e-9)


def test_min_tokens_holds_off_every_token_that_ends() -> None:
    logits_V = random_logits(0)
    one = sampler(eos=(1, 2), temperature=1.0, min_tokens=3, stop_token_ids=(5,))
    for emitted in ((), (8,), (8, 8)):
        probabilities_V = one.distribution(logits_V, emitted)
        assert probabilities_V[[1, 2, 5]].tolist() == [0, 0, 0]
        assert (probabilities_V > 0).sum() == V - 3
    assert (one.distribution(logits_V, (8, 8, 8)) > 0).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("options", "processors"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 7}, [hf.TopKLogitsWarper(7)]),
        ({"top_k": 1000}, []),
        ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
        ({"min_p": 0.08}, [hf.MinPLogitsWarper(0.08)]),
        (
            {"temperature": 1.7, "min_p": 0.02, "top_k": 9, "top_p": 0.75},
            [
                hf.TemperatureLogitsWarper(1.7),
                hf.MinPLogitsWarper(0.02),
                hf.TopKLogitsWarper(9),
                hf.TopPLogitsWarper(0.75),
            ],
        ),
        (
            {"logit_bias": {4: 3.0}, "repetition_penalty": 1.3, "temperature": 0.5, "top_k": 20},
            [
                hf.SequenceBiasLogitsProcessor([[[4], 3.0]]),
                hf.RepetitionPenaltyLogitsProcessor(1.3),
                hf.TemperatureLogitsWarper(0.5),
                hf.TopKLogitsWarper(20),
            ],
        ),
    ],
)
def test_distributions_are_those_of_hugging_faces_processors(
    seed: int, options: dict[str, Any], processors: list[Any]
) -> None:
    logits_V = random_logits(seed)
    ours = distribution(logits_V, **options)
    np.testing.assert_allclose(ours, hf_distribution(logits_V, *processors), rtol=3e-5, atol=1e-9)


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
    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=0)
    one = Sampler(sampling, (), frozenset(), 12)
    given_V = one.distribution(torch.tensor(logits_V, dtype=torch.float32), ()).numpy()
    assert set(np.flatnonzero(given_V)) == kept
    np.testing.assert_allclose(given_V, expected_V / expected_V.sum(), rtol=1e-4)


@example(seed=0, emitted=[], options={"temperature": 1e300, "min_tokens": 1})
@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 1000),
    emitted=st.lists(st.integers(0, V - 1), max_size=8),
    options=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.0, 0.1, 1.0, 5.0, 1e-300, 1e300]),
            "top_k": st.integers(0, V + 3),
            "top_p": st.floats(0, 1, exclude_min=True),
            "min_p": st.floats(0, 1),
            "min_tokens": st.integers(0, 8),
            "repetition_penalty": st.floats(0.01, 100),
            "presence_penalty": st.floats(-2, 2),
            "frequency_penalty": st.floats(-2, 2),
            "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=4),
        },
    ),
)
def test_whatever_is_asked_for_it_is_a_distribution_and_a_pure_function(
    seed: int, emitted: list[int], options: dict[str, Any]
) -> None:
    logits_V = random_logits(seed) * 10
    before_V = logits_V.clone()
    one = sampler(PROMPT, eos=(0,), seed=1, **options)
    first_V = one.distribution(logits_V, emitted)
    assert first_V.dtype is torch.float32
    assert first_V.sum().item() == pytest.approx(1, abs=1e-5)
    assert (first_V >= 0).all()
    drawn = one.draw(logits_V, emitted).token
    assert first_V[drawn] > 0
    one.draw(logits_V, [*emitted, drawn])  # what is emitted later, or taken back, changes nothing
    assert torch.equal(one.distribution(logits_V, emitted), first_V)
    assert torch.equal(logits_V, before_V)


def test_greedy_draws_the_best_after_every_processor() -> None:
    options: dict[str, Any] = {"repetition_penalty": 1.5, "logit_bias": {2: 1.0}}
    for seed in range(20):
        logits_V = random_logits(seed)
        one_hot_V = sampler(PROMPT, **options).distribution(logits_V, EMITTED)
        best = int(distribution(logits_V, **options).argmax())
        assert one_hot_V.nonzero().tolist() == [[best]]
        assert sampler(PROMPT, **options).draw(logits_V, EMITTED).token == best
        assert sampler(PROMPT, **options).draft(logits_V, EMITTED) == best


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square, at a level of 1 in 1000 for one fixed seed."""
    options: dict[str, Any] = {
        "temperature": 1.4,
        "top_k": 12,
        "top_p": 0.97,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 2.0},
    }
    one = sampler(PROMPT, seed=5, **options)
    logits_V = random_logits(8)
    expected_V = one.distribution(logits_V, EMITTED).double().numpy()
    count = 20_000
    tokens = [one.draw(logits_V, EMITTED).token for _ in range(count)]
    seen_V = np.bincount(tokens, minlength=V)
    possible = expected_V > 0
    assert seen_V[~possible].sum() == 0
    assert possible.sum() >= 6
    expected = count * expected_V[possible]
    chi_square = ((seen_V[possible] - expected) ** 2 / expected).sum()
    freedom = int(possible.sum()) - 1
    # The 0.999 quantile by Wilson and Hilferty (1931), within 1 % of the exact one.
    share = 2 / (9 * freedom)
    assert chi_square < freedom * (1 - share + 3.09 * math.sqrt(share)) ** 3


def test_a_seed_decides_every_draw() -> None:
    first = draws(50, temperature=1.0, seed=7)
    assert first == draws(50, temperature=1.0, seed=7)
    assert first != draws(50, temperature=1.0, seed=8)
    assert draws(50, temperature=1.0) != draws(50, temperature=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.5},
        {"temperature": 0.7},
        {"temperature": 1e-30},
        {"temperature": 1e30},
        {"temperature": 1.2, "top_p": 0.6, "frequency_penalty": 0.5},
    ],
)
def test_scores_are_largest_where_the_draw_is(options: dict[str, Any]) -> None:
    for seed in range(20):
        drawing = sampler(seed=seed, **options)
        scores_V = drawing.draw_scores(random_logits(seed), EMITTED)
        assert scores_V.isfinite().all()
        assert int(scores_V.argmax()) == drawing.draft(random_logits(seed), EMITTED)
        assert int(scores_V.argmax()) == drawing.draw(random_logits(seed), EMITTED).token


def test_scores_are_in_units_of_logits() -> None:
    """Their leads tell right drafts from wrong ones as those of greedy decoding do."""
    logits_V = random_logits(3)
    warm_V = sampler(seed=0, temperature=0.7).draw_scores(logits_V, ())
    noise_V = torch.empty(len(logits_V)).exponential_(1, generator=torch.Generator().manual_seed(0))
    drawn_V = logits_V - 0.7 * noise_V.log()
    assert torch.allclose(warm_V - warm_V.max(), drawn_V - drawn_V.max(), atol=1e-4)
    greedy_V = sampler(logit_bias={1: 3.0}).draw_scores(logits_V, ())
    assert int((greedy_V - logits_V).argmax()) == 1


def test_nothing_outside_the_nucleus_is_ever_drawn() -> None:
    assert set(draws(3_000, temperature=1.0, top_p=0.7, seed=3)) == {2, 4}


@pytest.mark.parametrize("top_p", [1e-3, 1e-30, 1e-50, 5e-324])
def test_however_small_the_nucleus_holds_the_best_token(top_p: float) -> None:
    assert set(draws(20, temperature=1.0, top_p=top_p, seed=0)) == {2}


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-50, 5e-324])
def test_very_cold_is_greedy(temperature: float) -> None:
    assert set(draws(20, temperature=temperature, seed=0)) == {2}


@pytest.mark.parametrize("temperature", [1e30, 1e50, 1e308, 10**300])
def test_very_hot_is_uniform(temperature: float) -> None:
    assert set(draws(500, temperature=temperature, seed=0)) == set(range(len(LOGITS_V)))


def test_bfloat16_logits_are_drawn_in_float32() -> None:
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 5}
    logits_V = LOGITS_V.bfloat16()
    first = [sampler(**options).draw(logits_V, ()) for _ in range(3)]
    assert first == [sampler(**options).draw(logits_V.float(), ())] * 3


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 3, "seed": 1}])
def test_logprobs_are_of_the_logits_as_they_came(options: dict[str, Any]) -> None:
    logits_V = random_logits(2)
    expected_V = logits_V.double().log_softmax(-1)
    best = expected_V.argsort(descending=True)[:4].tolist()
    biased = {best[0]: -100.0}
    drawn = sampler(logprobs=4, logit_bias=biased, **options).draw(logits_V, ())
    assert drawn.token != best[0]
    assert drawn.logprob == pytest.approx(float(expected_V[drawn.token]), abs=1e-5)
    assert [token for token, _ in drawn.top] == best
    assert [value for _, value in drawn.top] == pytest.approx(expected_V[best].tolist(), abs=1e-5)
    bare = sampler(logprobs=0, **options).draw(logits_V, ())
    assert bare.logprob is not None
    assert bare.top == ()


def test_rows_of_one_batch_draw_from_generators_of_their_own(reference: AdaptiveEngine) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=1.0, seed=11, ignore_eos=True)
    alone = reference.generate("import os\n", sampling)[0].token_ids
    together = reference.generate(["import os\n"] * 3, sampling)
    assert [each.token_ids for each in together] == [alone] * 3
    other = SamplingParams(max_tokens=10, temperature=1.0, seed=12, ignore_eos=True)
    assert reference.generate("import os\n", other)[0].token_ids != alone
