"""Files that are either the old or the new content, never half of one."""

from __future__ import annotations

import fcntl
import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_durably(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file atomically: write, fsync, rename, fsync the folder.

    What a writer left behind that was killed in the middle of it is removed.

    Args:
        path: The file; its folder is made if missing.
        content: Becomes the whole of it.
        replace: Whether a file that is there already gives way.

    Raises:
        FileExistsError: it is there already, and was not to be replaced.
        OSError: the folder cannot be written; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    descriptor, name = _temporary(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if replace:
                os.replace(name, path)
            else:
                os.link(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def lock_file(path: Path, *, wait: bool = True, make: bool = True) -> Iterator[bool]:
    """Hold the lock of a file while the block runs; whoever dies lets go of it.

    Args:
        path: The file; its content does not matter.
        wait: Whether to wait for whoever holds it.
        make: Whether to make the file if it is missing.

    Yields:
        Whether the lock is held; always so if it was waited for.

    Raises:
        OSError: the file cannot be opened.
    """
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
    try:
        yield _is_locked(descriptor, wait)
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _temporary(path: Path) -> tuple[int, str]:
    """A new file beside the other, locked for as long as its writer lives."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, name):
            return descriptor, name
        os.close(descriptor)  # swept away before it was locked


def _is_at(descriptor: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(name))
    except FileNotFoundError:
        return False


def _sweep(path: Path) -> None:
    """Remove the temporary files of writers that are dead: nobody holds their locks."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        try:
            with lock_file(left, wait=False, make=False) as is_dead:
                if is_dead:
                    left.unlink(missing_ok=True)
        except OSError:  # another user's, or gone meanwhile: no reason not to write
            continue


def sync_folder(folder: Path) -> None:
    """Bring to disk which files a folder holds.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
