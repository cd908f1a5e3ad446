"""Watches a channel from the publisher's side: keeps its timestamp young, rolls back what trips."""

from __future__ import annotations

from offramp.controller.errors import ConfigError
from offramp.controller.release.publisher import Publisher
from offramp.controller.release.registry import Ack, AckState, PolicyRegistry


class Overseer:
    """Looks at a channel again and again.

    Acknowledgements are not signed: whoever may write them can make it roll back, which only ever
    returns to a policy that was served before.

    Args:
        publisher: The channel's writer.
        registry: Where workers acknowledge.
        trips: Workers that must have tripped before the release is rolled back; all of them, if
            fewer live.
    """

    def __init__(self, publisher: Publisher, registry: PolicyRegistry, trips: int) -> None:
        self._publisher = publisher
        self._registry = registry
        self._trips = trips
        self._hopeless = 0

    def look(self) -> str:
        """Renew the timestamp, and roll back if enough workers tripped; says what it did.

        Returns:
            A sentence, or "" if there was nothing to do.

        Raises:
            RegistryUnavailableError: the registry cannot be reached.
            PromoteConflictError: another publisher moved the head meanwhile.
        """
        self._publisher.heartbeat()
        served = self._publisher.promoted
        living = self._registry.acks()
        tripped = [ack for ack in living if _has_tripped(ack, served)]
        if not tripped or len(tripped) < min(self._trips, len(living)) or served == self._hopeless:
            return ""
        story = f"{len(tripped)} of {len(living)} workers tripped ({tripped[0].reason})"
        try:
            back = self._publisher.rollback()
        except ConfigError as error:
            self._hopeless = served  # nothing to return to: they stay at full depth
            return f"{story}; they stay at full depth: {error}"
        return f"{story}; generation {back.generation} serves policy {back.digest[:12]} again"


def _has_tripped(ack: Ack, generation: int) -> bool:
    return ack.state is AckState.TRIPPED and ack.about == generation
