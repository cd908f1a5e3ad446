"""The driver's part of a CUDA graph without a driver: calls are noted, and done again as they were.

As in a graph, every call is repeated with the very tensors of the capture, so what a captured
function takes from anywhere but memory that is written anew stays as it was then. What calls made
for themselves is overwritten before each replay, since graphs share that memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from support.pretended import PretendedTensor, leaves

FAR_AWAY = 2**40
"""An index that is none."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation on tensors, and which of them were made by it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {memory(each) for each in leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = [each for each in leaves(found) if memory(each) not in given]
        if made or func._schema.is_mutable:  # what only looks at given memory does nothing to it
            self.calls.append((func, args, kwargs, made))
        return found

    def play(self) -> None:
        for func, args, kwargs, made in self.calls:
            found = func(*args, **kwargs)
            given = {memory(each) for each in leaves((args, kwargs)) if isinstance(each, Tensor)}
            again = [each for each in leaves(found) if memory(each) not in given]
            for old, new in zip(made, again, strict=True):
                numbers(old).copy_(numbers(new))


class DriverStandIn:
    """Stands in for ``cuda_recorder``: what shares its memory is one recorder's.

    Attributes:
        replays: Replays of all that was recorded.
    """

    def __init__(self) -> None:
        self.replays = 0
        self._dirty: Tape | None = None

    def __call__(self, action: Callable[[], None]) -> Callable[[], None]:
        action()
        tape = Tape()
        with tape:
            action()
        self._spoil(tape)

        def replay() -> None:
            self._spoil(self._dirty)
            tape.play()
            self._dirty = tape
            self.replays += 1

        return replay

    def _spoil(self, tape: Tape | None) -> None:
        made = () if tape is None else (each for *_, made in tape.calls for each in made)
        for tensor in map(numbers, made):
            tensor.fill_(float("nan") if tensor.is_floating_point() else FAR_AWAY)


def numbers(tensor: Tensor) -> Tensor:
    return tensor.numbers if isinstance(tensor, PretendedTensor) else tensor


def memory(tensor: Tensor) -> int:
    return numbers(tensor).untyped_storage().data_ptr()
