"""Locks between processes: whoever holds a file's lock works alone, until it lets go or dies."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock


def locked(path: Path, *, patience_seconds: float = -1.0) -> FileLock:
    """The lock of a file, to be held in a ``with``. Raises `filelock.Timeout` if it is not free in time (-1: waits for ever).

    On POSIX it is flock: the kernel frees it when its holder dies, however that happens, so no stale lock has to be cleaned up. A
    forked child does not inherit it, and so cannot keep it when its parent is gone.
    """
    # Generators hold locks too, and those may be closed in another thread than they began in. A lock of one thread alone, which
    # is filelock's default, would not be freed there.
    return FileLock(path, timeout=patience_seconds, thread_local=False)
