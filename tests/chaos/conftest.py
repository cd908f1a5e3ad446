"""A channel on a real Redis that is about to be disturbed, and clients that ask meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.releases.clients import Clients
from support.releases.scene import Ask, Scene


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Begins clients of a channel, whose answers are checked as the test ends."""
    with ExitStack() as open_ones:
        yield lambda bench: open_ones.enter_context(Clients(bench).asking())


@pytest.fixture
def make_scene(tmp_path: Path, ask: Ask) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def make(binary: Path | None = None) -> Scene:
        made.append(Scene(tmp_path, ask, binary))
        return made[-1]

    yield make
    for scene in made:
        scene.registry.close()
        scene.server.__exit__(None, None, None)


@pytest.fixture
def scene(make_scene: Callable[..., Scene]) -> Scene:
    return make_scene()
