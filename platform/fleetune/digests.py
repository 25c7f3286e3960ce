"""Digests of files' contents. A large file is read once: its digest is stored under its path, size, times and inode."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fleetune import files

LENGTH = 32  # hexadecimal digits, half of SHA-256
CHUNK_BYTES = 1 << 20
STORED_BYTES = 32 << 20  # assumed: a smaller file is read again in less than a tenth of a second
# A file that was written so recently may be written again without a visible change: clocks of file systems tick slowly.
SETTLED_SECONDS = 2.0

_digests: dict[str, str] = {}  # of this process: key of a file's state -> digest


def file_digest(path: Path) -> str:
    """The digest of a file's bytes, 32 hexadecimal digits. Raises OSError if it cannot be read."""
    status = path.stat()
    # ctime too: tools that copy a file's times along set mtime back, and none sets ctime.
    state = (path.resolve(), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    key = digest_of(map(str, state))
    stored = files.default_cache_dir() / "digests" / key if status.st_size >= STORED_BYTES else None
    if time.time() - max(status.st_mtime, status.st_ctime) < SETTLED_SECONDS:
        return _read(path)
    if key not in _digests:
        _digests[key] = (_recall(stored) if stored else None) or _read(path)
        if stored:
            _store(stored, _digests[key])
    return _digests[key]


def content_digest(content: bytes) -> str:
    """The digest of bytes that were read from a file: what `file_digest` gives for it."""
    return hashlib.sha256(content).hexdigest()[:LENGTH]


def file_digests(paths: Sequence[Path]) -> dict[str, str]:
    """Name -> digest of files of one folder, read side by side."""
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing lets other threads run
        return dict(zip((path.name for path in paths), pool.map(file_digest, paths), strict=True))


def digest_of(parts: Iterable[str]) -> str:
    """One digest of several texts, in their order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()[:LENGTH]


def _read(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()[:LENGTH]


def _recall(stored: Path) -> str | None:
    """The digest in a file of the cache; None if it is not there or damaged."""
    with contextlib.suppress(OSError, ValueError):
        text = stored.read_text(encoding="ascii")
        return text if len(text) == LENGTH else None
    return None


def _store(stored: Path, digest: str) -> None:
    """Write a digest to the cache. A cache that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        files.write(stored, digest.encode("ascii"), lasting=False)
