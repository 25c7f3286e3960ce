"""Streams run directories into MLflow from a process of its own, so that MLflow can neither delay nor break a run.

The parent writes JSON lines to the child's stdin (``watch``, ``finished``), the child answers on its stdout
(``synced``, ``unreachable``). The child polls the directories it watches; when the store is away it tries
again, ever less often.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fleetune.records.sweep_directory import open_directory
from fleetune.redaction import redacted

if TYPE_CHECKING:
    from fleetune.tracking.tracker import Tracker

POLL_SECONDS = 1.0
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 2.0, 60.0
# After the parent has gone: how long to go on trying to reach a store that is away.
FAREWELL_SECONDS = 20.0


class RecordStream:
    """The parent's side: starts the child and tells it which run directories to stream."""

    def __init__(self, process: subprocess.Popen[str], warn: Callable[[str], None]):
        self._process, self._warn = process, warn
        self._changed = threading.Condition()
        self._complete: set[str] = set()
        self._warned: set[str] = set()
        self._reader = threading.Thread(target=self._read, name="mlflow-follower", daemon=True)
        self._reader.start()

    @classmethod
    def start(cls, *, warn: Callable[[str], None] | None = None) -> RecordStream:
        """Starts the child, which imports MLflow in the background. ``warn`` gets each warning once (default: stderr)."""
        process = subprocess.Popen(
            [sys.executable, "-m", "fleetune.tracking.stream"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            start_new_session=True,  # Ctrl-C ends the run; the child ends when its stdin does
        )
        return cls(process, warn or (lambda line: print(line, file=sys.stderr, flush=True)))

    def watch(self, run_dir: str | Path) -> None:
        """Streams this run from now on."""
        self._complete.discard(_key(run_dir))
        self._send({"watch": _key(run_dir)})

    def finished(self, run_dir: str | Path, *, timeout_seconds: float = 60.0) -> bool:
        """Waits until the store holds all of a run that has a result; False where that takes longer."""
        key = _key(run_dir)
        if key not in self._complete:
            self._send({"finished": key})
        with self._changed:
            self._changed.wait_for(lambda: key in self._complete or not self._alive(), timeout=timeout_seconds)
            return key in self._complete

    def close(self, *, timeout_seconds: float = 60.0) -> None:
        """Ends the child after a last pass over all runs; one that had no result counts as interrupted."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)

    def _alive(self) -> bool:
        return self._reader.is_alive()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message) + "\n")
        except (OSError, ValueError):
            path = next(iter(message.values()))
            self._warn_once("gone", f"the process that feeds MLflow has ended; later: fleetune sync {path}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):
                message = json.loads(line)
                if "unreachable" in message:
                    where, path = message["unreachable"], message["run_dir"]
                    text = f"MLflow at {where} is unreachable; the run goes on; later: fleetune sync {path}"
                    self._warn_once(where, f"{text} ({message['reason']})")
                elif "synced" in message:
                    with self._changed:
                        self._complete.add(message["synced"])
                        self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            self._warn(text)


class _Watched:
    """The child's side of one run: its tracker, and when to try it next."""

    def __init__(self, path: str):
        self.path = path
        self.tracker: Tracker | None = None
        self.seen: tuple[int, ...] = ()
        self.retry_seconds, self.due_at = FIRST_RETRY_SECONDS, 0.0

    def state(self) -> tuple[int, ...]:
        """Changes whenever a round, a sweep's table or the result was written."""
        stamps = []
        for name in ("checkpoint/records", "result.json", "rounds.parquet", "trials.parquet"):
            with contextlib.suppress(OSError):
                stamps.append(os.stat(os.path.join(self.path, name)).st_mtime_ns)
        return tuple(stamps)

    def push(self, *, interrupted: bool = False) -> bool:
        """One pass; True once the run is over and all of it is in the store. Raises if the store cannot be used."""
        from fleetune.tracking.sync import tracker_of

        state = self.state()
        if state == self.seen and not interrupted:
            return False
        try:
            if self.tracker is None:
                self.tracker = tracker_of(open_directory(self.path), live=True)
            over = self.tracker.run.result() is not None
            self.tracker.push(interrupted=interrupted)
        except Exception:
            self.tracker = None  # ask the store anew what it holds
            self.due_at = time.monotonic() + self.retry_seconds
            self.retry_seconds = min(2 * self.retry_seconds, LAST_RETRY_SECONDS)
            raise
        self.seen, self.retry_seconds, self.due_at = state, FIRST_RETRY_SECONDS, 0.0
        return over


def follow() -> int:
    """The child: reads messages until stdin ends, streams meanwhile, and makes a last pass."""
    os.nice(10)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing a library prints gets among the answers
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin, messages), daemon=True).start()
    watched: dict[str, _Watched] = {}
    while True:
        message: dict[str, Any] | None = {}
        with contextlib.suppress(queue.Empty):
            message = messages.get(timeout=POLL_SECONDS)
        if message is None:
            break
        for path in message.values():
            watched.setdefault(path, _Watched(path)).due_at = 0.0
        if messages.empty():
            _pass(watched, answers)
    deadline = time.monotonic() + FAREWELL_SECONDS
    while watched and time.monotonic() < deadline:
        _pass(watched, answers, interrupted=True)
        if watched:
            time.sleep(POLL_SECONDS)
    return 0


def _pass(watched: dict[str, _Watched], answers: IO[str], *, interrupted: bool = False) -> None:
    """Sends what is new of each run that is due; forgets the runs that are complete."""
    for path, run in list(watched.items()):
        if time.monotonic() < run.due_at:
            continue
        try:
            complete = run.push(interrupted=interrupted)
        except Exception as error:
            _answer(answers, {"unreachable": _store_of(path), "run_dir": path, "reason": _first_line(error)})
            continue
        if complete:
            _answer(answers, {"synced": path})
        if complete or interrupted:
            del watched[path]


def _receive(stdin: IO[str], messages: queue.Queue[dict[str, Any] | None]) -> None:
    for line in stdin:
        messages.put(json.loads(line))
    messages.put(None)


def _answer(answers: IO[str], message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent is gone
        answers.write(json.dumps(message) + "\n")


def _store_of(path: str) -> str:
    from fleetune.tracking.access import without_password
    from fleetune.tracking.tracker import Tracker

    try:
        return without_password(Tracker(open_directory(path)).uri)
    except Exception:
        return "its store"


def _first_line(error: Exception) -> str:
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]


def _key(run_dir: str | Path) -> str:
    return str(Path(run_dir).absolute())


if __name__ == "__main__":
    sys.exit(follow())
