"""Small random models of each family, and where the reference model lies."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from offramp.worker.model.adapter_layers import AdapterLayers, fresh_layer
from offramp.worker.model.families import stack_for
from offramp.worker.model.loading import model_fingerprint

DEVICE = torch.device(os.environ.get("OFFRAMP_TEST_DEVICE", "cpu"))
"""Where the models of the exactness tests lie; benchmarks/gpu/gpu.sh runs those with cuda."""

REFERENCE = Path(__file__).parents[2] / "models" / "reference"
LAYERS = 5
VOCAB = 97

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Degenerate random models hide cache bugs: with small weights every position looks alike.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": 0,
}
HALF_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# A random model whose head is its embedding mostly repeats its input.
UNTIED = {"tie_word_embeddings": False}
# Without a gated MLP, small weights leave the same few tokens.
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    # Layers 2 and 4 of 5 without rotation, so that both kinds are skipped and filled.
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"no_rope_layer_interval": 2, **UNTIED}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"rope_parameters": HALF_ROTARY}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 16, **UNTIED}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"initializer_range": 0.4}),
    "opt": (OPTConfig, OPTForCausalLM, {"ffn_dim": 96, "initializer_range": 0.4}),
    "gpt-neox": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {"initializer_range": 0.4, "rope_parameters": HALF_ROTARY},
    ),
    "gpt-neox-serial": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {"initializer_range": 0.4, "use_parallel_residual": False, "attention_bias": False},
    ),
}


# In bfloat16 two tokens can tie, and which one wins then depends on the shape of a product. Of 40
# seeds, these leave the widest gap between the two best tokens in the tests' own full-depth
# decoding: 1.1 to 2.4 % of the logits' deviation, where seed 0 has exact ties.
CLEAR_SEEDS = {
    "llama": 25,
    "llama-mha": 6,
    "mistral": 25,
    "qwen2": 30,
    "qwen3": 27,
    # Of 60 seeds: the gap here is the narrower of those in bfloat16 and in float32 along the same
    # tokens, 0.6 to 2.1 %.
    "smollm3": 40,
    "phi3": 0,
    "gemma": 35,
    "gpt2": 36,
    "opt": 49,
    "gpt-neox": 49,
    "gpt-neox-serial": 2,
}


def make_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small random model of a family, its configuration changed where asked."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(CLEAR_SEEDS[family] if dtype is torch.bfloat16 else 0)
    model = model_class(config_class(**{**SHAPE, **extra, **changes}))
    # Biases and norms start at 0 and 1; random ones make a forgotten fold visible.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in name or ".ln_" in name:
                # Gemma's norms multiply by 1 + weight.
                low = -0.5 if family == "gemma" else 0.5
                parameter.uniform_(low, low + 1.0)
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


def truncated(model: Any, layers: int) -> Any:
    """The same weights, with only the first layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    short = type(model)(config)
    short.load_state_dict(model.state_dict(), strict=False)
    return short.to(model.device, model.dtype).eval()


def save_adapters(family: str, folder: Path, exits: Sequence[int], seed: int = 3) -> Path:
    """Write an adapter layer behind each exit of ``make_model(family)``, unlike its own layers."""
    model = make_model(family)
    stack = stack_for(model)
    torch.manual_seed(seed)
    blocks = {layer: fresh_layer(stack) for layer in exits}
    for block in blocks.values():
        for parameter in block.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    AdapterLayers(stack, blocks).save(folder, {"model": model_fingerprint(model)})
    return folder
