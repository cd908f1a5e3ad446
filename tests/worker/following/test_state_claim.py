"""Workers of one pool share no folder, and workers of two pools share no name."""

from __future__ import annotations

from pathlib import Path

import pytest

from offramp.controller.errors import ConfigError
from offramp.worker.following.worker_state import StateClaim


def test_living_workers_of_a_pool_have_folders_and_names_of_their_own(tmp_path: Path) -> None:
    claims = [StateClaim(tmp_path) for _ in range(3)]
    assert [each.folder.name for each in claims] == ["worker-0", "worker-1", "worker-2"]
    assert len({each.name for each in claims}) == 3


def test_a_worker_that_comes_back_has_its_folder_and_name_again(tmp_path: Path) -> None:
    first, second = StateClaim(tmp_path), StateClaim(tmp_path)
    first.release()
    again = StateClaim(tmp_path)
    assert (again.folder, again.name) == (first.folder, first.name)
    assert second.folder != again.folder


def test_the_first_workers_of_two_pools_have_two_names(tmp_path: Path) -> None:
    names = {StateClaim(tmp_path / pool).name for pool in ("a", "b")}
    assert len(names) == 2
    assert all(name.startswith("worker-0-") for name in names)


def test_a_folder_that_cannot_be_made_is_a_setting_to_correct(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="state_dir"):
        StateClaim(tmp_path / "file")
