"""Quantised weights: the kernels compute what the kept numbers stand for, and nothing else changes.

The truth is a model of the same family whose matrices hold the restored values.

Shape suffixes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from offramp.controller.errors import ConfigError
from offramp.controller.policies.protocols import FixedExit, NeverExit
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.kernels.rounding import rounded_rows
from offramp.worker.model.precision import Precision
from offramp.worker.model.products import SIZES
from offramp.worker.model.quantised import Int4Weight, Int8Weight, QuantisedLinear
from support.models import FAMILIES, make_model, truncated

PROMPTS = [[5, 17, 33, 2, 41], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19], [60, 3, 60]]
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
INT8 = Precision(weights="int8")
INT4 = Precision(weights="int4")
ROUNDED = Precision(weights="int4", activations="int8")
LISTED = Precision.for_drafts("int4")
TIE = 0.2
"""Two tokens whose logits differ by less, in deviations, can change places by rounding: the kernels
multiply with the restored values before these are rounded to bfloat16."""
WIDE = {"hidden_size": 64}
"""The smallest width that groups of 32 divide, and whose heads have 16 columns."""


@pytest.fixture(autouse=True)
def all_rows_go_to_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a machine's load would choose, between two ways whose roundings differ."""
    monkeypatch.setattr("offramp.worker.model.quantised.rows_up_to", lambda *_, **__: SIZES[-1])


def dtype_for(precision: Precision) -> torch.dtype:
    """In bfloat16 the last bit of a sum would move rounded rows by whole numbers."""
    return torch.float32 if precision.activations == "int8" else torch.bfloat16


