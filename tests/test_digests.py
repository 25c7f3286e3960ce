"""Digests of files: a large file is read once, and again when it may have changed."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_a_large_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the next process, too; a file that was only just written is read again, for it may be written again unseen."""
    from fleetune import digests

    reads: list[Path] = []
    read = digests._read
    monkeypatch.setattr(digests, "_read", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(digests, "STORED_BYTES", 4)
    monkeypatch.setenv("FLEETUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"12345")
    fresh = digests.file_digest(file)
    assert digests.file_digest(file) == fresh
    assert len(reads) == 2
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -60.0)
    assert digests.file_digest(file) == fresh
    digests._digests.clear()  # as in another process
    assert digests.file_digest(file) == fresh
    assert len(reads) == 3
    file.write_bytes(b"12346")
    assert digests.file_digest(file) != fresh
