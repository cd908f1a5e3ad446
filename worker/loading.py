"""Load a causal LM and its tokenizer, and tell exactly which one it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from offramp.controller.errors import ConfigError, ModelError

SUPPORTED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Architectures whose layers the stack adapter drives."""

SAMPLED_VALUES = 4096
"""Values per tensor that enter a model's fingerprint."""


def check_model(path: str | Path) -> None:
    """Refuse a model folder that cannot be served, without loading its weights.

    Raises:
        ModelError: folder missing, not a causal LM, or an unsupported architecture.
    """
    architecture = _architecture(path, _load_config(path))
    if architecture not in SUPPORTED:
        raise ModelError(
            "model",
            f"{str(path)!r} is a {architecture}, which is not supported",
            f"Supported are {', '.join(SUPPORTED)}",
        )


def load_model(path: str | Path, dtype: torch.dtype, device: str) -> Any:
    """A supported causal LM in evaluation mode.

    Args:
        path: A folder in Hugging Face format, or a model id that the hub client can resolve.
        dtype: Of the weights.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ModelError: folder missing, not a causal LM, or an unsupported architecture.
    """
    check_model(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            "model", f"{str(path)!r} cannot be loaded: {_first_line(error)}"
        ) from error
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "model", f"{str(path)!r} has no readable tokenizer: {_first_line(error)}"
        ) from error


def require_supported(model: Any) -> None:
    """Refuse a ready model object whose architecture no adapter drives.

    Raises:
        ModelError: naming the class found and those supported.
    """
    name = type(model).__name__
    if name not in SUPPORTED:
        raise ModelError(
            "model", f"is a {name}, which is not supported", f"Supported are {', '.join(SUPPORTED)}"
        )


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A dtype from its name.

    Raises:
        ConfigError: another name than float32 or bfloat16.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in known:
        raise ConfigError("dtype", f"{dtype!r} is unknown", f"Use {' or '.join(known)}")
    return known[dtype]


def model_fingerprint(model: Any) -> str:
    """SHA-256 over every tensor's name, shape and evenly spaced values.

    A float32 and a bfloat16 load of one bfloat16 checkpoint have the same fingerprint.
    """
    digest = hashlib.sha256()
    digest.update(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        stride = max(1, tensor.numel() // SAMPLED_VALUES)
        values = tensor.detach().reshape(-1)[::stride].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the vocabulary (tokens and ids, added ones included)."""
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()


def _load_config(path: str | Path) -> Any:
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            "model", f"{str(path)!r} holds no config.json", "Name a Hugging Face model folder"
        )
    if not folder.is_dir() and not _looks_like_hub_id(str(path)):
        raise ModelError("model", f"there is no folder {str(path)!r}", "Check the path")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "model",
            f"{str(path)!r} is no readable model folder and no model the hub client can find",
            "Check the path",
        ) from error


def _looks_like_hub_id(path: str) -> bool:
    owner, slash, name = path.partition("/")
    local = path.startswith((".", "/", "~")) or owner == "models"
    return bool(owner and slash and name) and "/" not in name and not local


def _architecture(path: str | Path, config: Any) -> str:
    names = getattr(config, "architectures", None) or []
    causal = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if not causal:
        raise ModelError(
            "model",
            f"{str(path)!r} is not a causal LM (architectures: {', '.join(names) or 'none'})",
            "Use a model whose architecture ends in ForCausalLM",
        )
    return str(causal[0])


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
