"""The driver's part of a CUDA graph without a driver: calls are noted, and done again as they were.

As in a graph, every call is repeated with the very tensors of the capture, so what a captured
function takes from anywhere but memory that is written anew stays as it was then. What calls made
for themselves is overwritten before each replay, since graphs share that memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from support.pretended import bare, leaves

FAR_AWAY = 2**40
"""An index that is none."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation on tensors, and which of them were made by it.

    Attributes:
        calls: Each with its arguments as the host sees them, and the tensors that it made, by their
            places in what it returned.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], dict[int, Tensor]]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as ``Crossings`` says

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {memory(each) for each in leaves((args, kwargs)) if isinstance(each, Tensor)}
        made = {
            place: bare(each)
            for place, each in enumerate(leaves(found))
            if memory(each) not in given
        }
        if made or func._schema.is_mutable:  # what only looks at given memory does nothing to it
            self.calls.append((func, bare(args), bare(kwargs), made))
        return found

    def play(self) -> None:
        for func, args, kwargs, made in self.calls:
            found = leaves(func(*args, **kwargs))
            for place, tensor in made.items():
                tensor.copy_(found[place])


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
            # A graph's calls were watched when they were captured, and go by no Python since.
            with _disable_current_modes():
                self._spoil(self._dirty)
                tape.play()
            self._dirty = tape
            self.replays += 1

        return replay

    def _spoil(self, tape: Tape | None) -> None:
        made = () if tape is None else (each for *_, made in tape.calls for each in made.values())
        for tensor in made:
            tensor.fill_(float("nan") if tensor.is_floating_point() else FAR_AWAY)


def memory(tensor: Tensor) -> int:
    numbers: Tensor = bare(tensor)
    return numbers.untyped_storage().data_ptr()
