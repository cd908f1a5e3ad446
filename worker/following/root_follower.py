"""Follows the root of a channel, so that keys change and are revoked without a restart."""

from __future__ import annotations

from pathlib import Path

from offramp.controller.errors import PolicyRefusedError
from offramp.controller.keys.root import NOBODY
from offramp.controller.keys.root_chain import RootChain
from offramp.controller.release.registry import PolicyRegistry
from offramp.controller.release.trust import ReleaseVerifier

ROOTS = "roots"
"""Folder, within a worker's own, of the roots that it followed."""


class RootFollower:
    """Gives the verifier each new root, once the one before has signed for it.

    Args:
        registry: Where roots are looked up; its answers are never trusted.
        verifier: Holds the root that the worker was given, and is told what follows.
        worker: The worker's own folder, beside those of its pool.

    Attributes:
        lost: Why nobody's signature counts: roots on this disk are damaged; "" if all is well.
    """

    def __init__(self, registry: PolicyRegistry, verifier: ReleaseVerifier, worker: Path) -> None:
        self._registry = registry
        self._verifier = verifier
        neighbours = sorted(worker.parent.glob(f"*/{ROOTS}"))
        self._chain = RootChain(verifier.root, worker / ROOTS, neighbours)
        self.lost = ""
        self._take_effect()

    def follow(self) -> str:
        """Look for newer roots; returns what is wrong with the next one, "" if there is none.

        Raises:
            RegistryUnavailableError: the registry cannot be reached.
            OSError: a root cannot be written, so it was not taken.
        """
        try:
            while raw := self._registry.root(self._chain.newest.version + 1):
                self._chain.add(raw)
                self._take_effect()
        except PolicyRefusedError as error:
            found = f"root {self._chain.newest.version + 1} in the registry is worthless"
            return f"{found}: {error.reason.value}: {error.detail}"
        return ""

    def _take_effect(self) -> None:
        is_whole = self._chain.is_whole
        # A damaged file must not bring back an older root, and with it keys that were revoked.
        self._verifier.root = self._chain.newest if is_whole else NOBODY
        self.lost = "" if is_whole else "the roots on this disk are damaged: give it the newest one"
