"""A channel with a console before it, and pictures of its pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from offramp.deploy.serve.redis_server import EmbeddedRedis
from support.console.console_stage import Photograph, Stage, listening, look


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        stage = Stage(server, tmp_path)
        yield stage
        stage.registry.close()


@pytest.fixture
def photograph(stage: Stage, tmp_path: Path) -> Photograph:
    """Takes a picture of a page, and sees that it is a page in the colours asked for.

    Pictures are kept in the folder that CONSOLE_SCREENSHOTS names.
    """

    def take(name: str, path: str, *, is_known: bool = True, is_dark: bool = False) -> None:
        chromium = shutil.which("chromium")
        if chromium is None:
            pytest.skip("no chromium here: the page was read, and not looked at")
        shot = Path(os.environ.get("CONSOLE_SCREENSHOTS", tmp_path)) / f"{name}.png"
        with listening(stage.app, is_known=is_known) as url:
            look(chromium, url + path, shot, is_dark=is_dark)
        light_HW = np.asarray(Image.open(shot).convert("L"))
        assert len(np.unique(light_HW)) > 20, "the page is empty"
        assert (np.median(light_HW) < 60) if is_dark else (np.median(light_HW) > 200)

    return take
