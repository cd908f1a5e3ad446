"""Fetches what a release needs beside its signed manifest: the policy's blob, and its adapters."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

from offramp.controller.adapters.adapter_folder import DESCRIPTION, WEIGHTS, read_description
from offramp.controller.adapters.adapter_index import (
    LIMIT,
    MAX_ADAPTER_MB,
    MAX_INDEX_BYTES,
    MIB,
    PART_BYTES,
    AdapterIndex,
    require_model,
)
from offramp.controller.durable import sync_folder, write_durably
from offramp.controller.errors import ConfigError, PolicyRefusedError, Refusal
from offramp.controller.policies.kinds import MAX_BLOB_BYTES, digest_of
from offramp.controller.release.manifest import Manifest
from offramp.controller.release.registry import PolicyRegistry
from offramp.worker.decoding.request import ExitReaders

ADAPTERS = "adapters"
"""Folder, within a worker's own, of one folder of adapters per digest."""

PARTIAL = ".partial"
"""Folder within that where adapters are put together; only one that is whole gets its name."""

TakeIn = Callable[[Path], ExitReaders]
"""Reads a folder of adapters, or of heads, into the worker; raises ConfigError."""


class ReleaseFetcher:
    """Brings what a release names from the registry, checked by digest, adapters to disk.

    Args:
        registry: Where they lie; its answers are never trusted.
        worker: The worker's own folder.
        own: Digest of the adapters that the engine was made with; "" for none.
        take_in: Reads adapters into the engine; None: it can be given none.
        limit_mb: Most MiB of adapters that are fetched.
    """

    def __init__(
        self,
        registry: PolicyRegistry,
        worker: Path,
        own: str = "",
        take_in: TakeIn | None = None,
        limit_mb: float = MAX_ADAPTER_MB,
    ) -> None:
        self._registry = registry
        self._folder = worker / ADAPTERS
        self._own = own
        self._take_in = take_in
        self._limit_mb = limit_mb

    def fetch(self, manifest: Manifest) -> bytes:
        """The policy's blob; its adapters are on disk then.

        Raises:
            PolicyRefusedError: something is missing, damaged, too large or another model's.
            RegistryUnavailableError: the registry cannot be reached.
            OSError: the adapters cannot be written.
        """
        if self._is_wanting(manifest):
            self._bring(manifest)
        return self._blob(manifest.digest, min(manifest.size, MAX_BLOB_BYTES), "blob")

    def adapters(self, manifest: Manifest) -> ExitReaders | None:
        """What a release's exits are read through, from disk; None: the engine's own.

        Raises:
            PolicyRefusedError: they are not there, or do not fit the model.
        """
        named = manifest.adapters
        if named in ("", self._own):
            return None
        if self._take_in is None:
            detail = f"it names adapters {named}, and this worker runs with {self._own or 'none'}"
            raise PolicyRefusedError(Refusal.UNSUPPORTED, detail)
        if self._is_wanting(manifest):
            raise PolicyRefusedError(Refusal.MISSING_BLOB, f"adapters {named} are not on this disk")
        try:
            return self._take_in(self._folder / named)
        except ConfigError as error:
            shutil.rmtree(self._folder / named, ignore_errors=True)  # perhaps the disk spoilt them
            detail = f"adapters {named} cannot be used: {error.problem}"
            raise PolicyRefusedError(Refusal.UNSUPPORTED, detail) from error

    def forget_others(self, named: Collection[str]) -> None:
        """Remove adapters from disk but those that are named."""
        for folder in self._folder.iterdir() if self._folder.exists() else ():
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def _is_wanting(self, manifest: Manifest) -> bool:
        """Whether the adapters that a release names are neither the engine's own nor on disk."""
        named = manifest.adapters
        if named in ("", self._own) or self._take_in is None:
            return False
        try:
            facts = read_description(self._folder / named)
        except ConfigError:
            return True
        return facts.get("digest") != named or not (self._folder / named / WEIGHTS).exists()

    def _bring(self, manifest: Manifest) -> None:
        named = manifest.adapters
        if not manifest.adapter_index:
            detail = f"it names adapters {named}, which do not come with it"
            raise PolicyRefusedError(Refusal.MISSING_BLOB, detail)
        raw = self._blob(
            manifest.adapter_index, MAX_INDEX_BYTES, f"index of adapters {named}, blob"
        )
        index = AdapterIndex.from_bytes(raw)
        if index.digest != named:
            detail = f"the index of adapters {named} is of adapters {index.digest}"
            raise PolicyRefusedError(Refusal.DIGEST_MISMATCH, detail)
        require_model(index, manifest.model)
        if index.size > self._limit_mb * MIB:
            detail = f"adapters {named} have {index.size / MIB:,.1f} MiB, over {self._limit_mb:g}"
            raise PolicyRefusedError(Refusal.TOO_LARGE, f"{detail} ({LIMIT})")
        partial = self._folder / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)  # of a worker that was killed
        partial.mkdir(parents=True)
        try:
            with (partial / WEIGHTS).open("wb") as file:
                self._put_together(index, file)
            write_durably(partial / DESCRIPTION, json.dumps(index.description).encode())
            shutil.rmtree(self._folder / named, ignore_errors=True)
            os.replace(partial, self._folder / named)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(self._folder)

    def _put_together(self, index: AdapterIndex, file: BinaryIO) -> None:
        """Write the parts one after the other; none is held longer than it takes to check it."""
        for number, digest in enumerate(index.parts, 1):
            what = f"part {number} of {len(index.parts)} of adapters {index.digest}, blob"
            file.write(self._blob(digest, PART_BYTES, what))
        if file.tell() != index.size:
            detail = f"the parts of adapters {index.digest} have {file.tell()} bytes in all"
            raise PolicyRefusedError(Refusal.DIGEST_MISMATCH, f"{detail}, not {index.size}")
        file.flush()
        os.fsync(file.fileno())

    def _blob(self, digest: str, most: int, what: str) -> bytes:
        blob = self._registry.get_blob(digest, most)
        if blob is None:
            raise PolicyRefusedError(Refusal.MISSING_BLOB, f"no {what} {digest}")
        if (found := digest_of(blob)) != digest:
            detail = f"{len(blob)} bytes of digest {found} lie under {what} {digest}"
            raise PolicyRefusedError(Refusal.DIGEST_MISMATCH, detail)
        return blob
