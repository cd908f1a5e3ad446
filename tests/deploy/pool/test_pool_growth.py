"""When a pool grows and shrinks; ``chaos_growth.py`` lets a real one do so."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from offramp.controller.errors import ConfigError
from offramp.deploy.serve.placing.pool_growth import (
    PoolGrowth,
    WorkersWanted,
    load_of,
    tell_shortage,
)


def test_the_load_that_wants_more_workers_decides() -> None:
    many_short = {"completions": {"a": 6.0, "b": 6.0}, "tokens": {"a": 60.0, "b": 60.0}}
    few_long = {"completions": {"a": 1.0, "b": 1.0}, "tokens": {"a": 900.0, "b": 900.0}}
    both = WorkersWanted(completions=4.0, tokens=600.0)
    assert both.wanted(many_short) == 12 / 4
    assert both.wanted(few_long) == 1800 / 600
    assert WorkersWanted(completions=4.0, tokens=None).wanted(few_long) == 2 / 4
    assert both.wanted({name: {"a": load} for name, load in load_of(6, 2, 60).items()}) == 8 / 4


@pytest.mark.parametrize("field", ["completions", "tokens", "up_s", "down_s"])
def test_a_target_or_a_delay_of_nothing_is_refused(field: str) -> None:
    given: dict[str, Any] = {"most": 2, "completions": 1.0, field: 0.0}
    with pytest.raises(ConfigError, match=f"{field}.*not above 0"):
        PoolGrowth(**given)


def test_workers_that_wait_for_cores_are_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    tell_shortage(1.0)
    assert not caplog.messages
    tell_shortage(3.0)
    assert "new workers take 3 of Ray's cores, and 1 are free" in caplog.text
