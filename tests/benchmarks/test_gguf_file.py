from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shared.gguf_file import gguf_name, named_for_rotary, write_gguf
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from offramp.worker.hf.gguf_import import read_gguf

HEADS, KEY_HEADS, WIDTH = 4, 2, 16


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 48, "hidden_size": HEADS * WIDTH, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
        "tie_word_embeddings": True, "max_position_embeddings": 128,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval().requires_grad_(False)


def turned_by_halves(x_HW: Tensor, angles_W2: Tensor) -> Tensor:
    """transformers: dimension i is turned together with i + W/2."""
    both = torch.cat((angles_W2, angles_W2))
    return x_HW * both.cos() + rotate_half(x_HW) * both.sin()  # type: ignore[no-any-return]


def turned_by_neighbours(x_HW: Tensor, angles_W2: Tensor) -> Tensor:
    """llama.cpp's Llama: dimension 2i is turned together with 2i + 1."""
    even, odd = x_HW[:, ::2], x_HW[:, 1::2]
    cos, sin = angles_W2.cos(), angles_W2.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(1)


@pytest.mark.parametrize(("part", "heads"), [("q_proj", HEADS), ("k_proj", KEY_HEADS)])
def test_rows_are_ordered_so_that_llama_cpp_turns_the_same_pairs(part: str, heads: int) -> None:
    config = llama().config
    angles_W2 = torch.linspace(0.1, 2.0, WIDTH // 2)
    weight = torch.randn(heads * WIDTH, 7)
    x = torch.randn(7)
    name = f"model.layers.0.self_attn.{part}.weight"
    expected = turned_by_halves((weight @ x).view(heads, WIDTH), angles_W2)
    ordered = named_for_rotary(name, weight, config)
    found = turned_by_neighbours((ordered @ x).view(heads, WIDTH), angles_W2)
    back = named_for_rotary(name, expected.flatten()[:, None], config)
    torch.testing.assert_close(found.flatten(), back[:, 0])
    # The rows as transformers has them would be turned in other pairs.
    assert not torch.allclose(
        turned_by_neighbours((weight @ x).view(heads, WIDTH), angles_W2), found
    )


def test_qwen2_keeps_its_rows() -> None:
    config = SimpleNamespace(model_type="qwen2", num_attention_heads=HEADS)
    weight = torch.randn(HEADS * WIDTH, 7)
    assert named_for_rotary("model.layers.0.self_attn.q_proj.weight", weight, config) is weight


def test_every_tensor_has_a_name_in_llama_cpp() -> None:
    names = [gguf_name(name) for name in llama(attention_bias=True).state_dict()]
    assert len(set(names)) == len(names)
    assert {"token_embd.weight", "output.weight", "blk.1.attn_q.bias"} <= set(names)
    assert all(re.fullmatch(r"(blk\.\d+\.)?\w+\.(weight|bias)", name) for name in names)


def test_other_families_are_refused(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))
    model.config.rope_parameters = {}
    with pytest.raises(ValueError, match="use a plain Llama or Qwen2"):
        write_gguf(model, tmp_path / "model.gguf", "F32")


def test_scaled_rotary_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="linear"):
        write_gguf(model, tmp_path / "model.gguf", "F32")


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_tensors_are_read_back(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[peers]"')
    model = llama()
    read = write_gguf(model, tmp_path / "model.gguf", kind)
    bits = {"F32": 32.0, "Q8_0": 8.5}[kind]
    matrices = sum(each.numel() for each in model.parameters() if each.dim() == 2)
    assert read == matrices * bits / 8 + 4 * sum(
        each.numel() for each in model.parameters() if each.dim() == 1
    )
    found = read_gguf(tmp_path / "model.gguf", torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        step = 0.0 if kind == "F32" or tensor.dim() == 1 else float(tensor.abs().max()) / 127
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=step)
