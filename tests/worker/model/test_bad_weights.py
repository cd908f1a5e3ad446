"""Damaged or hostile files of a model folder: one typed error that names the file, no code run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.controller.errors import ModelError
from offramp.worker.model.loading import check_model, load_model, load_tokenizer
from support.releases.hostile import Hostile

REFERENCE = Path(__file__).parents[3] / "models" / "reference"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The reference model's folder without its weights."""
    made = tmp_path / "model"
    shutil.copytree(REFERENCE, made, ignore=shutil.ignore_patterns("*.safetensors"))
    return made


def refused_model(call: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as refused:
        call()
    message = str(refused.value)
    assert "\n" not in message
    assert "Download or save the model again" in message
    return message


def load(folder: Path) -> Any:
    return load_model(folder, torch.float32, "cpu")


def test_pickled_code_is_refused_and_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"x": Hostile(mark)}, folder / "pytorch_model.bin")
    for message in (
        refused_model(lambda: check_model(folder)),
        refused_model(lambda: load(folder)),
    ):
        assert "pytorch_model.bin" in message
        assert "could run code" in message
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x02", b"PK\x03\x04", b"{}", b"\x00" * 99])
def test_bytes_that_torch_cannot_read_are_refused(folder: Path, content: bytes) -> None:
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refused_model(lambda: check_model(folder))


def test_a_pickle_cut_short_is_refused(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    torch.save(load_file(REFERENCE / "model.safetensors"), path)
    path.write_bytes(path.read_bytes()[:1_000_000])
    assert "pytorch_model.bin" in refused_model(lambda: check_model(folder))


@pytest.mark.parametrize("found", [torch.ones(3), [torch.ones(3)], 3])
def test_a_file_of_something_else_is_refused(folder: Path, found: Any) -> None:
    torch.save(found, folder / "pytorch_model.bin")
    assert "not tensors by name" in refused_model(lambda: check_model(folder))


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000),
        *('{"weight_map": {"a": "absent.safetensors"}}', '{"weight_map": {"a": ["b"]}}'),
    ],
)
def test_an_unusable_index_is_refused(folder: Path, kind: str, content: str) -> None:
    (folder / f"{kind}.index.json").write_text(content)
    assert f"{kind}.index.json" in refused_model(lambda: check_model(folder))


def test_a_damaged_part_is_named(folder: Path) -> None:
    (folder / "part-1.safetensors").write_bytes(b"garbage" * 9)
    index = {"weight_map": {"lm_head.weight": "part-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "part-1.safetensors" in refused_model(lambda: check_model(folder))


def test_only_the_files_that_are_read_are_looked_at(folder: Path) -> None:
    shutil.copy(REFERENCE / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"abc")
    (folder / "model.safetensors.index.json").write_text("{")
    check_model(folder)


def test_whole_weights_of_every_layout_are_taken(folder: Path) -> None:
    tensors = load_file(REFERENCE / "model.safetensors")
    for modern in (True, False):
        path = folder / "pytorch_model.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=modern)
        assert load(folder).lm_head.weight.shape == (4096, 256)
        path.unlink()
    save_file(tensors, folder / "part-1.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(folder).lm_head.weight.shape == (4096, 256)


def test_a_folders_own_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    own = {"AutoConfig": "own.C", "AutoTokenizer": ["own.T", None]}
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": own}))
    refused_model(lambda: check_model(folder))
    (folder / "tokenizer.json").unlink()
    refused_model(lambda: load_tokenizer(folder))
    assert not mark.exists()
