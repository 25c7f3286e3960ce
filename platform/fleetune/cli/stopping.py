"""How a command ends when it is stopped: Ctrl-C and SIGTERM alike."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from fleetune.cli.output import complain
from fleetune.errors import Stopped

STOPPED = 130
"""Exit status of a command that Ctrl-C or SIGTERM ended."""


@contextlib.contextmanager
def stop_once() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does; further signals are ignored, because they would interrupt the clean-up."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    watched = [number for number, handler in handlers.items() if handler is not signal.SIG_IGN]  # as under nohup
    if threading.current_thread() is not threading.main_thread():
        watched = []  # Python lets only the main thread set handlers

    def stop(*_: Any) -> None:
        for number in watched:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in watched:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in watched:
            if signal.getsignal(number) is stop:  # not after a stop: until the process has ended, signals stay ignored
                signal.signal(number, handlers[number])


@contextlib.contextmanager
def saying_how_to_go_on() -> Iterator[None]:
    """Prints how to continue a stopped run. Here and not in `main`: the option parser catches Ctrl-C and drops its text."""
    try:
        yield
    except Stopped as stopped:
        raise SystemExit(complain(f"stopped; go on with {stopped}", {"error": "stopped"}, status=STOPPED)) from None
