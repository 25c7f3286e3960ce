"""A call to a worker: how it is made, how its failure is worded, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError

from fleetune.errors import RunFailed
from fleetune.files import WriteFailed


class Call:
    """A call to a worker, from before it is dealt out until its result is taken. It may be submitted more than once."""

    def __init__(
        self, submit: Callable[[int, bool], Any], failed: Callable[[Exception], RunFailed], *, is_work_unit: bool
    ):
        """``submit``: (index of a worker, is it a retry) -> reference of the result. ``failed``: words an error for the user."""
        self.submit, self.failed, self.is_work_unit = submit, failed, is_work_unit
        self.is_retry = False
        self.num_deaths = 0  # of workers that were at this call
        self.is_done = False
        self.result: Any = None
        self.error: RunFailed | WriteFailed | None = None

    def take(self) -> Any:
        """Returns the result and drops it here, as it holds tensors; or raises the error that the call ended with."""
        if self.error is not None:
            raise self.error
        result, self.result = self.result, None
        return result


def one_line(error: Exception) -> str:
    """An error in one line: its kind and what it says."""
    name = "the worker process died" if isinstance(error, RayActorError) else type(error).__name__
    return f"{name}: {' '.join(str(error).split())}"
