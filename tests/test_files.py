"""Files are whole or not there, damage is found, and writing goes on beside the caller."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import threading
from pathlib import Path

import pytest

from fleetune import files
from fleetune.errors import printable
from fleetune.files import BLANK, Behind, Damaged, WriteFailed


def sealed(path: Path, text: str = "a b c") -> bytes:
    files.write(path, f'{{"x": "{text}", "checksum": "{BLANK}"}}'.encode(), lasting=False)
    return path.read_bytes()


def test_a_sealed_file_gives_back_its_bytes_and_any_other_bytes_are_damage(tmp_path: Path):
    """Each byte changed, the file cut off anywhere, and emptied: whoever must have a checksum never takes it for whole."""
    path = tmp_path / "x.json"
    whole = sealed(path)
    assert BLANK.encode() not in whole
    assert files.read(path, holds="x", must_be_sealed=True) == whole
    others = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for other in [*others, *(whole[:i] for i in range(len(whole)))]:
        path.write_bytes(other)
        with pytest.raises(Damaged, match=r"x.json': is damaged, and with it x: .*restore it from a copy"):
            files.read(path, holds="x", must_be_sealed=True)


def test_a_mark_that_is_quoted_is_text(tmp_path: Path):
    """A file that holds another file's checksum, before its own."""
    quoted = (files.MARK + b"12345678").decode()
    whole = sealed(tmp_path / "x.json", quoted)
    assert quoted.encode() in whole
    assert files.read(tmp_path / "x.json", holds="x", must_be_sealed=True) == whole
    (tmp_path / "x.json").write_bytes(whole.replace(b"12345678", b"12345679"))
    with pytest.raises(Damaged):
        files.read(tmp_path / "x.json", holds="x")


def test_large_files_are_sealed_at_either_end(tmp_path: Path):
    for content in (BLANK.encode() + bytes(3 << 20), bytes(3 << 20) + BLANK.encode()):
        files.write(tmp_path / "x", content, lasting=False)
        whole = bytearray(files.read(tmp_path / "x", holds="x", must_be_sealed=True))
        whole[3 << 19] ^= 1
        (tmp_path / "x").write_bytes(whole)
        with pytest.raises(Damaged):
            files.read(tmp_path / "x", holds="x")


def test_what_has_no_checksum_is_read_where_none_is_needed(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"written by hand")
    assert files.read(tmp_path / "x", holds="x") == b"written by hand"


def test_a_write_that_fails_says_which_file_and_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "x"
    files.write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteFailed) as error:
        files.write(path, b"new")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert [one.name for one in tmp_path.iterdir()] == ["x"]
    assert path.read_bytes() == b"old"


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[str] = []
    monkeypatch.delenv(files.SWITCH, raising=False)
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(f"{b.name} is there"), replace(a, b)))
    files.write(tmp_path / "x", b"1")
    assert seen[0].startswith(".x.")
    assert seen[1:] == ["x is there", tmp_path.name]
    seen.clear()
    files.write(tmp_path / "y", b"2", lasting=False)
    files.sync([tmp_path / "y"])
    assert seen == ["y is there", "y", tmp_path.name]


def test_what_killed_writers_left_is_cleaned_and_what_living_ones_write_is_not(tmp_path: Path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f".x.json.{dead.pid}.0123abcd.tmp").touch()
    (tmp_path / f".x.{os.getpid()}.0123abcd.tmp").touch()
    (tmp_path / ".old.tmp").touch()
    alive = tmp_path / f".x.{os.getppid()}.0123abcd.tmp"
    alive.touch()
    files.clean(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [alive]


def test_a_caller_is_never_more_than_one_piece_of_work_ahead():
    """The first waits for the gate; the second cannot begin before, and an error comes with the next call."""
    gate, done, behind = threading.Event(), [], Behind()

    def first() -> None:
        gate.wait(5)
        done.append(1)

    def failing() -> None:
        done.append(2)
        raise WriteFailed(errno.ENOSPC, "full", "x")

    behind.begin(first)
    assert done == []
    threading.Timer(0.05, gate.set).start()
    behind.begin(failing)
    assert done[0] == 1
    with pytest.raises(WriteFailed):
        behind.wait()
    behind.wait()
    behind.close()


def test_errors_come_whole_from_another_process():
    full = pickle.loads(pickle.dumps(WriteFailed(errno.ENOSPC, "No space left on device", "/x")))
    assert (type(full), full.errno, full.filename) == (WriteFailed, errno.ENOSPC, "/x")
    found = files.damaged(Path("/x"), "why", holds="all")
    again = pickle.loads(pickle.dumps(found))
    assert (type(again), str(again), again.to_dict()) == (Damaged, str(found), found.to_dict())


def test_control_characters_are_shown_and_not_obeyed():
    assert printable("a\x1b[2J\r\x00ä\u202e\ud800\n\tb") == "a\\x1b[2J\\r\\x00ä\\u202e\\ud800\n\tb"
