"""Progress of a run on stderr: a bar with rounds, loss, virtual time and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fleetune.columns import ROUND_COLUMNS
from fleetune.errors import printable
from fleetune.units import duration

NOT_OK = tuple(c.name for c in ROUND_COLUMNS if c.metric.startswith("clients/") and c.name != "num_ok")
"""The columns that count a round's clients by status, without those whose update counted."""


class RunProgress(Protocol):
    """Shows a coordinator's events; used as a context."""

    def __enter__(self) -> RunProgress: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event."""
        ...


def make_progress(title: str) -> RunProgress:
    """A bar on a terminal, lines otherwise; always on stderr."""
    title = printable(title)
    return Bar(title) if sys.stderr.isatty() else Lines(title)


def describe(row: dict[str, Any]) -> str:
    """One round in a line."""
    parts = []
    if row.get("train_loss") is not None:
        parts.append(f"loss {row['train_loss']:.3f}")
    if row.get("eval_loss") is not None:
        parts.append(f"eval loss {row['eval_loss']:.3f}")
    if row.get("eval_accuracy") is not None:
        parts.append(f"accuracy {row['eval_accuracy']:.1%}")
    if row.get("eval_personal_loss") is not None:
        parts.append(f"clients' own {row['eval_personal_loss']:.3f}")
    if "depth" in row:
        parts.append(f"depth {row['depth']:.0f}")
    for name in NOT_OK:
        if row.get(name):
            parts.append(f"{row[name]} {name.removeprefix('num_')}")
    parts.append(f"sim {duration(row['sim_seconds'])}")
    return " · ".join(parts)


class Lines:
    """One line per round."""

    def __init__(self, title: str):
        self.title = title
        self.started = time.perf_counter()
        self.baseline = BaselineText()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, event: dict[str, Any]) -> None:
        """Print the event."""
        if event["kind"] == "start":
            _say(_heading(self.title, event) + self.baseline.once(event))
        elif event["kind"] == "round":
            if text := self.baseline.once(event):
                _say(f"{self.title}{text}")
            elapsed = time.perf_counter() - self.started
            _say(f"round {event['round']}/{event['num_rounds']} · {describe(event['row'])} · {duration(elapsed)}")


class Bar:
    """A progress bar; evaluated rounds leave a line above it."""

    def __init__(self, title: str):
        self.title = title
        self.baseline = BaselineText()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self.task = self.progress.add_task(f"{title} · starting", total=None, shown="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Move the bar."""
        self.progress.update(self.task, description=self.title, total=event["num_rounds"], completed=event["round"])
        if event["kind"] == "start":
            heading = _heading(self.title, event) + self.baseline.once(event)
            self.progress.console.print(heading, highlight=False)
        if event["kind"] == "round":
            if text := self.baseline.once(event):
                self.progress.console.print(f"{self.title}{text}", highlight=False)
            row = event["row"]
            self.progress.update(self.task, shown=describe(row))
            if row.get("eval_loss") is not None:
                self.progress.console.print(f"round {event['round']}: {describe(row)}", highlight=False)


def _heading(title: str, event: dict[str, Any]) -> str:
    """The first line: the run, and how it is executed, with every ``auto`` decided."""
    execution = event["execution"]
    location = (
        "this process"
        if execution["kind"] == "serial"
        else f"{execution['workers']} Ray workers of {execution['threads']} thread(s)"
    )
    products = (
        execution["device"]
        if execution["precision"] == "fp32"
        else f"{execution['device']} in {execution['precision']}"
    )
    if execution["kernels"] == "compiled":
        products += " with compiled kernels"
    shown = f"{title}: {event['num_rounds']} rounds in {location} on {products}, cohorts of {execution['cohort']}"
    return f"{shown}, going on after round {event['round']}" if event["round"] > 0 else shown


class BaselineText:
    """The untrained model's quality as text, given once: on Ray it is computed beside the first round and comes later."""

    def __init__(self) -> None:
        self.is_done = False

    def once(self, event: dict[str, Any]) -> str:
        """Text to add to a line; empty if there is no baseline yet, if it was given, or if the run is a resumed one."""
        base = event["baseline"]
        if self.is_done or not base:
            return ""
        self.is_done = True
        if event["kind"] == "start" and event["round"] > 0:
            return ""
        if "eval_accuracy" in base:
            return f", untrained accuracy {base['eval_accuracy']:.1%}"
        return f", untrained loss {base['eval_loss']:.3f}"


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
