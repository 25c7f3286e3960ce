"""Files that are complete or not there, that outlast a power cut, and that show when they were damaged.

Complete: a file is written under another name and renamed when it is finished (`replacing`, `write`). Lasting: it is fsynced
before that, and its folder afterwards; or it is fsynced later, together with others and beside the caller's next work (`sync`,
`Behind`). Shown: a file is *sealed* if it holds a mark, ``fleetune.crc32=`` and eight digits, wherever its format has room for a
text. The digits are the CRC-32 of all its bytes, with those digits as zeros; `read` refuses a file that does not match. So one
check covers JSON, Arrow, Parquet and safetensors, and any other program reads them as before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fleetune.errors import UserError

MARK = b"fleetune.crc32="
BLANK = (MARK + b"00000000").decode()
"""A writer puts it where the checksum is to stand."""
DIGITS = 8
# Bytes at either end in which marks are looked for: they stand in a header or a footer, and large files are not searched between.
SEARCHED = 1 << 20

# For benchmarks and tests alone: ``inline`` waits for every fsync at once, ``unsynced`` leaves fsync out, ``off`` the checksums
# as well. Users leave it unset, and fsyncs overlap with the next work (``overlapped``).
SWITCH = "FLEETUNE_FILES"

# If several files are fsynced at the same time, they share one commit of the file system: 64 files of 650 kB took 244 ms one by
# one and 7 ms by sixteen threads.
SYNC_THREADS = 16

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""The system's errors if a disk is full, read-only or broken."""


class WriteFailed(OSError):
    """A file could not be written: a full disk, a quota, a read-only folder. The file that was there before still is."""


class Damaged(UserError):
    """A file that was read back is not what was written."""


def damaged(
    path: Path, reason: object, *, holds: str, hint: str = "restore it from a copy, or start a new run"
) -> Damaged:
    """The error for a damaged file: its name, what is lost with it (``holds``), and what to do."""
    text = " ".join(str(reason).split())[:200]
    return Damaged(f"is damaged, and with it {holds}: {text}", field="file", value=str(path), hint=hint)


def default_cache_dir() -> Path:
    """The folder for files that can be made again: ``$FLEETUNE_CACHE``, or ``~/.cache/fleetune``."""
    return Path(os.environ.get("FLEETUNE_CACHE") or "~/.cache/fleetune").expanduser()


