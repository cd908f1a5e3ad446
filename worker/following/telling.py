"""Logs what a worker runs: one line whenever its answer to its channel changes."""

from __future__ import annotations

import logging

from offramp.controller.release.registry import Ack, AckState

_logger = logging.getLogger(__name__)


class AckLog:
    """Logs acknowledgements that say something new."""

    def __init__(self) -> None:
        self._said: dict[str, object] = {}

    def note(self, ack: Ack, canary: int | None) -> None:
        """Log an acknowledgement, unless the one before said the same.

        Args:
            ack: What the worker tells the registry.
            canary: Generation of the canary that it runs beside; None if there is none.
        """
        fields: dict[str, object] = {
            "generation": ack.generation,
            "digest": ack.digest,
            "canary": canary,
            "state": ack.state.value,
            "reason": ack.reason,
        }
        if fields != self._said:
            self._said = fields
            level = logging.INFO if ack.state is AckState.ACK else logging.WARNING
            _logger.log(level, "policy", extra={"fields": fields})
