"""docs/structures.md names every room as its docstring does, and no file that is not there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

FOLDERS = ("controller", "worker", "envs", "agents", "deploy", "research")
PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w/]*(?:\.py)?)`")


def test_the_table_of_rooms_is_what_the_script_generates(root: Path) -> None:
    script = runpy.run_path(str(root / "docs/rooms.py"))
    page = (root / "docs/structures.md").read_text(encoding="utf-8")
    assert page == script["renewed"](page, root), "stale: run `make rooms`"


def test_every_room_has_a_sentence(root: Path) -> None:
    script = runpy.run_path(str(root / "docs/rooms.py"))
    rooms = script["rooms"](root)
    assert {room.split("/")[0] for room in rooms} == set(FOLDERS)
    assert [room for room, sentence in rooms.items() if len(sentence.split()) < 3] == []


def test_every_path_in_the_text_exists(root: Path) -> None:
    page = (root / "docs/structures.md").read_text(encoding="utf-8")
    named = PATH.findall(page)
    assert len(named) > 80
    assert [path for path in named if not (root / path).exists()] == []
