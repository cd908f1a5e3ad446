"""Load a causal LM and its tokenizer, and tell exactly which one it is."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from offramp.controller.errors import ConfigError, ModelError
from offramp.worker.hf.weight_files import AGAIN, in_one_line, require_weights
from offramp.worker.model.families import adapter_of

SAMPLED_VALUES = 4096
"""Values per tensor that enter a model's fingerprint."""

HUB_S = 5.0
"""Longest wait for the hub's first answer."""


def check_model(path: str | Path) -> None:
    """Refuse a model folder that cannot be served, without loading its weights.

    Raises:
        ModelError: folder missing, not a causal LM, an unsupported architecture, or weights
            that are cut short or are no weights.
    """
    config = load_config(path)
    adapter_of(_architecture(path, config), repr(str(path))).require_servable(config)
    require_weights(path)


def layers_and_vocab(path: str | Path) -> tuple[int, int]:
    """Number of layers and of tokens, read off a model's config.json.

    Raises:
        ModelError: folder missing, or its config.json is unusable.
    """
    config = load_config(path)
    return int(config.num_hidden_layers), int(config.vocab_size)


def load_model(path: str | Path, dtype: torch.dtype, device: str) -> Any:
    """A supported causal LM in evaluation mode.

    Args:
        path: A folder in Hugging Face format, or a model id that the hub client can resolve.
        dtype: Dtype that the weights get.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ModelError: folder missing, not a causal LM, an unsupported architecture, or weights
            that are damaged or incomplete.
        ConfigError: there is no such device.
    """
    require_device(device)
    check_model(path)
    return read_model(AutoModelForCausalLM, path, dtype, device)


def read_model(auto: Any, path: str | Path, dtype: torch.dtype, device: str, **options: Any) -> Any:
    """Read a checked folder's weights into one of transformers' auto classes; see ``load_model``.

    Raises:
        ModelError: weights are damaged or missing.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is left over is of other tasks' heads
    try:
        model, report = auto.from_pretrained(
            path,
            **options,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever the files' contents lead the readers to
        raise ModelError(
            "model", f"{str(path)!r} cannot be loaded: {in_one_line(error)}", AGAIN
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    # Hugging Face fills these with random numbers and only warns.
    misfits = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if misfits:
        raise ModelError(
            "model",
            f"{str(path)!r} lacks {len(misfits)} of the weights of its config.json, or has them "
            f"in another shape, such as {misfits[0]}",
            AGAIN,
        )
    return model.eval().requires_grad_(False).to(device)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing more exact
        raise ModelError(
            "model", f"{str(path)!r} has no readable tokenizer: {in_one_line(error)}", AGAIN
        ) from error


def require_supported(model: Any) -> None:
    """Refuse a ready model object that the engine would not decode exactly.

    Raises:
        ModelError: an unsupported class, attention other than sdpa, training mode, or on a CPU
            another number format than float32 or bfloat16.
    """
    adapter_of(type(model).__name__)
    if model.device.type == "cpu" and model.dtype not in (torch.float32, torch.bfloat16):
        problem = f"has weights of {model.dtype}, which compiled code on a CPU does not read"
        raise ModelError("model", problem, 'Load it with dtype="bfloat16" or dtype="float32"')
    attention = model.config._attn_implementation
    if attention != "sdpa":
        # Without a mask only sdpa is causal by itself.
        raise ModelError(
            "model", f"uses {attention} attention", 'Load it with attn_implementation="sdpa"'
        )
    if model.training:
        raise ModelError("model", "is in training mode, with dropout", "Call model.eval() first")


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


def require_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ConfigError: naming it.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError("device", f"{device!r} is unknown", "Use cpu or cuda")
    _, _, index = device.partition(":")
    if device != "cpu" and int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError("device", f"{device!r} is not there ({found} GPUs found)", "Use cpu")


def model_fingerprint(model: Any) -> str:
    """SHA-256 over every tensor's name, shape and evenly spaced values.

    Values are compared as bfloat16 holds them, so that it is the weights' as they were published,
    whichever dtype they are held in: a float32 and a bfloat16 load of one checkpoint have the same
    fingerprint, whatever its own dtype. Where the dtype matters it is named beside it.
    """
    digest = hashlib.sha256()
    digest.update(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        stride = max(1, tensor.numel() // SAMPLED_VALUES)
        values = tensor.detach().reshape(-1)[::stride].to("cpu", torch.bfloat16).float()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over all that turns text into ids; for a slow tokenizer, over its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return hashlib.sha256(backend.to_str().encode()).hexdigest()
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocab).encode()).hexdigest()


def load_config(path: str | Path) -> Any:
    """A model's configuration.

    Raises:
        ModelError: there is no such folder or hub id, or its config.json is unusable.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            "model", f"{str(path)!r} holds no config.json", "Name a Hugging Face model folder"
        )
    if not folder.is_dir() and not _looks_like_hub_id(str(path)):
        raise ModelError("model", f"there is no folder {str(path)!r}", "Check the path")
    if not folder.is_dir():
        _require_on_hub(str(path))
    try:
        # Were it not said, the terminal would be asked whether to run a folder's own code.
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the classes validate config.json each in their own way
        if folder.is_dir():
            raise ModelError(
                "model", f"{str(path)!r} has an unusable config.json: {in_one_line(error)}", AGAIN
            ) from error
        raise _unknown_to_hub(str(path), error) from error


def _require_on_hub(name: str) -> None:
    """Ask the hub, once, whether it has a model that was never fetched.

    The hub client by itself asks a hub that does not answer again and again for 20 s.
    """
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_S)
    except Exception as error:  # of the hub client, and of the HTTP client beneath it
        raise _unknown_to_hub(name, error) from error


def _unknown_to_hub(name: str, error: Exception) -> ModelError:
    return ModelError(
        "model",
        f"{name!r} is no folder and no model that the hub client can find ({in_one_line(error)})",
        "Check the path",
    )


def _looks_like_hub_id(path: str) -> bool:
    owner, slash, name = path.partition("/")
    local = path.startswith((".", "/", "~")) or owner == "models"
    return bool(owner and slash and name) and "/" not in name and not local


def _architecture(path: str | Path, config: Any) -> str:
    names = getattr(config, "architectures", None) or []
    names = [names] if isinstance(names, str) else names
    causal = [name for name in names if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if not causal:
        raise ModelError(
            "model",
            f"{str(path)!r} is not a causal LM (architectures: {', '.join(names) or 'none'})",
            "Use a model whose architecture ends in ForCausalLM",
        )
    return str(causal[0])
