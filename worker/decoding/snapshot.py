"""The policy a request is pinned to."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.controller.policies.protocols import NeverExit, Policy
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.manifest import Guarantee


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """One policy, and which release it came from.

    Attributes:
        generation: Generation of the release; 0 for one that was never published.
        digest: SHA-256 of the release's weights; "" if never published.
        policy: The policy itself.
        certificate: What was guaranteed of it; None if nothing was.
    """

    generation: int
    digest: str
    policy: Policy
    certificate: Certificate | None = None

    @property
    def guarantee(self) -> Guarantee:
        """What stands behind it."""
        if isinstance(self.policy, NeverExit):
            return "full depth"
        return "uncertified" if self.certificate is None else "certified"


FULL_DEPTH = PolicySnapshot(0, "", NeverExit())
"""The built-in fallback."""
