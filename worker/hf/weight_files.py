"""The files of a model folder that hold its weights: which they are, and whether they are whole."""

from __future__ import annotations

import json
import textwrap
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open

from offramp.controller.errors import ModelError

INDEX = ".index.json"
"""Ending of a file that names weight files."""

WEIGHTS = tuple(
    name + ending for name in ("model.safetensors", "pytorch_model.bin") for ending in ("", INDEX)
)
"""Files that hold or name a folder's weights; Hugging Face reads the first that is there."""

AGAIN = "Download or save the model again"


def require_weights(path: str | Path) -> None:
    """Refuse a folder whose weights are cut short or are no weights, without loading them.

    Raises:
        ModelError: naming the file.
    """
    for file in _weight_files(Path(path)):
        _require_whole(file)


def _weight_files(folder: Path) -> list[Path]:
    """The files that the weights will be read from; none of a model that is no folder."""
    first = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        return []
    if not first.name.endswith(INDEX):
        return [first]
    try:
        named = set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values())
        files = [folder / name for name in sorted(named)]
    except Exception as error:  # JSON may be of any shape
        raise _damaged(first, in_one_line(error)) from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise _damaged(first, f"it names {absent[0]}, which is not there")
    return files


def _require_whole(file: Path) -> None:
    """Refuse a file that holds no weights, as far as can be seen without reading them all."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return
        # weights_only: a model from elsewhere must not run code.
        is_zip = zipfile.is_zipfile(file)
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:  # whose message advises to read it with its code
        problem = "it holds more than tensors, which could run code and is not read"
        raise _damaged(file, problem) from error
    except Exception as error:  # torch's unpickler raises whatever the bytes lead it to
        raise _damaged(file, in_one_line(error)) from error
    if not isinstance(found, dict):
        raise _damaged(file, f"it holds a {type(found).__name__}, not tensors by name")


def _damaged(file: Path, problem: str) -> ModelError:
    return ModelError("model", f"{file.name} in {str(file.parent)!r} is damaged: {problem}", AGAIN)


def in_one_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return textwrap.shorten(text, 200, placeholder=" …") or type(error).__name__
