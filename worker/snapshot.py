"""The policy a request is pinned to."""

from __future__ import annotations

from dataclasses import dataclass

from offramp.controller.policy import NeverExit, Policy


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """One policy, and which release it came from.

    Attributes:
        generation: Generation of the release; 0 for one that was never published.
        digest: SHA-256 of the release's weights; "" if never published.
        policy: The policy itself.
    """

    generation: int
    digest: str
    policy: Policy


FULL_DEPTH = PolicySnapshot(0, "", NeverExit())
"""The built-in fallback."""
