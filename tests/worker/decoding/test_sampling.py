"""What a request may ask of its tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest

from offramp.controller.errors import RequestError
from offramp.worker import SamplingParams

COUNTS = ("max_tokens", "min_tokens", "top_k", "n", "logprobs", "seed")
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
NO_NUMBERS: tuple[Any, ...] = (math.nan, math.inf, -math.inf, True, "1", [1], 10**400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in COUNTS for value in (*NO_NUMBERS[:-1], -1, 2.5, 1.0)),
        *((field, value) for field in NUMBERS for value in (*NO_NUMBERS, None)),
        ("max_tokens", 0),
        ("min_tokens", 65),  # more than max_tokens
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1e-300),
        ("repetition_penalty", 100.5),
        ("presence_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("n", 0),
        ("n", 129),
        ("logprobs", 21),
        ("seed", 2**63),
        ("stop", "\n"),
        ("stop", ["\n"]),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", 3),
        ("stop_token_ids", [3]),
        ("stop_token_ids", (True,)),
        ("stop_token_ids", (1.0,)),
        ("logit_bias", [1]),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: -math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: "1"}),
        ("ignore_eos", 1),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{field: value})
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")
    assert refused.value.remedy


def test_the_ends_of_the_ranges_are_allowed() -> None:
    least = SamplingParams(
        max_tokens=1,
        min_tokens=1,
        temperature=0,
        top_p=1,
        min_p=0,
        repetition_penalty=0.01,
        presence_penalty=-2,
        frequency_penalty=-2,
        logit_bias={0: -100},
        seed=2**63 - 1,
        logprobs=0,
    )
    assert least.greedy
    SamplingParams(
        top_p=5e-324,
        min_p=1.0,
        repetition_penalty=100.0,
        presence_penalty=2.0,
        frequency_penalty=2.0,
        logit_bias={0: 100},
        seed=2**63 - 128,
        n=128,
        logprobs=20,
    )


def test_several_samples_have_seeds_of_their_own() -> None:
    several = SamplingParams(temperature=1.0, seed=40, n=3, stop=("x",))
    assert [each.seed for each in several.each()] == [40, 41, 42]
    assert {each.n for each in several.each()} == {1}
    assert {each.stop for each in several.each()} == {("x",)}
    assert [each.seed for each in SamplingParams(n=2).each()] == [None, None]
    one = SamplingParams(seed=3)
    assert one.each() == (one,)


def test_the_last_samples_seed_must_be_one_too() -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(n=2, seed=2**63 - 1)
    assert refused.value.field == "seed"
