"""Which architectures and variants are served, and what the others are told."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from textwrap import indent
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offramp.controller.errors import ModelError
from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.decoding.decoder import Decoder
from offramp.worker.model.families import FAMILIES as ADAPTERS
from offramp.worker.model.families import adapter_of, stack_for
from offramp.worker.model.filling.projector import KVProjector
from offramp.worker.model.loading import check_model
from support.exactness import check_fill, hf_greedy
from support.models import FAMILIES, make_model

PROMPTS = [[5, 17, 33, 2, 41], [7], [60, 3, 60]]
GREEDY = SamplingParams(max_tokens=16)
SMALL = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 5}
WINDOW = "uses sliding-window attention over 16 tokens"

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True}),
    ("mistral", {"sliding_window": 256}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
    ("smollm3", {"attention_bias": True, "no_rope_layers": [0, 0, 0, 0, 0]}),
    ("phi3", {"rope_parameters": None}),
    ("gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1, "attention_bias": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}),
    ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    ("gpt-neox", {"tie_word_embeddings": True, "attention_bias": False}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": 16}, WINDOW),
    ("mistral", {"sliding_window": 16, "layer_types": ["full_attention"] * 5}, WINDOW),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, WINDOW),
    (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 16, "no_rope_layer_interval": 2},
        WINDOW,
    ),
    ("phi3", {"sliding_window": 16}, WINDOW),
    (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 6,
                "long_factor": [2.0] * 6,
            }
        },
        "uses 'longrope' rotary embeddings",
    ),
    (
        "gpt-neox",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
        "uses 'dynamic' rotary embeddings",
    ),
    ("llama", {"quantization_config": {"quant_method": "bitsandbytes"}}, "has quantised weights"),
    ("qwen3", {"layer_types": ["linear_attention"] * 5}, "has 'linear_attention' layers"),
    ("gemma", {"use_bidirectional_attention": True}, "attends in both directions"),
    ("gpt2", {"add_cross_attention": True}, "attends to an encoder"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "asks for upcast attention"),
    ("opt", {"do_layer_norm_before": False}, "normalises after attention"),
    ("opt", {"word_embed_proj_dim": 24}, "projects embeddings of 24 to 48"),
    ("opt", {"_remove_final_layer_norm": True}, "has no final norm"),
]
UNSUPPORTED = {
    "Gemma2ForCausalLM": ("gemma2", "it has soft-capped logits"),
    "BloomForCausalLM": ("bloom", "it has ALiBi position biases"),
    "PhiForCausalLM": ("phi", "it has a head with biases"),
    "StableLmForCausalLM": ("stablelm", "no adapter drives its layers"),
}


def refusal(call: Any) -> str:
    with pytest.raises(ModelError) as refused:
        call()
    assert refused.value.field == "model"
    assert refused.value.remedy
    return str(refused.value)


def test_every_served_architecture_is_tested() -> None:
    assert {model.__name__ for _, model, _ in FAMILIES.values()} == set(ADAPTERS)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_a_variant_is_decoded_as_hugging_face_does(family: str, changes: dict[str, Any]) -> None:
    model = make_model(family, **changes)
    engine = AdaptiveEngine.from_pretrained(model)
    emitted = [completion.token_ids for completion in engine.generate(PROMPTS, GREEDY)]
    assert emitted == hf_greedy(model, PROMPTS, GREEDY.max_tokens)
    check_fill(engine, first_layer=1)


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED)
def test_a_variant_is_refused(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config_class, model_class, extra = FAMILIES[family]
    config = config_class(**{**extra, **SMALL, **changes}, architectures=[model_class.__name__])
    assert message in refusal(lambda: adapter_of(model_class.__name__).require_servable(config))
    config.save_pretrained(tmp_path)
    assert message in refusal(lambda: check_model(tmp_path))


def test_a_refused_variant_is_refused_as_an_object_too() -> None:
    message = refusal(lambda: stack_for(make_model("opt", do_layer_norm_before=False)))
    assert "normalises after attention" in message


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_an_unsupported_family_is_told_what_is_missing(architecture: str, tmp_path: Path) -> None:
    kind, reason = UNSUPPORTED[architecture]
    config = {"model_type": kind, "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(lambda: check_model(tmp_path))
    assert f"is a {architecture}, which is not supported: {reason}" in message
    assert all(name in message for name in ADAPTERS)


def test_an_unsupported_object_is_told_the_same() -> None:
    config = AutoConfig.for_model(
        "gemma2",
        **SMALL,
        vocab_size=8,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=8,
        pad_token_id=0,
    )
    message = refusal(lambda: AdaptiveEngine(AutoModelForCausalLM.from_config(config).eval()))
    assert message.startswith("model: is a Gemma2ForCausalLM, which is not supported: it has soft")


def test_a_config_of_another_model_type_is_read_with_defaults(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["OPTForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_model(tmp_path)  # what is loaded is a Llama, and the engine asks its class again


def test_norms_that_differ_between_layers_are_refused() -> None:
    model = make_model("llama")
    model.model.layers[3].input_layernorm.variance_epsilon = 0.5
    message = refusal(lambda: AdaptiveEngine.from_pretrained(model))
    assert "has input norms whose kind or epsilon differs between layers" in message
    assert "rms (0.5)" in message


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_families_with_learned_positions_have_no_rotary(family: str) -> None:
    stack = stack_for(make_model(family))
    tokens, here, there = torch.tensor([[3]]), torch.tensor([[0]]), torch.tensor([[9]])
    x_BTD = stack.embed(tokens, here)
    assert stack.rotary(x_BTD, here) == ()
    assert not torch.equal(x_BTD, stack.embed(tokens, there))


def test_the_mask_reaches_the_attention_as_it_is(family: str) -> None:
    stack = stack_for(make_model(family))
    seen: list[Any] = []

    class Block(nn.Module):
        def forward(self, x: torch.Tensor, attention_mask: Any, **_: Any) -> torch.Tensor:
            seen.append(attention_mask)
            return x

    stack.blocks[2] = Block()
    mask, x_BTD = object(), torch.zeros(1, 1, stack.width)
    rotary = stack.rotary(x_BTD, torch.tensor([[0]]))
    assert stack.run_layer(2, x_BTD, rotary, mask, None) is x_BTD
    assert seen == [mask]


def test_blocks_and_head_may_be_replaced_and_the_fill_keeps_the_weights(family: str) -> None:
    stack = stack_for(make_model(family))
    before = KVProjector(stack)
    rows = stack.head_rows(torch.tensor([[5]]))
    stack.blocks[:] = [nn.Identity() for _ in stack.blocks]
    stack.head = nn.Identity()
    x_ND = torch.randn(2, stack.width)
    assert torch.equal(stack.logits(x_ND), stack.norm(x_ND))
    assert torch.equal(stack.head_rows(torch.tensor([[5]])), rows)
    assert torch.equal(KVProjector(stack).weight_RD, before.weight_RD)


def test_a_layer_without_rotation_is_filled_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: were all of SmolLM3's layers rotated, the fill would be wrong."""
    engine = AdaptiveEngine.from_pretrained(make_model("smollm3"))
    check_fill(engine, first_layer=1)
    projector = engine.decoder.projector
    assert projector is not None
    monkeypatch.setattr(projector, "rotates_L11", None)
    with pytest.raises(AssertionError):
        check_fill(engine, first_layer=1)


def test_a_forgotten_shift_is_noticed() -> None:
    """Negative control: without the norm's folded bias, a LayerNorm family's fill is wrong."""
    engine = AdaptiveEngine.from_pretrained(make_model("gpt-neox-serial"))
    engine.decoder = Decoder(engine.stack, engine.kv)
    projector = engine.decoder.projector
    assert projector is not None
    projector.bias_R = None
    with pytest.raises(AssertionError):
        check_fill(engine, first_layer=1)


def test_the_guide_shows_the_adapter_as_it_is_and_names_what_is_served() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    assert indent(inspect.getsource(adapter_of("GemmaForCausalLM")), "   ") in guide
    assert [name for name in ADAPTERS if f"`{name}`" not in guide] == []
