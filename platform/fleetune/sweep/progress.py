"""Progress of a sweep on stderr: a live table on a terminal, a line per trial elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from fleetune.errors import printable
from fleetune.sweep.config import SweepSpec
from fleetune.sweep.expansion import label
from fleetune.sweep.status import Entry, SweepStatus
from fleetune.units import duration

MAX_ROWS = 24  # of the live table: what is running, then the best
SECONDS_BETWEEN = 0.25


class Progress(Protocol):
    """Shows the sweep's status whenever it has changed; used as a context."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, sweep_status: SweepStatus) -> None:
        """Show the status."""
        ...


def make_progress(sweep: SweepSpec) -> Progress:
    """A live table on a terminal, lines otherwise; always on stderr."""
    return LiveTable(sweep) if sys.stderr.isatty() else Lines(sweep)


def headline(sweep_status: SweepStatus) -> str:
    """Trials by state, the best so far, and how long it will take."""
    parts = [" · ".join(f"{number} {state}" for state, number in sweep_status.counts().items())]
    best, eta = sweep_status.best_line(), sweep_status.eta_seconds()
    parts += [f"best {best}"] if best else []
    parts += [f"eta {duration(eta)}"] if eta else []
    return " · ".join(parts)


class Lines:
    """One line whenever a trial is over."""

    def __init__(self, sweep: SweepSpec):
        self.sweep = sweep
        self.printed: set[int] = set()
        """Numbers of the trials whose end has been printed; -1 stands for the headline alone."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None: ...

    def __call__(self, sweep_status: SweepStatus) -> None:
        """Print the trials that have ended since the last call; at the first one the headline."""
        over = {n for n, e in sweep_status.entries.items() if e.status not in ("missing", "running")}
        if not self.printed:
            print(printable(f"{self.sweep.name}: {headline(sweep_status)}"), file=sys.stderr, flush=True)
            self.printed = over if sweep_status.num_rounds_done == 0 else {-1}
        for number in sorted(over - self.printed):
            entry = sweep_status.entries[number]
            how = f"failed: {entry.error}" if entry.status == "failed" else f"{entry.status} · {_metrics(entry)}"
            line = f"trial {number} {label(entry.trial.overrides)} · {how} · {headline(sweep_status)}"
            print(line, file=sys.stderr, flush=True)
        self.printed |= over


class LiveTable:
    """A table that is redrawn in place."""

    def __init__(self, sweep: SweepSpec):
        self.sweep = sweep
        self.live = Live(printable(f"{sweep.name} · starting"), console=Console(stderr=True), auto_refresh=False)
        self.drawn = 0.0

    def __enter__(self) -> LiveTable:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def __call__(self, sweep_status: SweepStatus) -> None:
        """Redraw the table, a few times a second at most."""
        now = time.monotonic()
        if now - self.drawn > SECONDS_BETWEEN or sweep_status.counts().get("running", 0) == 0:
            self.drawn = now
            self.live.update(draw(sweep_status), refresh=True)


def draw(sweep_status: SweepStatus) -> Any:
    """The table: running trials, then those that are over, the best first."""
    entries = list(sweep_status.entries.values())
    running = [e for e in entries if e.status == "running"]
    over = [e for e in entries if e.status not in ("running", "missing")]
    over.sort(
        key=lambda e: (e.status == "failed", -sweep_status.sweep.sign * (sweep_status.value(e) or 0.0), e.trial.number)
    )
    table = Table("trial", "sets", "state", "round", "loss", "accuracy", box=None, pad_edge=False)
    for entry in [*running, *over][:MAX_ROWS]:
        rounds = f"{entry.num_rounds}/{entry.trial.spec.rounds.num_rounds}"
        loss, accuracy = entry.metrics.get("eval_loss"), entry.metrics.get("eval_accuracy")
        table.add_row(
            str(entry.trial.number),
            label(entry.trial.overrides),
            entry.status,
            rounds,
            "" if loss is None else f"{loss:.3f}",
            "" if accuracy is None else f"{accuracy:.1%}",
        )
    hidden = len(running) + len(over) - MAX_ROWS
    rest = [f"… and {hidden} more"] if hidden > 0 else []
    return Group(printable(f"{sweep_status.sweep.name} · {headline(sweep_status)}"), table, *rest)


def _metrics(entry: Entry) -> str:
    accuracy, loss = entry.metrics.get("eval_accuracy"), entry.metrics.get("eval_loss")
    parts = [f"accuracy {accuracy:.1%}"] if accuracy is not None else []
    parts += [f"eval loss {loss:.3f}"] if loss is not None else []
    return " · ".join(parts)
