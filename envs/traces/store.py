"""The trace store: a folder of Parquet chunks and the manifest that lists them.

A chunk is written durably before the manifest names it, and readers open only what the manifest
names: a crash leaves an unlisted file at worst, never half of a recording.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from offramp.controller.durable import write_durably
from offramp.controller.errors import ConfigError, TraceError
from offramp.controller.features import SCHEMAS
from offramp.controller.traces import TRACE_VERSION, TraceChunk, TraceHeader
from offramp.envs.traces.chunk_file import decode, encode
from offramp.envs.traces.tokens import TokenTraces

MANIFEST = "manifest.json"
"""Name of the manifest in a store's folder."""


class ChunkEntry(BaseModel, frozen=True, extra="forbid"):
    """One line of the manifest.

    Attributes:
        name: File name of the chunk, in the store's folder.
        rows: Number of tokens.
        document: SHA-256 of the document's text.
        sha256: SHA-256 of the file.
        split: What the document is for, such as ``train``.
    """

    name: str = Field(pattern=r"^\d{6}-[0-9a-f]{12}\.parquet$")
    rows: int = Field(gt=0)
    document: str
    sha256: str
    split: str = Field(min_length=1)


class StoreManifest(BaseModel, frozen=True, extra="forbid"):
    """The content of ``manifest.json``.

    Attributes:
        version: TRACE_VERSION of the chunks.
        header: What all chunks share.
        chunks: Entries in order of appending.
    """

    version: int
    header: TraceHeader
    chunks: tuple[ChunkEntry, ...] = ()


class TraceStore:
    """Recorded tokens on disk: many readers, one writer at a time.

    Use ``create`` or ``open``.

    Attributes:
        folder: Where the chunks and the manifest lie.
    """

    def __init__(self, folder: Path, manifest: StoreManifest) -> None:
        self.folder = folder
        self._manifest = manifest

    @classmethod
    def create(cls, folder: Path | str, header: TraceHeader) -> TraceStore:
        """Start an empty store.

        Raises:
            TraceError: the folder already holds a store or cannot be written, or the schema is
                unknown.
        """
        path = Path(folder)
        if (path / MANIFEST).exists():
            raise TraceError(
                str(path), "already holds a trace store", "Open it or choose another folder"
            )
        _check_schema(path, header)
        store = cls(path, StoreManifest(version=TRACE_VERSION, header=header))
        store._commit(store._manifest)
        return store

    @classmethod
    def open(cls, folder: Path | str) -> TraceStore:
        """Open an existing store; chunks are read and checked later.

        Raises:
            TraceError: there is no store, or its manifest is unreadable, of another version or
                of an unknown feature schema.
        """
        path = Path(folder)
        manifest = _read_manifest(path / MANIFEST)
        _check_schema(path, manifest.header)
        return cls(path, manifest)

    @property
    def header(self) -> TraceHeader:
        """What all chunks share."""
        return self._manifest.header

    @property
    def chunks(self) -> tuple[ChunkEntry, ...]:
        """The manifest's entries, in order of appending."""
        return self._manifest.chunks

    def append(self, chunk: TraceChunk, split: str) -> None:
        """Add a chunk: durable when this returns, absent if it raises.

        Raises:
            TraceError: the chunk is empty or has other exits or features, or its document
                already lies in another split; or the folder cannot be written (permission, full
                disk), and the store is as before.
        """
        self._check_split(chunk.document, split)
        content = encode(chunk, self.header)
        digest = hashlib.sha256(content).hexdigest()
        entry = ChunkEntry(
            name=f"{self._next_number():06d}-{digest[:12]}.parquet",
            rows=len(chunk),
            document=chunk.document,
            sha256=digest,
            split=split,
        )
        write_traces(self.folder / entry.name, content)
        self._commit(self._manifest.model_copy(update={"chunks": (*self.chunks, entry)}))

    def drop(self, count: int) -> None:
        """Forget the oldest chunks: the manifest first, so that readers miss no listed file.

        Raises:
            TraceError: the manifest cannot be written, and the store is as before.
        """
        gone, kept = self.chunks[:count], self.chunks[count:]
        self._commit(self._manifest.model_copy(update={"chunks": kept}))
        for entry in gone:
            (self.folder / entry.name).unlink(missing_ok=True)

    def read(self, split: str | None = None) -> TokenTraces:
        """All tokens of a split; None reads every split.

        Raises:
            TraceError: no chunk is in the split, or a chunk is missing or damaged.
        """
        entries = [entry for entry in self.chunks if split in (None, entry.split)]
        if not entries:
            held = sorted({entry.split for entry in self.chunks})
            raise TraceError(
                str(self.folder),
                f"holds no chunk of split {split!r} (it has {held})" if held else "holds no chunk",
                "Record some documents first",
            )
        return TokenTraces.from_chunks(self.header, map(self.load, entries))

    def verify(self) -> None:
        """Read every chunk and check it.

        Raises:
            TraceError: a chunk is missing or damaged.
        """
        for entry in self.chunks:
            self.load(entry)

    def load(self, entry: ChunkEntry) -> TraceChunk:
        """One chunk of the manifest.

        Raises:
            TraceError: it is missing or damaged.
        """
        path = self.folder / entry.name
        return _decode_named(path, _read_checked(path, entry.sha256), self.header, entry)

    def _next_number(self) -> int:
        """One more than the newest chunk's, whatever was dropped before it."""
        return int(self.chunks[-1].name.split("-")[0]) + 1 if self.chunks else 0

    def _commit(self, manifest: StoreManifest) -> None:
        content = manifest.model_dump_json(indent=1).encode()
        write_traces(self.folder / MANIFEST, content)
        self._manifest = manifest

    def _check_split(self, document: str, split: str) -> None:
        # A document on both sides of a split would leak what is tested into what is trained.
        others = {e.split for e in self.chunks if e.document == document} - {split}
        if others:
            raise TraceError(
                "split",
                f"document {document[:12]} already lies in {min(others)!r}, not {split!r}",
                "Split by document",
            )


