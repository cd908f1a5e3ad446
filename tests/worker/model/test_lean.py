"""A lean layer computes its layer's bits, reads the model's own weights, and knows its limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from offramp.worker import AdaptiveEngine, SamplingParams
from offramp.worker.engine.engine_config import EngineConfig
from offramp.worker.model.attention import decode_window, prefill_window
from offramp.worker.model.families import stack_for
from offramp.worker.model.kv import SlotKV
from offramp.worker.model.lean import LeanLayer, LeanNorm, has_lean_form, lean_norm
from offramp.worker.model.precision import Precision
from offramp.worker.model.prepared import PackedWeight, prepare
from offramp.worker.model.products import can_pack
from support.exactness import hf_greedy
from support.models import make_model

LEAN = ("llama", "llama-mha", "mistral", "qwen2", "qwen3", "smollm3")
PROMPT = [5, 17, 33, 2, 41]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)

pytestmark = pytest.mark.skipif(
    not can_pack(torch.ones(2, 2)), reason="this torch has no packed kernels"
)


def lean_layers(model: Any) -> list[bool]:
    return [isinstance(block, LeanLayer) for block in prepare(stack_for(model)).blocks]


def test_only_layers_of_the_known_form_are_lean(family: str) -> None:
    assert set(lean_layers(make_model(family))) == {family in LEAN}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAN)
@torch.inference_mode()
def test_bits_are_those_of_the_layer(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every product packed, so that all sums are of one order; over a prompt, then rows."""
    monkeypatch.setattr("offramp.worker.model.prepared.rows_up_to", lambda *_: 0)
    model = make_model(name, dtype)
    lean = prepare(stack_for(model))
    monkeypatch.setattr("offramp.worker.model.prepared.has_lean_form", lambda _: False)
    usual = prepare(stack_for(model))
    caches = [SlotKV(stack, 3) for stack in (lean, usual)]
    for rows, tokens, first in ((1, 6, 0), (1, 1, 6), (3, 1, 2)):
        x = torch.randn(rows, tokens, lean.width).to(dtype)
        rotary = lean.rotary(x, torch.arange(first, first + tokens).expand(rows, -1))
        heads = lean.heads_per_key
        if tokens > 1:
            window = prefill_window(0, first, tokens, heads, x)
        else:
            window = decode_window(range(rows), [first] * rows, heads, x)
        for kv in caches:
            kv.open(window)
        for index in range(lean.layers):
            ours = lean.run_layer(index, x, rotary, window, caches[0])
            x = usual.run_layer(index, x, rotary, window, caches[1])
            assert torch.equal(ours, x)
    assert torch.equal(caches[0].keys_LSGCH, caches[1].keys_LSGCH)
    assert torch.equal(caches[0].values_LSGCH, caches[1].values_LSGCH)


def test_quantised_layers_are_lean() -> None:
    config = EngineConfig(precision=Precision(weights="int8"))
    engine = AdaptiveEngine(make_model("llama", torch.bfloat16), config=config)
    assert all(isinstance(block, LeanLayer) for block in engine.stack.blocks)


def test_a_part_that_may_compute_something_else_keeps_its_layer() -> None:
    class OtherMLP(LlamaMLP):  # type: ignore[misc]  # transformers is untyped
        pass

    changed = make_model("llama")
    changed.model.layers[0].mlp.__class__ = OtherMLP
    changed.model.layers[1].mlp.act_fn = nn.GELU()
    changed.model.layers[2].mlp.forward = changed.model.layers[2].mlp.forward
    changed.model.layers[3].self_attn.register_forward_pre_hook(lambda *_: None)
    assert lean_layers(changed) == [False] * 4 + [True]
    mixed = make_model("llama", torch.bfloat16)
    mixed.model.layers[0].input_layernorm.float()
    assert not has_lean_form(mixed.model.layers[0])


@pytest.mark.parametrize("hooked_before", [True, False])
def test_hooks_on_parts_are_called_whenever_they_were_made(hooked_before: bool) -> None:
    model = make_model("llama")
    [expected] = hf_greedy(model, [PROMPT], 12)
    called: list[tuple[int, ...]] = []
    engine = None if hooked_before else AdaptiveEngine.from_pretrained(model)
    hooks = [
        block.mlp.act_fn.register_forward_hook(lambda _, __, out: called.append(out.shape))
        for block in model.model.layers
    ]
    engine = engine or AdaptiveEngine.from_pretrained(model)
    assert engine.generate(PROMPT, GREEDY)[0].token_ids == expected
    assert len(called) == 12 * engine.stack.layers
    for hook in hooks:
        hook.remove()
    assert engine.generate(PROMPT, GREEDY)[0].token_ids == expected
    assert len(called) == 12 * engine.stack.layers


def test_a_layers_own_hook_is_called_once() -> None:
    model = make_model("llama")
    engine = AdaptiveEngine.from_pretrained(model)
    called: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    engine.generate(PROMPT, SamplingParams(max_tokens=2, ignore_eos=True))
    assert called == 2 * list(range(engine.stack.layers))


def test_the_model_is_neither_changed_nor_its_plain_weights_copied() -> None:
    model = make_model("qwen2")
    before = {name: (part.data_ptr(), part.clone()) for name, part in model.state_dict().items()}
    stack = prepare(stack_for(model))
    for name, part in model.state_dict().items():
        assert part.data_ptr() == before[name][0]
        assert torch.equal(part, before[name][1])
    assert model.config._attn_implementation == "sdpa"
    mine = {part.data_ptr() for part in stack.blocks[0].parameters()}
    assert mine == {part.data_ptr() for part in model.model.layers[0].parameters()}
    parts = [
        block.weight for block in model.model.layers[0].mlp.children() if hasattr(block, "weight")
    ]
    assert {each.data_ptr() for each in PackedWeight(*parts[:2])._plain} <= mine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_final_norm_is_the_modules_and_calls_its_hooks(dtype: torch.dtype) -> None:
    model = make_model("llama", dtype)
    module = model.model.norm
    module.weight.data += 0.1 * torch.randn_like(module.weight)
    stack = prepare(stack_for(model))
    assert isinstance(stack.final_norm, LeanNorm)
    x_ND = torch.randn(50, stack.width).to(dtype)
    seen: list[torch.Tensor] = []
    module.register_forward_hook(lambda _module, _given, out: seen.append(out))
    with torch.inference_mode():
        ours, theirs = stack.norm(x_ND), module.forward(x_ND)
    assert len(seen) == 1
    assert torch.equal(seen[0], ours)
    torch.testing.assert_close(
        ours, theirs, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6, atol=0
    )
    assert float((ours == theirs).float().mean()) > 0.99 or dtype is torch.float32
    x_ND.requires_grad_()
    [gradient] = torch.autograd.grad(stack.norm(x_ND).float().square().sum(), x_ND)
    [expected] = torch.autograd.grad(module.forward(x_ND).float().square().sum(), x_ND)
    assert torch.equal(gradient, expected)


def test_a_norm_of_another_kind_or_type_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_model("llama").model.norm
    assert lean_norm(module, torch.bfloat16) is None
    assert lean_norm(nn.LayerNorm(8), torch.float32) is None
    assert lean_norm(module, torch.float32) is not None
    monkeypatch.setattr(module, "forward", lambda x: x)
    assert lean_norm(module, torch.float32) is None
