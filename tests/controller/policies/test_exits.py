"""Exits of the model's own weights are plain numbers; those on a copy equal their like alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from offramp.controller.errors import ConfigError
from offramp.controller.policies.exits import (
    Exit,
    ascend,
    copy_weights,
    exit_from_json,
    exit_to_json,
    parse_exit,
)

FOUR = Exit(12, "int4")


def test_an_exit_on_a_copy_is_another_exit_than_the_number() -> None:
    assert {Exit(6), Exit(6, "native")} == {6}
    assert FOUR not in (12, Exit(12), Exit(12, "int8"), Exit(6, "int4"), "12:int4")
    assert (12, FOUR).index(FOUR) == 1
    assert len({12, Exit(12), FOUR, Exit(12, "int4"), Exit(12, "int8")}) == 3
    assert all(n != FOUR for n in (12, Exit(12)))  # the number's own comparison, too
    assert FOUR > 6
    assert f"{FOUR} {FOUR!r} {FOUR / 24}" == "12:int4 12:int4 0.5"


@pytest.mark.parametrize("exit_", [FOUR, Exit(3, "int8"), Exit(3), 3])
def test_copies_pickles_and_json_keep_it(exit_: int) -> None:
    made = [copy.deepcopy(exit_), pickle.loads(pickle.dumps(exit_)), parse_exit(str(exit_))]
    assert [*made, exit_from_json(exit_to_json(exit_))] == [exit_] * 4


@pytest.mark.parametrize("value", ["6", "06:int4", " 6:int4", "6:int3", "6:native", True, 6.0, -1])
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is no exit"):
        exit_from_json(value)


def test_exits_on_the_copy_come_first() -> None:
    assert all(map(ascend, [(), (3, 6), (FOUR,), (Exit(6, "int4"), FOUR, 3, 12)]))
    assert not any(map(ascend, [(6, 3), (3, 3), (0, 3), (3, FOUR), (FOUR, Exit(6, "int4"))]))


def test_one_kind_of_copy_is_named() -> None:
    assert [copy_weights(exits) for exits in ((3, 6), (FOUR, 3))] == [None, "int4"]
    with pytest.raises(ConfigError, match="copies of two kinds"):
        copy_weights((Exit(6, "int8"), FOUR))
    with pytest.raises(ConfigError, match="Use one of native, int8, int4"):
        Exit(6, "int3")  # type: ignore[arg-type]
