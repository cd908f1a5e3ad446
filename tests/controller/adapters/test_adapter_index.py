"""The index of adapters: what a folder holds, cut into parts, and every folder that is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS
from offramp.controller.adapters.adapter_index import (
    PART_BYTES,
    AdapterIndex,
    AdapterSource,
    require_model,
)
from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.policies.kinds import digest_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = b"w" * PART_BYTES + b"rest"
    facts = {"format": 1, "kind": "layer", "model": "aa", "exits": [2, 4], "report": {}}
    (tmp_path / WEIGHTS).write_bytes(weights)
    facts["digest"] = hashlib.sha256(weights).hexdigest()
    (tmp_path / DESCRIPTION).write_text(json.dumps(facts))
    return tmp_path


def test_the_parts_are_the_file(folder: Path) -> None:
    source = AdapterSource.open(folder)
    *parts, raw = source.blobs()
    assert [len(part) for part in parts] == [PART_BYTES, 4]
    assert [digest_of(part) for part in parts] == list(source.index.parts)
    assert b"".join(parts) == (folder / WEIGHTS).read_bytes()
    assert AdapterIndex.from_bytes(raw) == source.index
    assert digest_of(raw) == source.index.name
    facts = json.loads((folder / DESCRIPTION).read_text())
    assert source.index.description.items() <= facts.items()


def rewrite(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / DESCRIPTION).read_text())
    (folder / DESCRIPTION).write_text(json.dumps(facts | changes))


def test_heads_travel_only_if_their_weights_say_of_which_classes_they_are(folder: Path) -> None:
    """The description stays behind."""
    rewrite(folder, kind="classify")
    with pytest.raises(ConfigError, match=r"heads: .* is unreadable"):
        AdapterSource.open(folder)
    for metadata in ({"heads": "{}"}, None):
        weights = save({"2.weight": np.zeros(3, np.float32)}, metadata)
        (folder / WEIGHTS).write_bytes(weights)
        rewrite(folder, digest=hashlib.sha256(weights).hexdigest())
        if metadata:
            assert AdapterSource.open(folder).index.kind == "classify"
        else:
            with pytest.raises(ConfigError, match="was fitted before heads could be sent"):
                AdapterSource.open(folder)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (lambda folder: (folder / DESCRIPTION).unlink(), "holds no readable tune"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no readable translators"),
    "other weights": (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "is not the file"),
    "another format": (lambda folder: rewrite(folder, format=2), "has format 2, not 1"),
    "no exits": (lambda folder: rewrite(folder, exits=None), "'exits' must be a list"),
    "no model": (lambda folder: rewrite(folder, model=None), "'model' must be"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_unusable_folder_is_refused_by_name(folder: Path, name: str) -> None:
    spoil, said = FOLDERS[name]
    spoil(folder)
    with pytest.raises(ConfigError, match=said) as caught:
        AdapterSource.open(folder)
    assert caught.value.field == "translators"
    assert caught.value.remedy


def test_the_limit_names_the_setting(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^OFFRAMP_MAX_ADAPTER_MB: .* 4\.0 MiB, over 3"):
        AdapterSource.open(folder, limit_mb=3)


def test_a_file_that_changes_while_it_is_read_is_noticed(folder: Path) -> None:
    source = AdapterSource.open(folder)
    (folder / WEIGHTS).write_bytes(b"w" * PART_BYTES)
    with pytest.raises(ConfigError, match="was changed while it was read"):
        list(source.blobs())


def test_an_index_that_contradicts_itself_is_no_index(folder: Path) -> None:
    index = AdapterSource.open(folder).index
    values = json.loads(index.to_bytes())
    spoilt: list[dict[str, Any]] = [{"size": 4}, {"parts": []}, {"format": 2}, {"more": 1}]
    for changes in spoilt:
        with pytest.raises(PolicyRefusedError) as caught:
            AdapterIndex.from_bytes(json.dumps(values | changes).encode())
        assert caught.value.reason is Refusal.BAD_FORMAT
    with pytest.raises(PolicyRefusedError, match="were fitted to model aa, not to bb"):
        require_model(index, "bb")
