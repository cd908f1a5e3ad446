"""Writes a Llama or Qwen2 of transformers as a GGUF file for llama.cpp, and reads a Llama back.

Needs the package ``gguf`` (the extra ``peers``), which is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

NATIVE_KINDS = {torch.bfloat16: "BF16", torch.float32: "F32"}
"""The file type that keeps a model's own numbers."""

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What llama.cpp calls the parts of ``model.layers.N``."""

OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(model: Any, path: Path, kind: str) -> int:
    """Write a model's weights, with a vocabulary of stand-ins: prompts are given as token ids.

    Every matrix, the head among them, is of the kind named; norms and biases are float32, as
    llama.cpp wants them.

    Args:
        model: A ``LlamaForCausalLM`` or ``Qwen2ForCausalLM`` without scaled rotary positions.
        path: The file to write.
        kind: ``F32``, ``BF16``, ``Q8_0``, ``Q4_0`` or ``Q4_1``.

    Returns:
        Bytes of weights that one decoding step reads: all but an embedding that is not the head.

    Raises:
        ValueError: a family, or a rotary scaling, that this writer does not know.
    """
    config = model.config
    family = config.model_type
    rope = config.rope_parameters
    if family not in ("llama", "qwen2") or rope.get("rope_type", "default") != "default":
        raise ValueError(f"no GGUF of {family} with rotary {rope}: use a plain Llama or Qwen2")
    import gguf

    writer = gguf.GGUFWriter(path, family)
    _describe(writer, config, float(rope["rope_theta"]))
    of_kind = getattr(gguf.GGMLQuantizationType, kind)
    read = 0
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = named_for_rotary(name, tensor, config).float().numpy()
        raw = of_kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, raw)
        writer.add_tensor(gguf_name(name), data, raw_dtype=raw)
        if name != "model.embed_tokens.weight" or config.tie_word_embeddings:
            read += data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def gguf_name(name: str) -> str:
    """llama.cpp's name of a tensor in ``state_dict()``; KeyError where it has none."""
    if name in OUTER_NAMES:
        return OUTER_NAMES[name]
    _, _, index, rest = name.split(".", 3)
    part, _, what = rest.rpartition(".")
    return f"blk.{index}.{BLOCK_NAMES[part]}.{what}"


def named_for_rotary(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of q and k in the order of llama.cpp's Llama, which turns neighbours, not halves.

    ``convert_hf_to_gguf.py`` of llama.cpp does the same; its Qwen2 turns halves, as transformers.
    """
    heads = _heads_turned(name, config)
    if not heads:
        return tensor
    return tensor.view(heads, 2, -1, tensor[0].numel()).transpose(1, 2).reshape(tensor.shape)


def _heads_turned(name: str, config: Any) -> int:
    if config.model_type != "llama":
        return 0
    if "q_proj" in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if "k_proj" in name else 0


def _describe(writer: Any, config: Any, theta: float) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<t{token}>" for token in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([1] * config.vocab_size)  # 1: an ordinary token


def read_llama(path: Path, dtype: torch.dtype) -> Any:
    """A Llama with tied embeddings, from a GGUF file of any type that ``gguf`` can undo.

    Raises:
        ValueError: the file holds another family.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if "." in name}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{path} holds a {fields['general.architecture']}: give a Llama")
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=True,
    )
    stored: dict[str, NDArray[np.float32]] = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    torch.set_default_dtype(dtype)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = torch.from_numpy(stored[gguf_name(name)].copy())
        heads = _heads_turned(name, config)
        if heads:
            turned = values.view(heads, -1, 2, values[0].numel()).transpose(1, 2)
            values = turned.reshape(values.shape)
        tensor.copy_(values)
    return model
