"""The console's other pages, and dark colours, as a browser shows them."""

from __future__ import annotations

import pytest

from support.console.console_stage import BEARER, Photograph, Stage, canary


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


def test_a_channel_in_dark_colours(stage: Stage, photograph: Photograph) -> None:
    canary(stage)
    photograph("canary_dark", "/", is_dark=True)
