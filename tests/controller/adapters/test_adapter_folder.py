"""Adapters that are kept beside what was recorded through them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from offramp.controller.adapters.adapter_folder import (
    DESCRIPTION,
    KEPT,
    WEIGHTS,
    find_adapters,
    keep_adapters,
    kept_in,
    require_found,
)
from offramp.controller.errors import ConfigError


def tuned(folder: Path, digest: str) -> Path:
    folder.mkdir()
    (folder / WEIGHTS).write_bytes(digest.encode())
    (folder / DESCRIPTION).write_text(json.dumps({"format": 1, "digest": digest}))
    return folder


def test_they_are_kept_whole_and_found_by_digest(tmp_path: Path) -> None:
    first, second = tuned(tmp_path / "a", "aa"), tuned(tmp_path / "b", "bb")
    run = tmp_path / "run"
    assert kept_in(run) is None
    keep_adapters(first, run)
    keep_adapters(second, run)  # what was kept of an earlier run gives way
    kept = run / KEPT
    assert kept_in(run) == kept
    assert sorted(os.listdir(kept)) == sorted([WEIGHTS, DESCRIPTION])
    assert (kept / WEIGHTS).read_bytes() == b"bb"
    assert os.listdir(run) == [KEPT]
    assert find_adapters("bb", first, tmp_path / "none", kept) == kept
    assert require_found("aa", kept, first) == first
    with pytest.raises(ConfigError, match=r"adapters cc… .* are not in .*Name their folder"):
        require_found("cc", kept, first)


def test_a_copy_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    source, place = tuned(tmp_path / "a", "aa"), tmp_path / "file"
    place.touch()
    with pytest.raises(ConfigError, match=r"cannot be copied to .*file"):
        keep_adapters(source, place)
    (source / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="No such file"):
        keep_adapters(source, tmp_path / "run")
    assert not os.listdir(tmp_path / "run")