def weight_of(outputs: int = 48, inputs: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(outputs, inputs, generator=generator).mul(0.3).to(torch.bfloat16)


def kept(precision: Precision, weight_OI: torch.Tensor) -> Int8Weight | Int4Weight:
    if precision.weights == "int8":
        return Int8Weight(weight_OI)
    rounds = precision.activations == "int8"
    return Int4Weight(weight_OI, precision.group_size, rounds=rounds)


def engine_of(model: Any, precision: Precision, **settings: Any) -> AdaptiveEngine:
    return AdaptiveEngine(model, slots=4, config=EngineConfig(precision=precision, **settings))


def restored(model: Any, precision: Precision) -> Any:
    """A copy of a model whose layers' and head's matrices are what the kept numbers stand for."""
    twin = copy.deepcopy(model)
    embedded = twin.get_input_embeddings().weight.data.clone()
    for name, module in twin.named_modules():
        if type(module) not in (nn.Linear, Conv1D):
            continue
        weights = precision.head_weights if name == "lm_head" else precision.weights
        if weights == "shortlist":
            continue
        turned = type(module) is Conv1D
        weight = module.weight.detach().T.contiguous() if turned else module.weight.detach()
        value = kept(Precision(weights=weights, group_size=precision.group_size), weight).restored()
        module.weight = nn.Parameter(value.T.contiguous() if turned else value, False)
    twin.get_input_embeddings().weight = nn.Parameter(embedded, False)
    twin.config.tie_word_embeddings = False  # or a shorter copy's embeddings would be the head's
    return rounding(twin, precision)


def rounding(model: Any, precision: Precision) -> Any:
    """The model, whose int4 matrices of layers take rounded rows if the precision says so."""
    for name, module in model.named_modules():
        is_matrix = type(module) in (nn.Linear, Conv1D) and name != "lm_head"
        if is_matrix and precision.activations == "int8":
            module.register_forward_pre_hook(lambda _, given: (rounded_rows(given[0]),))
    return model


@torch.inference_mode()
def require_best(truth: Any, rows: list[tuple[list[int], list[int]]]) -> None:
    """Each emitted token is what the truth says after those before it, or ties with that."""
    gaps: list[float] = []
    for prompt, emitted in rows:
        logits_TV = truth(torch.tensor([prompt + emitted[:-1]])).logits[0, len(prompt) - 1 :]
        chosen_T = logits_TV.gather(1, torch.tensor(emitted)[:, None])[:, 0]
        gaps += ((logits_TV.amax(1) - chosen_T) / logits_TV.std(1)).tolist()
    assert max(gaps) < TIE
    assert sum(gap == 0 for gap in gaps) > 0.9 * len(gaps)


def test_the_check_tells_native_weights_from_quantised_ones() -> None:
    model = make_model("llama", torch.bfloat16, **WIDE)
    native = AdaptiveEngine(model).generate(PROMPTS, GREEDY)
    rows = [(prompt, each.token_ids) for prompt, each in zip(PROMPTS, native, strict=True)]
    require_best(model, rows)
    with pytest.raises(AssertionError):
        require_best(restored(model, INT4), rows)


@pytest.mark.parametrize("precision", [INT8, INT4, Precision(weights="int4", group_size=64)])
def test_restored_values_are_near_and_stay_when_quantised_again(precision: Precision) -> None:
    weight_OI = weight_of(inputs=128)
    once = kept(precision, weight_OI).restored()
    steps = 2 * 127 if precision.weights == "int8" else 15
    span = float(weight_OI.float().amax() - weight_OI.float().amin())
    assert float((once - weight_OI).abs().max()) < 1.5 * span / steps
    assert not torch.equal(once, weight_OI)
    if precision.weights == "int8":
        torch.testing.assert_close(kept(precision, once).restored(), once, rtol=0.01, atol=0)


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("precision", [INT8, INT4, ROUNDED])
def test_both_ways_of_multiplying_agree(precision: Precision, rows: int) -> None:
    linear = nn.Linear(96, 48, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(weight_of(), False)
    quantised = QuantisedLinear(linear, kept(precision, weight_of()))
    x = torch.randn(rows, 96).to(torch.bfloat16)
    taken = rounded_rows(x) if precision is ROUNDED else x
    truth = nn.functional.linear(taken.float(), quantised.weight.float(), linear.bias.float())
    for kernel_rows in (0, 1000):
        quantised.kernel_rows = kernel_rows
        torch.testing.assert_close(quantised(x).float(), truth, rtol=0.02, atol=0.02)


def test_fitted_groups_lose_less_than_their_ranges_alone() -> None:
    weight_OI = weight_of(64, 256).float()
    groups = weight_OI.view(64, -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    plain = ((groups - low) / scale).round() * scale + low
    fitted = Int4Weight(weight_OI.to(torch.bfloat16), 32).restored().float()
    assert (fitted - weight_OI).square().mean() < (
        plain.view_as(fitted) - weight_OI
    ).square().mean()


@pytest.mark.parametrize("precision", [INT8, INT4, ROUNDED, LISTED])
def test_tokens_are_those_of_the_restored_model(family: str, precision: Precision) -> None:
    model = make_model(family, dtype_for(precision), **WIDE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    truth = restored(model, precision)
    engine = engine_of(model, precision)
    alone = [engine.generate(prompt, GREEDY)[0].token_ids for prompt in PROMPTS]
    together = [c.token_ids for c in engine.generate(PROMPTS, GREEDY, NeverExit())]
    for rows in (alone, together):
        require_best(truth, list(zip(PROMPTS, rows, strict=True)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "precision"),
    # ROUNDED's weights, and so what is filled in, are INT4's.
    [(family, precision) for family in FAMILIES for precision in (INT8, ROUNDED)]
    + [("llama", INT4), ("gpt2", INT4)],
)
def test_exits_and_their_filled_entries_are_those_of_the_restored_model(
    family: str, precision: Precision
) -> None:
    model = make_model(family, dtype_for(precision), **WIDE)
    engine, truth = engine_of(model, precision), restored(model, precision)
    for layer in (2, 4):
        # One row alone, for which other kernels multiply, and the others as a batch.
        parts = (PROMPTS[:1], PROMPTS[1:])
        done = [row for part in parts for row in engine.generate(part, GREEDY, FixedExit(layer))]
        assert all(set(each.exit_layers[1:]) == {layer} for each in done)
        # The first token comes from the prompt's pass at full depth.
        continued = [
            (prompt + each.token_ids[:1], each.token_ids[1:])
            for prompt, each in zip(PROMPTS, done, strict=True)
        ]
        require_best(rounding(truncated(truth, layer), precision), continued)
    filled, real = engine.decoder.projector, AdaptiveEngine(truth).decoder.projector
    assert filled is not None
    assert real is not None
    torch.testing.assert_close(filled.weight_RD, real.weight_RD)


def test_a_quantised_model_is_another_model() -> None:
    model = make_model("llama", torch.bfloat16, **WIDE)
    prints = [
        engine_of(model, precision).model_fingerprint
        for precision in (
            Precision(),
            INT8,
            INT4,
            ROUNDED,
            LISTED,
            Precision(weights="int8", head="native"),
        )
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == AdaptiveEngine(model).model_fingerprint


@pytest.mark.parametrize(
    ("settings", "field", "remedy"),
    [
        ({"weights": "fp4"}, "weights", "native, int8, int4"),
        ({"weights": "int8", "head": "int2"}, "head_weights", "native, int8, int4"),
        ({"weights": "int4", "group_size": 48}, "group_size", "32, 64, 128, 256"),
        ({"weights": "shortlist"}, "weights", "native, int8, int4"),
        ({"weights": "int4", "activations": "fp8"}, "activations", "native or int8"),
        ({"weights": "int8", "activations": "int8"}, "activations", "int4/int8"),
        (
            {"weights": "int4", "activations": "int8", "group_size": 64},
            "activations",
            "group_size=32",
        ),
    ],
)
def test_an_unknown_precision_is_refused(settings: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Precision(**settings)
    assert refusal.value.field == field
    assert remedy in str(refusal.value)


@pytest.mark.parametrize("text", ["", "int4:", "int4:x", "int4,", "int4:64:64", "int4:48", "int4/"])
def test_a_precision_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"int4|group_size|weights"):
        Precision.parse(text)


def test_a_precision_is_read_as_commands_take_it() -> None:
    assert Precision.parse("native").is_native
    assert Precision.parse("int8") == INT8
    assert Precision.parse("int4/int8") == ROUNDED
    assert Precision.parse("int4", for_drafts=True) == LISTED
    assert Precision.parse("int4,int8", for_drafts=True) == Precision(weights="int4", head="int8")
    assert Precision.parse("int4:64,native") == Precision(
        weights="int4", group_size=64, head="native"
    )


@pytest.mark.parametrize(
    ("precision", "dtype", "field", "remedy"),
    [(Precision(weights="int4", group_size=64), torch.bfloat16, "group_size", "Use 32")],
)
def test_what_a_model_cannot_have_is_refused(
    precision: Precision, dtype: torch.dtype, field: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        engine_of(make_model("llama", dtype, **WIDE), precision)
    assert refusal.value.field == field
    assert remedy in str(refusal.value)
