"""A manifest with its blob, and the folder that a trained policy waits in before it is signed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError
from offramp.controller.policies.kinds import PackedPolicy
from offramp.controller.policies.protocols import Policy
from offramp.controller.policies.weights import unpack_policy
from offramp.controller.release.certificate import Certificate
from offramp.controller.release.manifest import Manifest, Rollout

__all__ = ["Manifest", "PolicyBundle", "Rollout"]

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "weights.safetensors"


@dataclass(frozen=True, slots=True)
class PolicyBundle:
    """A policy with all that is known about it. Nothing here is signed or to be trusted.

    Attributes:
        manifest: The description; generation 0 for a draft.
        blob: The weights, as safetensors.
    """

    manifest: Manifest
    blob: bytes

    @classmethod
    def draft(
        cls,
        packed: PackedPolicy,
        *,
        model: str,
        tokenizer: str,
        training: Mapping[str, Any],
        metrics: Mapping[str, Any],
        created_at: float,
        certificate: Certificate | None = None,
        adapters: str = "",
    ) -> PolicyBundle:
        """A trained policy that no publisher has released yet.

        Args:
            packed: The policy.
            model: Fingerprint of the model it was trained for, hex.
            tokenizer: Fingerprint of that model's tokenizer, hex.
            training: Where the policy comes from.
            metrics: What was measured on held-out data.
            created_at: Unix seconds.
            certificate: The calibration's guarantee, if there is one.
            adapters: SHA-256 of the adapters that it was recorded through, hex; "" for none.
        """
        manifest = Manifest(
            kind=packed.kind,
            exits=packed.exits,
            params=packed.params,
            schema=packed.schema_digest,
            model=model,
            tokenizer=tokenizer,
            digest=packed.digest,
            size=len(packed.blob),
            shapes=packed.shapes,
            training=dict(training),
            metrics=dict(metrics),
            certificate=certificate,
            adapters=adapters,
            created_at=created_at,
        )
        return cls(manifest, packed.blob)

    @property
    def packed(self) -> PackedPolicy:
        """The policy as a publisher takes it."""
        return PackedPolicy(
            kind=self.manifest.kind,
            exits=self.manifest.exits,
            params=self.manifest.params,
            schema_digest=self.manifest.schema,
            blob=self.blob,
        )

    def policy(self) -> Policy:
        """The policy itself, after every check a worker makes on a blob.

        Raises:
            PolicyRefusedError: manifest and blob disagree, or the blob is unusable.
        """
        return unpack_policy(self.manifest, self.blob)

    def save(self, folder: str | Path) -> None:
        """Write manifest.json and weights.safetensors, weights first.

        Raises:
            ConfigError: the folder cannot be written (permission, full disk); each file there is
                old or new, and a new manifest never stands beside old weights.
        """
        folder = Path(folder)
        try:
            write_durably(folder / WEIGHTS_FILE, self.blob)
            write_durably(folder / MANIFEST_FILE, self.manifest.to_bytes() + b"\n")
        except OSError as error:
            raise ConfigError(
                "policy folder",
                f"{str(folder)!r} cannot be written ({error.strerror or error})",
                "Name a folder you may write to, on a disk with room",
            ) from error

    @classmethod
    def load(cls, folder: str | Path) -> PolicyBundle:
        """Read the two files and check that they belong together.

        Raises:
            ConfigError: a file is missing.
            PolicyRefusedError: a file is unusable, or they disagree.
        """
        folder = Path(folder)
        try:
            manifest = Manifest.from_bytes((folder / MANIFEST_FILE).read_bytes())
            bundle = cls(manifest, (folder / WEIGHTS_FILE).read_bytes())
        except OSError as error:
            raise ConfigError("policy folder", str(error), "Run `offramp train` first") from error
        bundle.policy()
        return bundle