def open_traces(
    traces: TokenTraces | None, store: Path | str | None, split: str | None
) -> TokenTraces:
    """The traces given, or those of a store's split.

    Raises:
        ConfigError: not exactly one of ``traces`` and ``store`` is given, or ``split`` is given
            without ``store``.
        TraceError: the store cannot be read.
    """
    if traces is not None and store is None:
        if split is not None:
            raise ConfigError("split", "is given without store", "Name the store's folder too")
        return traces
    if store is not None and traces is None:
        return TraceStore.open(store).read(split)
    raise ConfigError("traces", "or store must be given, and not both")


def _check_schema(path: Path, header: TraceHeader) -> None:
    if header.schema not in SCHEMAS:
        raise TraceError(
            str(path),
            f"has the unknown feature schema {header.schema[:12]!r}",
            "Record again with this version of offramp",
        )


def write_traces(path: Path, content: bytes) -> None:
    """Replace a file of a trace folder durably.

    Raises:
        TraceError: it cannot be written (permission, full disk); an older one is untouched.
    """
    try:
        write_durably(path, content)
    except OSError as error:
        raise TraceError(
            str(path),
            f"cannot be written ({error.strerror or error})",
            "Make room, or name a folder you may write to; what lies there already is whole",
        ) from error


def _read_manifest(path: Path) -> StoreManifest:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TraceError(str(path), "does not exist", "Record traces into this folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(
            str(path), f"is unreadable ({error})", "Restore it from a copy or record again"
        ) from error
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != TRACE_VERSION:
        raise TraceError(
            str(path),
            f"is of trace version {version!r}, not {TRACE_VERSION}",
            "Record again with this version of offramp",
        )
    try:
        return StoreManifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise TraceError(
            str(path),
            f"is no trace manifest: {'.'.join(map(str, first['loc']))}: {first['msg']}",
            "Restore it from a copy or record again",
        ) from error


def _read_checked(path: Path, sha256: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TraceError(
            str(path),
            f"is listed in the manifest but cannot be read ({error.strerror})",
            "Restore it from a copy or record again",
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise TraceError(
            str(path),
            "is damaged: its checksum is not the manifest's",
            "Restore it from a copy or record again",
        )
    return content


def _decode_named(path: Path, content: bytes, header: TraceHeader, entry: ChunkEntry) -> TraceChunk:
    try:
        chunk = decode(content, header, entry.document)
    except TraceError as error:
        raise TraceError(
            str(path), f"is unusable: {error.field} {error.problem}", "Record again"
        ) from error
    if len(chunk) != entry.rows:
        raise TraceError(str(path), f"has {len(chunk)} rows, not {entry.rows}", "Record again")
    return chunk
