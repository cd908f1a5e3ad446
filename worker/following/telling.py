"""Tells what a worker runs: the registry, also while it is busy, and the log, when it changes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from offramp.controller.errors import OfframpError
from offramp.controller.release.registry import Ack, AckState, PolicyRegistry
from offramp.worker.decoding.request import PolicySnapshot

ACK_TTL_POLLS = 6
"""Polls after which the acknowledgement of a silent worker is forgotten."""

SOON_S = 1.0
"""Seconds after which a worker says what it is busy with; most releases take less."""

_logger = logging.getLogger(__name__)


class AckTeller:
    """Writes acknowledgements.

    Args:
        registry: Where they go.
        poll_s: Seconds between two of them.

    Attributes:
        unreported: Why the registry could not be told; "" if it was.
    """

    def __init__(self, registry: PolicyRegistry, poll_s: float) -> None:
        self.unreported = ""
        self._registry = registry
        self._poll_s = poll_s

    def tell(self, ack: Ack) -> None:
        """Replace the worker's acknowledgement; what stands in the way is noted."""
        try:
            self._registry.acknowledge(ack, ACK_TTL_POLLS * self._poll_s)
            self.unreported = ""
        except OfframpError as error:
            self.unreported = str(error)

    @contextlib.contextmanager
    def meanwhile(self, ack: Callable[[], Ack]) -> Iterator[None]:
        """Say something again and again until the context ends, if it lasts.

        Compiling a policy's kernels may take longer than an acknowledgement lives, and a worker
        that is compiling is not gone.
        """
        is_done = threading.Event()

        def tell() -> None:
            wait_s = min(SOON_S, self._poll_s)
            while not is_done.wait(wait_s):
                self.tell(ack())
                wait_s = self._poll_s

        teller = threading.Thread(target=tell, name="policy-telling", daemon=True)
        teller.start()
        try:
            yield
        finally:
            is_done.set()
            teller.join()


class AckLog:
    """Logs acknowledgements that say something new."""

    def __init__(self) -> None:
        self._said: dict[str, object] = {}

    def note(self, ack: Ack, canary: PolicySnapshot | None) -> None:
        """Log an acknowledgement, unless the one before said the same.

        Args:
            ack: What the worker tells the registry.
            canary: The canary that it runs beside; None if there is none.
        """
        fields: dict[str, object] = {
            "generation": ack.generation,
            "digest": ack.digest,
            "canary": None if canary is None else canary.generation,
            "state": ack.state.value,
            "reason": ack.reason,
        }
        if fields != self._said:
            self._said = fields
            level = logging.INFO if ack.state is AckState.ACK else logging.WARNING
            _logger.log(level, "policy", extra={"fields": fields})
