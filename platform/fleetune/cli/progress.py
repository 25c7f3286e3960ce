"""What a person sees while a run goes on: a bar with rounds, loss, virtual time and ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fleetune.errors import printable
from fleetune.units import duration


class Progresses(Protocol):
    """Takes a coordinator's events; used as a context."""

    def __enter__(self) -> Progresses: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event."""
        ...


def make_progress(title: str) -> Progresses:
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
    if "depth" in row:
        parts.append(f"depth {row['depth']:.0f}")
    for status in ("oom", "refused", "dropped", "late", "failed"):
        if row.get(f"num_{status}"):
            parts.append(f"{row[f'num_{status}']} {status}")
    parts.append(f"sim {duration(row['sim_seconds'])}")
    return " · ".join(parts)


class Lines:
    """One line per round."""

    def __init__(self, title: str):
        self.title = title
        self.started = time.perf_counter()
        self.baseline = Untrained()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, event: dict[str, Any]) -> None:
        """Print the event."""
        if event["kind"] == "start":
            _say(_heading(self.title, event) + self.baseline.first_told(event))
        elif event["kind"] == "round":
            if told := self.baseline.first_told(event):
                _say(f"{self.title}{told}")
            elapsed = time.perf_counter() - self.started
            _say(f"round {event['round']}/{event['num_rounds']} · {describe(event['row'])} · {duration(elapsed)}")


class Bar:
    """A progress bar; evaluated rounds leave a line above it."""

    def __init__(self, title: str):
        self.title = title
        self.baseline = Untrained()
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
            heading = _heading(self.title, event) + self.baseline.first_told(event)
            self.progress.console.print(heading, highlight=False)
        if event["kind"] == "round":
            if told := self.baseline.first_told(event):
                self.progress.console.print(f"{self.title}{told}", highlight=False)
            row = event["row"]
            self.progress.update(self.task, shown=describe(row))
            if row.get("eval_loss") is not None:
                self.progress.console.print(f"round {event['round']}: {describe(row)}", highlight=False)


def _heading(title: str, event: dict[str, Any]) -> str:
    """What is run, and what was picked for its execution."""
    chosen = event["execution"]
    where = (
        "this process"
        if chosen["kind"] == "serial"
        else f"{chosen['workers']} Ray workers of {chosen['threads']} thread(s)"
    )
    how = chosen["device"] if chosen["precision"] == "fp32" else f"{chosen['device']} in {chosen['precision']}"
    if chosen["kernels"] == "compiled":
        how += " with compiled kernels"
    shown = f"{title}: {event['num_rounds']} rounds in {where} on {how}, cohorts of {chosen['cohort']}"
    return f"{shown}, going on after round {event['round']}" if event["round"] > 0 else shown


class Untrained:
    """The untrained model's quality, told once: on Ray it is worked out beside the first round."""

    def __init__(self) -> None:
        self.is_told = False

    def first_told(self, event: dict[str, Any]) -> str:
        """What to add to a line; empty where it is not known yet, was told, or the run goes on."""
        base = event["baseline"]
        if self.is_told or not base:
            return ""
        self.is_told = True
        if event["kind"] == "start" and event["round"] > 0:
            return ""
        if "eval_accuracy" in base:
            return f", untrained accuracy {base['eval_accuracy']:.1%}"
        return f", untrained loss {base['eval_loss']:.3f}"


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
