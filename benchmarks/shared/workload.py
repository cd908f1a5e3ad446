"""What the decoding benchmarks run: models of real shapes, prompts, scripted exits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from offramp.controller.features import BoolArray, FloatArray
from offramp.worker.model.loading import load_model, load_tokenizer

PROMPT_TOKENS = 64
EXIT_AT = 1 / 6
"""Depth of the scripted exit, as a share of the layers."""

LLAMA = {"tie_word_embeddings": True, "max_position_embeddings": 8192}
SHAPES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "smollm2-135m": (LlamaConfig, LlamaForCausalLM, {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}),
    "qwen2.5-0.5b": (Qwen2Config, Qwen2ForCausalLM, {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936}),
    "llama-3.2-1b": (LlamaConfig, LlamaForCausalLM, {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}),
}  # fmt: skip


@dataclass
class ScriptedExit:
    """Leaves after one layer with a set probability, whatever the features."""

    exits: tuple[int, ...]
    share: float
    schema: None = None
    candidates_VK: None = None
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def leave(self, features_NF: FloatArray) -> BoolArray:
        return np.asarray(self.rng.random(len(features_NF)) < self.share)


def folder_of(shape: str) -> str | None:
    """Where a shape's trained weights lie: the reference model's, or of a folder named itself."""
    if shape == "reference":
        return "models/reference"
    return None if shape in SHAPES else shape


def build(shape: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    if (folder := folder_of(shape)) is not None:
        return load_model(folder, dtype, device)
    config_class, model_class, values = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):  # drawn where they stay: a billion numbers take a CPU half a minute
        model = model_class(config_class(**values, **LLAMA)).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.set_attn_implementation("sdpa")
    for block in model.model.layers[exit_layer(len(model.model.layers)) :]:
        block.self_attn.o_proj.weight.mul_(0.01)
        block.mlp.down_proj.weight.mul_(0.01)
    return model


def exit_layer(layers: int) -> int:
    # The reference model was trained to exit after 3, 6 and 9 of its 12 layers.
    return 3 if layers == 12 else max(1, round(layers * EXIT_AT))


def prompts_of(model: Any, shape: str, batch: int) -> list[list[int]]:
    """Random tokens; of a trained model, beginnings of source files of this repository."""
    if (folder := folder_of(shape)) is not None:
        tokenizer = load_tokenizer(folder)
        files = [
            path for path in sorted(Path("worker").rglob("*.py")) if path.stat().st_size > 2000
        ]
        return [tokenizer.encode(files[n].read_text())[:PROMPT_TOKENS] for n in range(batch)]
    rng = np.random.default_rng(batch)
    return rng.integers(1, model.config.vocab_size, size=(batch, PROMPT_TOKENS)).tolist()  # type: ignore[no-any-return]
