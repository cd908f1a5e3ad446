"""What a writer leaves behind that is killed in the middle of it, and what two writers do."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from offramp.controller.durable import lock_file, write_durably

SPAWN = multiprocessing.get_context("fork")

DEATHS = int(os.environ.get("OFFRAMP_TEST_DEATHS", "40"))


def hang_after_writing(path: Path, ready: int) -> None:
    """Write as ``write_durably`` does, and never come to the renaming."""

    def hang(*_: object) -> None:
        os.write(ready, b"x")
        signal.pause()

    os.replace = hang  # type: ignore[assignment]  # in a process of its own
    write_durably(path, b"never seen")


def killed_writer(path: Path) -> None:
    told, tell = os.pipe()
    writer = SPAWN.Process(target=hang_after_writing, args=(path, tell))
    writer.start()
    os.read(told, 1)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    os.close(told)
    os.close(tell)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    write_durably(path, b"old")
    killed_writer(path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2  # the control: it did leave something
    write_durably(path, b"new")
    assert [each.name for each in tmp_path.iterdir()] == ["mark"]
    assert path.read_bytes() == b"new"


def test_killed_writers_leave_a_whole_file_and_one_scrap_at_most(tmp_path: Path) -> None:
    path = tmp_path / "last-known-good"
    write_durably(path, b"good" * 1000)
    for _ in range(DEATHS):
        killed_writer(path)
        assert path.read_bytes() == b"good" * 1000
        assert len(list(tmp_path.iterdir())) == 2


def test_living_writers_do_not_sweep_each_other_away(tmp_path: Path) -> None:
    path = tmp_path / "mark"
    contents = [bytes([n]) * 5000 for n in range(256)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda content: write_durably(path, content), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_sweeping_makes_no_file_anew(tmp_path: Path) -> None:
    """Two sweepers that met one file made it again, under a living writer's name."""
    gone = tmp_path / ".mark.12345678"
    with pytest.raises(FileNotFoundError), lock_file(gone, wait=False, make=False):
        pass
    assert not gone.exists()


def test_a_file_that_must_not_be_replaced_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_durably(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_durably(path, b"second", replace=False)
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_that_is_held_is_not_waited_for_unless_asked(tmp_path: Path) -> None:
    with lock_file(tmp_path / "lock") as first:
        assert first
        with lock_file(tmp_path / "lock", wait=False) as second:
            assert not second
    with lock_file(tmp_path / "lock", wait=False) as third:
        assert third
