"""Exits: how many layers a token has executed, and in which weights.

An exit of the model's own weights is a plain number of layers, as everywhere; one on a copy of the
layers in fewer bytes is an ``Exit``, a number that also names the copy's weights. Only ``verify``
leaves there, where full depth judges. A token passes the exits on the copy first, and then those
of the model's own layers, which begin at the embedding anew: policies list them in this order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, cast, get_args

from offramp.controller.errors import ConfigError
from offramp.controller.strict import is_count

Weights = Literal["native", "int8", "int4"]
"""How matrices are kept: as they were loaded, or in fewer bytes."""


class Exit(int):
    """A number of executed layers, and the weights that they are executed in.

    In native weights it is that number. On a copy it equals its like alone.

    >>> Exit(6) == 6, Exit(12, "int4") == 12, Exit(12, "int4"), Exit(12, "int4") / 24
    (True, False, 12:int4, 0.5)

    Raises:
        ConfigError: other weights.
    """

    weights: Weights

    def __new__(cls, layers: int, weights: Weights = "native") -> Exit:
        """See the class; a plain number becomes an exit of the model's own weights."""
        if weights not in get_args(Weights):
            known = ", ".join(get_args(Weights))
            raise ConfigError("weights", f"{weights!r} is unknown", f"Use one of {known}")
        made = super().__new__(cls, layers)
        made.weights = weights
        return made

    def __getnewargs__(self) -> tuple[int, Weights]:  # type: ignore[override]  # int's has one
        """What makes it again, for copies and pickles."""
        return int(self), self.weights

    def __eq__(self, other: object) -> bool:
        same_layer = int.__eq__(self, other) if isinstance(other, int) else False
        return bool(same_layer) and weights_of(cast(int, other)) == self.weights

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((int(self), self.weights) if is_on_copy(self) else int(self))

    def __repr__(self) -> str:
        return f"{int(self)}:{self.weights}" if is_on_copy(self) else str(int(self))

    __str__ = __repr__


def weights_of(layer: int) -> Weights:
    """The weights that an exit's layers are executed in."""
    return layer.weights if isinstance(layer, Exit) else "native"


def is_on_copy(layer: int) -> bool:
    """Whether an exit is one of a copy in fewer bytes."""
    return weights_of(layer) != "native"


def ascend(exits: Sequence[int]) -> bool:
    """Whether exits stand in the order in which a token passes them, from layer 1 on.

    >>> ascend((Exit(6, "int4"), Exit(12, "int4"), 3)), ascend((3, Exit(6, "int4")))
    (True, False)
    """
    ordered = sorted(set(exits), key=lambda each: (not is_on_copy(each), each, weights_of(each)))
    return list(exits) == ordered and all(layer >= 1 for layer in exits)


def copy_weights(exits: Sequence[int]) -> Weights | None:
    """The weights of the one copy that exits are on; None if all are in the model's own layers.

    Raises:
        ConfigError: they are on two copies, and an engine has one.
    """
    found = sorted({weights_of(layer) for layer in exits} - {"native"})
    if len(found) > 1:
        problem = f"({', '.join(map(str, exits))}) are on copies of two kinds"
        raise ConfigError("exits", problem, "Name one kind of weights beside the native ones")
    return found[0] if found else None


def parse_exit(text: str) -> int:
    """Read an exit as commands take it: a layer, and the copy's weights after a colon.

    >>> parse_exit("6"), parse_exit("12:int4")
    (6, 12:int4)

    Raises:
        ValueError: it reads otherwise.
    """
    found = re.fullmatch(r" *(\d{1,6})(?::(int8|int4))? *", text, re.ASCII)
    if found is None:
        raise ValueError(f"{text!r} is no exit")
    layers, weights = found.groups()
    return Exit(int(layers), cast(Weights, weights)) if weights else int(layers)


def exit_to_json(layer: int) -> int | str:
    """A number, or, on a copy, what ``parse_exit`` reads."""
    return str(layer) if is_on_copy(layer) else int(layer)


def exit_from_json(value: int | str) -> int:
    """The exit that ``exit_to_json`` was given.

    Raises:
        ValueError: it would write otherwise.
    """
    if isinstance(value, str):
        found = parse_exit(value)
        if is_on_copy(found) and str(found) == value:
            return found
    elif is_count(value):
        return value
    raise ValueError(f"{value!r} is no exit")