# -- writing --------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: Path, *, lasting: bool = False, former: Path | None = None) -> Iterator[Path]:
    """A path to write to, whose file becomes ``path`` when the block ends; nothing is left of it if the block fails.

    ``lasting``: it is on the disk when this returns. ``former``: the new name of the file that is there now. Raises `WriteFailed`
    for every OSError.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        if lasting:
            _sync_file(scratch)  # before the rename: else a power cut could leave the name with a file that is empty
        if former is not None and path.exists():
            os.replace(path, former)
        os.replace(scratch, path)
        if lasting:
            _sync_folder(path.parent)
    except OSError as error:
        raise WriteFailed(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def write(path: Path, content: bytes | memoryview, *, lasting: bool = True, former: Path | None = None) -> None:
    """Write a file in one step, sealed if ``content`` holds `BLANK`. Readers see the old one or the new one (`replacing`)."""
    with replacing(path, lasting=lasting, former=former) as scratch, scratch.open("wb") as file:
        for piece in _sealed(memoryview(content)):
            file.write(piece)


def sync(paths: Iterable[Path]) -> None:
    """Return once these files and their names in their folders are on the disk. Raises `WriteFailed`."""
    paths = list(paths)
    if not _is_synced() or not paths:
        return
    with ThreadPoolExecutor(min(SYNC_THREADS, len(paths))) as pool:
        list(pool.map(_sync_file, paths))
    for folder in dict.fromkeys(path.parent for path in paths):
        _sync_folder(folder)


def clean(folder: Path) -> None:
    """Delete the scratch files that killed writers left in a folder and those below it. Those of live processes stay."""
    for scratch in folder.rglob(".*.tmp"):
        writer = scratch.name.split(".")[-3]
        if not (writer.isdecimal() and _is_another_alive(int(writer))):
            scratch.unlink(missing_ok=True)


class Behind:
    """Writes in a thread of its own, beside its caller, who is never more than one piece of work ahead."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fleetune-files")
        self._last: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Begin a piece of work, once the one before is done. Raises what that one raised."""
        self.wait()
        if os.environ.get(SWITCH) == "inline":
            work()
        else:
            self._last = self._pool.submit(work)

    def wait(self) -> None:
        """Return once the last piece of work is done. Raises what it raised, once."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """Return once the last piece of work is done, whether or not it failed. No other can be begun."""
        self._pool.shutdown(wait=True)


def _is_synced() -> bool:
    return os.environ.get(SWITCH) not in ("unsynced", "off")


def _sync_file(path: Path) -> None:
    if not _is_synced():
        return
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteFailed(error.errno, error.strerror, str(path)) from error


def _sync_folder(folder: Path) -> None:
    """A rename lasts once the folder does. Some network file systems have no fsync of folders; theirs need none."""
    if not _is_synced():
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def _is_another_alive(process_id: int) -> bool:
    import psutil

    return process_id != os.getpid() and psutil.pid_exists(process_id)  # this process cleans and does not write


# -- sealing, and reading back --------------------------------------------------------------------------------------------
def read(path: Path, *, holds: str, must_be_sealed: bool = False) -> bytes:
    """A file's bytes. ``holds``: what is lost with it, for the message.

    Raises `Damaged` if its checksum does not match, or it must have one and has none; FileNotFoundError if it is missing.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise damaged(path, error.strerror or error, holds=holds) from None
    is_right = _is_right(content)
    if is_right is False:
        raise damaged(path, "its checksum does not match", holds=holds)
    if is_right is None and must_be_sealed and os.environ.get(SWITCH) != "off":
        raise damaged(path, "it has no checksum" if content else "it is empty", holds=holds)
    return content


@contextlib.contextmanager
def parsing(path: Path, *, holds: str) -> Iterator[None]:
    """Raises `Damaged` for any error in the block, in which a library reads bytes that may not be what it expects."""
    try:
        yield
    except (Damaged, FileNotFoundError, MemoryError):
        raise
    except Exception as error:
        raise damaged(path, f"{type(error).__name__}: {error}", holds=holds) from None


def checksum(*pieces: bytes | memoryview) -> int:
    """CRC-32 of bytes one after the other: 2.4 GB/s on one core here, and any one burst of 32 bits or less is found."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def _sealed(content: memoryview) -> Iterator[bytes | memoryview]:
    """The content in pieces, its blank marks filled in; unchanged if it has none. Pieces, because content may be large."""
    blanks = [mark for mark in _marks(content) if content[mark : mark + DIGITS] == b"0" * DIGITS]
    if not blanks or os.environ.get(SWITCH) == "off":
        yield content
        return
    digits = b"%08x" % checksum(content)
    start = 0
    for mark in blanks:
        yield content[start:mark]
        yield digits
        start = mark + DIGITS
    yield content[start:]


def _is_right(content: bytes) -> bool | None:
    """True if the content matches its checksum; None if it has none."""
    marks = _marks(memoryview(content))
    if not marks or os.environ.get(SWITCH) == "off":
        return None
    # The content may quote another file's mark: one with other digits than the last mark's is text.
    digits = content[marks[-1] : marks[-1] + DIGITS]
    view, pieces, start = memoryview(content), [], 0
    for mark in marks:
        if content[mark : mark + DIGITS] == digits:
            pieces += [view[start:mark], memoryview(b"0" * DIGITS)]
            start = mark + DIGITS
    return digits == b"%08x" % checksum(*pieces, view[start:])


def _marks(content: memoryview) -> list[int]:
    """Offsets at which the digits of the marks begin, ascending."""
    found: set[int] = set()
    starts = (0,) if len(content) <= 2 * SEARCHED else (0, len(content) - SEARCHED)
    for start in starts:
        text = bytes(content[start : start + (2 * SEARCHED if len(starts) == 1 else SEARCHED)])
        at = text.find(MARK)
        while at >= 0:
            found.add(start + at + len(MARK))
            at = text.find(MARK, at + 1)
    return sorted(found)
