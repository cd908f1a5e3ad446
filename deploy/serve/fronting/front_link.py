"""A worker's way to its pool's front, and to the next one if that is lost."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from offramp.deploy.serve.fronting.token_wire import WireAddress

FRONTS = "offramp"
"""Ray's namespace of fronts."""

ANSWER_S = 2.0
"""A front that does not say for so long where it listens is asked again later."""

_PAUSE_S = 0.1


class FrontLink:
    """Finds a front by its name, which the next one has, too.

    Args:
        name: The front's; it is waited for.
        model: The model that the worker serves.
    """

    def __init__(self, name: str, model: str) -> None:
        self._name, self._model = name, model
        self._told: Any = None
        while (front := self._found()) is None:
            time.sleep(_PAUSE_S)
        self._front = front

    @property
    def is_lost(self) -> bool:
        """Whether the front was gone when it was told something last."""
        if self._told is None or not ray.wait([self._told], timeout=0)[0]:
            return False
        try:
            ray.get(self._told)
        except RayActorError:
            return True
        except RayError:  # what it made of the report is its own affair
            return False
        return False

    def renew(self, connect: Callable[[WireAddress], object] | None = None) -> None:
        """Find the front again; while there is none that listens, it stays lost.

        Args:
            connect: Is told where it takes tokens, ahead of the first report to it.
        """
        front = self._found()
        with contextlib.suppress(RayActorError, GetTimeoutError, OSError):
            if front is not None:
                address = ray.get(front.wire.remote(), timeout=ANSWER_S)
                if connect is not None:
                    connect(address)
                self._front, self._told = front, None

    def wire(self) -> WireAddress:
        """Where it takes tokens; waits until it does."""
        address: WireAddress = ray.get(self._front.wire.remote())
        return address

    def hear(self, report: dict[str, Any]) -> None:
        """Tell it how the worker is."""
        self._told = self._front.hear.remote(self._model, report)

    def log(self, line: str) -> None:
        """Hand it a line that the worker logged."""
        self._front.log.remote(line)

    def _found(self) -> Any:
        """The actor of that name; None: it is not there yet, or not any more."""
        try:
            return ray.get_actor(self._name, namespace=FRONTS)
        except ValueError:
            return None
