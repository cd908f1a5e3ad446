"""A device that is none: tensors that say they lie elsewhere, and are watched crossing over.

``PretendedTensor`` claims the device ``meta`` and keeps its numbers in host memory. ``Crossings``
runs every operation on those numbers, and refuses what a real device would refuse (tensors of two
devices in one operation) or would do only after a wait for all that was launched: a number read
from a tensor, a boolean index, a host tensor as index, a copy that neither ``upload`` nor ``fetch``
asked for. What goes through these two is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from offramp.worker.model.transfers import fetch, upload

DEVICE = torch.device("meta")
WAITS = (
    "item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select",
    "unique", "_unique2", "bincount", "repeat_interleave",
)  # fmt: skip
"""Operations whose result, or its shape, the host must know: they wait for the device."""

INDEXES = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
COPIES = ("to", "_to_copy", "copy_", "copy")
NESTS = (tuple, list, dict)


class CrossingError(AssertionError):
    """An operation that a device would refuse, or that waits for it where nothing may."""


class PretendedTensor(Tensor):
    """Numbers of host memory that claim to lie on another device."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device=DEVICE,
            storage_offset=numbers.storage_offset(),
        )  # fmt: skip
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch gives no keywords where there are none
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class Crossings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes new tensors where they are asked for, and watches what crosses once it is strict.

    Attributes:
        strict: Whether it refuses.
        fetches: Calls of ``fetch`` since it became strict.
        uploads: Calls of ``upload``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.strict = False
        self._frames: dict[Callable[..., Any], list[FrameType]] = {upload: [], fetch: []}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that nothing is compiled here: keeping dynamo away would cost more than a product."""
        return False

    @property
    def fetches(self) -> int:
        return len(self._frames[fetch])

    @property
    def uploads(self) -> int:
        return len(self._frames[upload])

    @contextmanager
    def watched(self) -> Iterator[Crossings]:
        """Refuse and count, from anew, what happens within."""
        self._frames = {upload: [], fetch: []}
        self.strict = True
        try:
            yield self
        finally:
            self.strict = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.strict:
            self._check(func, args, kwargs)
        return run(func, args, kwargs)

    def _check(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = func._schema.name.removeprefix("aten::")
        tensors = [each for each in leaves((args, kwargs)) if isinstance(each, Tensor)]
        ours = [each for each in tensors if isinstance(each, PretendedTensor)]
        host = [each for each in tensors if each.device.type == "cpu"]
        if len(ours) + len(host) < len(tensors):
            raise CrossingError(f"{name} of a tensor that was made from numbers of the host")
        if name in COPIES:
            self._check_copy(name, args, kwargs)
        elif ours and name in WAITS:
            raise CrossingError(f"{name} waits for the device")
        elif ours and name in INDEXES:
            check_index(name, args[1])
        elif ours and any(each.dim() for each in host):
            raise CrossingError(f"{name} of tensors of two devices")

    def _check_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name.startswith("copy"):
            target, source = args[:2]
            onto = target.device
        else:
            source = args[0]
            named = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.device)]
            onto = named[0] if named else source.device
        if onto == source.device or (source.dim() == 0 and source.device.type == "cpu"):
            return
        function = upload if onto == DEVICE else fetch
        frame = frame_of(function)
        if frame is None:
            raise CrossingError(
                f"{name} from {source.device} to {onto}, not by {function.__name__}"
            )
        if frame not in self._frames[function]:
            self._frames[function].append(frame)


def check_index(name: str, index: list[Tensor | None]) -> None:
    given = [each for each in index if each is not None]
    if not all(isinstance(each, PretendedTensor) for each in given):
        raise CrossingError(f"{name} by an index of the host")
    if any(each.dtype in (torch.bool, torch.uint8) for each in given):
        raise CrossingError(f"{name} by a mask waits for the device")


def frame_of(function: Callable[..., Any]) -> FrameType | None:
    """The innermost call of a function that is under way."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the numbers; its result lies where the device would have it."""
    met: list[Any] = []
    found = func(*bare(args, met), **bare(kwargs, met))
    named = next((each for each in met if isinstance(each, torch.device)), None)
    if named != DEVICE if named is not None else not met:
        return found
    return PretendedTensor(found) if type(found) is Tensor else clothed(found)


def bare(value: Any, met: list[Any] | None = None) -> Any:
    """The numbers of a tensor, the host in place of the device, all else as it is.

    Args:
        value: What is given to an operation, in tuples, lists and dictionaries.
        met: Takes the pretended tensors and the devices that were there, in their order.
    """
    met = [] if met is None else met
    kind = type(value)
    if kind is PretendedTensor:
        met.append(value)
        return value.numbers
    if kind is tuple or kind is list:
        return kind([bare(each, met) for each in value])
    if kind is dict:
        return {key: bare(each, met) for key, each in value.items()}
    if kind is torch.device:
        met.append(value)
        return torch.device("cpu") if value == DEVICE else value
    return value


def clothed(value: Any) -> Any:
    """What an operation found, its tensors on the device."""
    if isinstance(value, Tensor):
        return PretendedTensor(value)
    if isinstance(value, tuple | list):
        return type(value)(map(clothed, value))
    return value


def leaves(value: Any) -> list[Any]:
    """What lies in nested tuples, lists and dictionaries; torch's own walk takes longer."""
    if not isinstance(value, NESTS):
        return [value]
    found = []
    for each in value.values() if isinstance(value, dict) else value:
        if isinstance(each, NESTS):
            found += leaves(each)
        else:
            found.append(each)
    return found


def pretend(model: nn.Module) -> Any:
    """The model, its parameters and buffers moved to the device that is none; tied ones stay so."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = moved.setdefault(id(parameter), PretendedTensor(parameter.detach()))
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved.setdefault(id(buffer), PretendedTensor(buffer))
    return model
