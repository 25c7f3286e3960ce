"""Changes to the files that a run has read."""

from __future__ import annotations

from pathlib import Path


def flipped(path: Path) -> None:
    """Another bit in the last byte: same name, same size."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_answers(path: Path) -> None:
    path.write_text(path.read_text().replace("#### 1", "#### 2"))


def a_blank_more(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


def a_faster_link(path: Path) -> None:
    path.write_text(path.read_text().replace("10 Mbit/s", "20 Mbit/s"))
