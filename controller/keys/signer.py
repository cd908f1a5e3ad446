"""Signs as a root allows: a key that it does not list for a thing does not sign that thing."""

from __future__ import annotations

from offramp.controller.errors import ConfigError
from offramp.controller.keys.envelopes import RELEASE_MAGIC, SigningKey
from offramp.controller.keys.root import Root


class Signer:
    """A key under a root.

    Args:
        key: The private key of this publisher.
        root: Says what it may sign.

    Attributes:
        root: The same.
    """

    def __init__(self, key: SigningKey, root: Root) -> None:
        self._key = key
        self.root = root

    @property
    def suffices(self) -> bool:
        """Whether one signature is enough for a release."""
        return self.root.release.threshold == 1

    def sign(self, payload: bytes, magic: bytes = RELEASE_MAGIC) -> bytes:
        """Wrap a payload in an envelope with this key's signature; it may need others beside it.

        Raises:
            ConfigError: the root does not list the key for this kind, or the payload is too long.
        """
        if self._key.key_id not in self.root.role(magic).keys:
            what = "releases" if magic == RELEASE_MAGIC else "timestamps"
            problem = f"root {self.root.version} lets {self._key.key_id} sign no {what}"
            remedy = "Use a key that it lists, or have the next root list this one"
            raise ConfigError("signing key", problem, remedy)
        return self._key.sign(payload, magic)
