from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Joined here, so that this file does not hold what it looks for.
FOREIGN = tuple("/".join(parts) for parts in (("", "work", ""), ("..", "shared")))


@pytest.fixture(scope="module")
def kept_paths(root: Path) -> list[Path]:
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("no git checkout: what is tracked is unknown")
    # Untracked files too: a fault is cheaper found before the commit than after.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [root / name for name in listing.split("\0") if name]


@pytest.fixture(scope="module")
def kept_files(kept_paths: list[Path]) -> list[Path]:
    return [path for path in kept_paths if path.is_file()]


def foreign_lines(path: Path) -> list[int]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:  # model weights
        return []
    return [number for number, line in enumerate(lines, 1) if any(mark in line for mark in FOREIGN)]


def test_no_kept_file_refers_to_this_machine(root: Path, kept_files: list[Path]) -> None:
    places = {path: path.relative_to(root).as_posix() for path in kept_files}
    found = [f"{places[path]}:{line}" for path in kept_files for line in foreign_lines(path)]
    assert not found, f"{' or '.join(FOREIGN)} in: " + ", ".join(found)


def test_every_kept_link_leads_somewhere_in_here(root: Path, kept_paths: list[Path]) -> None:
    """A link from ``runs`` to itself was kept once, and no demo ran from a fresh clone."""
    links = [path for path in kept_paths if path.is_symlink()]
    targets = {path: os.path.realpath(path) for path in links}
    lost = [path.name for path, target in targets.items() if not Path(target).exists()]
    away = [path.name for path in links if not Path(targets[path]).is_relative_to(root.resolve())]
    assert links  # the packages
    assert not lost + away


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(f"fine\nsee {FOREIGN[1]}/design.md\n")
    assert foreign_lines(tmp_path / "page.md") == [2]
