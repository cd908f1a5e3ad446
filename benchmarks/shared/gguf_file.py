"""Writes a Llama or Qwen2 of transformers as a GGUF file for llama.cpp.

Needs the package ``gguf`` (the extra ``peers``), which is imported where it is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
    if config.model_type != "llama" or not ("q_proj" in name or "k_proj" in name):
        return tensor
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    return tensor.view(heads, 2, -1, tensor[0].numel()).transpose(1, 2).reshape(tensor.shape)


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
