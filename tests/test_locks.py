"""Locks between processes: one holder at a time, and none that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import Timeout

from fleetune.locks import locked

HOLD = """
import os, sys, time
from pathlib import Path
from fleetune.locks import locked
with locked(Path(sys.argv[1])):
    child = os.fork()  # it lives on when its parent is killed
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def is_free(path: Path) -> bool:
    try:
        with locked(path, patience_seconds=0):
            return True
    except Timeout:
        return False


def test_a_killed_holder_frees_its_lock_whatever_children_it_leaves(tmp_path: Path):
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            assert not is_free(path)
            holder.kill()
            with locked(path, patience_seconds=10):
                os.kill(child, 0)  # raises if the child is gone
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_is_let_go_by_another_thread_than_took_it(tmp_path: Path):
    """As when a generator is closed by the garbage collector of another thread."""
    path = tmp_path / "lock"
    held = locked(path)
    held.acquire()
    assert not is_free(path)
    thread = threading.Thread(target=held.release)
    thread.start()
    thread.join()
    assert is_free(path)


def test_a_failure_lets_go(tmp_path: Path):
    with pytest.raises(ValueError, match="inside"), locked(tmp_path / "lock"):
        raise ValueError("inside")
    assert is_free(tmp_path / "lock")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_an_error_at_once(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        locked(tmp_path / "lock").acquire()
