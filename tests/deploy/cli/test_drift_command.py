"""``offramp drift``: what it says, and how it ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offramp.deploy.cli.record_drift import DRIFTED
from offramp.envs.traces.chunk_file import decode
from offramp.envs.traces.store import TraceStore
from support.recordings import make_corpus, make_recording


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drift")
    return make_recording(folder / "traces", make_corpus(folder / "corpus"), tokens=20)


def test_a_recording_has_not_drifted_from_its_like(cli: Any, recorded: Path) -> None:
    status, said = cli("drift", recorded, "--against", recorded)
    assert (status, "no difference beyond chance" in said) == (0, True)


def test_drift_ends_with_a_status_of_its_own(cli: Any, recorded: Path, tmp_path: Path) -> None:
    old = TraceStore.open(recorded)
    moved = TraceStore.create(tmp_path / "moved", old.header)
    for entry in old.chunks:
        chunk = decode((recorded / entry.name).read_bytes(), old.header, entry.document)
        moved.append(replace(chunk, features_TEF=chunk.features_TEF + 2), entry.split)
    status, said = cli("drift", tmp_path / "moved", "--against", recorded)
    assert status == DRIFTED
    assert "they differ beyond chance: p = 0.001" in said


def test_a_folder_that_is_no_recording_is_named(cli: Any, recorded: Path, tmp_path: Path) -> None:
    assert "does not exist" in cli.refused("drift", tmp_path, "--against", recorded)
