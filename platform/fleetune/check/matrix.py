"""Runs all checks on one method and says which it breaks, as `fleetune check` shows it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fleetune.check import runs
from fleetune.check.contract import CHECKS, Case, Check, NotApplicable, reference, spec_of
from fleetune.errors import UserError
from fleetune.problem import set_threads

PACKAGE = Path(__file__).parent.parent
OK, BROKEN, NOT_APPLICABLE = "ok", "broken", "not applicable"


@dataclass(frozen=True)
class Outcome:
    """What a check found."""

    check: str
    """The check's name, in words."""
    status: str
    """`OK`, `BROKEN` or `NOT_APPLICABLE`."""
    expected: str
    """What holds for a method that keeps the contract."""
    found: str | None
    """What was found instead, or why the check does not apply; None if all is well."""
    seconds: float


def outcomes(name: str, overrides: Mapping[str, Any]) -> Iterator[Outcome]:
    """Run every check on a method, one after the other. ``overrides``: dotted fields of the tiny job, such as the method's.

    Raises UserError if there is no such method, or if it refuses its settings in the tiny world. The checks' runs lie in a
    temporary folder and are gone afterwards.
    """
    if not __debug__:  # `python -O` leaves out the very statements that find something
        raise UserError("checks need Python's assertions", field="python -O", hint="leave out -O and PYTHONOPTIMIZE")
    case = Case(name, overrides=dict(overrides))
    with _quietly():
        runs.problem(spec_of(case))
    with _quietly(), _temporary_files_together():
        try:
            for check_name, check in CHECKS.items():
                start = time.monotonic()
                status, found = _outcome(check, case)
                words = check_name.replace("_", " ")
                expected = " ".join((inspect.getdoc(check) or words).split())
                yield Outcome(words, status, expected, found, time.monotonic() - start)
        finally:
            reference.cache_clear()  # its run directory goes


def _outcome(check: Check, case: Case) -> tuple[str, str | None]:
    try:
        check(case)
    except NotApplicable as reason:
        return NOT_APPLICABLE, str(reason)
    except AssertionError as error:
        text = str(error).strip()
        return BROKEN, " ".join(text.split()) if text else f"this does not hold: {_statement(error)}"
    except Exception as error:  # the method is the user's code, and may do anything
        return BROKEN, f"{type(error).__name__}: {' '.join(str(error).split())} ({_place(error)})"
    return OK, None


def _statement(error: AssertionError) -> str:
    """The assertion of this package that failed, as it is written there."""
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    return re.sub(r"^assert ", "", lines[-1] or "") if lines else "an assertion of the method's own"


def _place(error: Exception) -> str:
    """File and line where an error was raised: in the user's own code, if that is among the calls."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_ours(frame.filename) and "site-packages" not in frame.filename]
    last = (own or frames)[-1]
    return f"{last.filename}, line {last.lineno}"


def _is_ours(filename: str) -> bool:
    return Path(filename).is_relative_to(PACKAGE)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """In the block, nothing is said of the tiny world itself, such as that its few sums are all much the same; one thread."""
    from transformers.utils import logging as progress

    progress.disable_progress_bar()
    before, threads = logging.root.manager.disable, torch.get_num_threads()
    logging.disable(logging.WARNING)
    set_threads(1)
    try:
        yield
    finally:
        logging.disable(before)
        set_threads(threads)


@contextlib.contextmanager
def _temporary_files_together() -> Iterator[None]:
    """In the block, all temporary folders are made in one, which is deleted at its end."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="fleetune-check-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
