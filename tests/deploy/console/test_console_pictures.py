"""The console's other pages, and dark colours, as a browser shows them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.console.console_stage import BEARER, Photograph, Stage, canary, candidates, in_shadow


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_the_page_that_asks_for_the_key(
    stage: Stage, photograph: Photograph, is_dark: bool
) -> None:
    assert "Key of the console" in stage.client.get("/").text
    photograph("login_dark" if is_dark else "login", "/", is_known=False, is_dark=is_dark)


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
def test_the_page_that_asks_whether_one_is_sure(
    stage: Stage, photograph: Photograph, is_dark: bool
) -> None:
    stage.publish(3)
    stage.publish(5, promote=False)
    path = "/confirm/promote?generation=2&percent=5"
    page = stage.client.get(path, headers=BEARER).text
    assert "will serve 5% of the requests" in page
    photograph("confirm_dark" if is_dark else "confirm", path, is_dark=is_dark)


@pytest.mark.parametrize(
    "prepare", [canary, in_shadow, candidates], ids=lambda each: str(each.__name__)
)
def test_a_channel_in_dark_colours(
    stage: Stage, photograph: Photograph, prepare: Callable[[Stage], None]
) -> None:
    prepare(stage)
    photograph(f"{prepare.__name__}_dark", "/", is_dark=True)
