"""What all benchmarks share: medians, tables, the memory of a process tree, and what else the machine was doing."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


def like_a_worker() -> None:
    """Begin this program anew with the allocator's settings that a worker has, which a process reads when it starts."""
    # Here, because it imports Ray, and some of these measure memory and imports.
    from fleetune.engine.launch.cluster import ALLOCATOR

    if not ALLOCATOR.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**ALLOCATOR, **os.environ})


def median_and_min(values: Sequence[float]) -> tuple[float, float]:
    """The two figures that every table shows: the median, and the best (least disturbed) one."""
    return statistics.median(values), min(values)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns; floats with three significant digits."""
    if not rows:
        return "(nothing measured)"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
             for line in cells]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)


def report(benchmark: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for people, and the same as one JSON document on the last line of stdout."""
    print(table(rows))
    print(json.dumps({"benchmark": benchmark, "machine": machine(), "rows": [dict(row) for row in rows]}), flush=True)


def machine() -> dict[str, Any]:
    """Cores, load (1, 5, 15 minutes) and versions, for the record."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = [round(x, 2) for x in os.getloadavg()]
    return {"cores": cores, "load": load, "python": platform.python_version(), "torch": torch.__version__}


def matmul_flops_per_second(
    size: int = 1024,
    *,
    repeats: int = 12,
    clock: Callable[[], float] = time.perf_counter,
    device: str = "cpu",
    precision: str = "fp32",
) -> float:
    """What this machine reaches on a square product with the threads that are set: the best of some."""
    import torch

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        started = clock()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return 2.0 * size**3 / best


# -- memory, from /proc (Linux) ---------------------------------------------------------------------------------------
def descendants(root: int) -> list[int]:
    """Process ids of ``root`` and everything that it started."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    out = [root]
    for pid in out:
        out += children.get(pid, [])
    return out


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size: a page that n processes map counts as 1/n in each, so sums count every page once."""
    return sum(_rollup(pid).get("Pss", 0) for pid in pids)


def _rollup(pid: int) -> dict[str, int]:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return _fields(file.readlines()[1:])
    except OSError:
        return {}


class PeakMemory:
    """The most proportional memory of a process and all that it starts, looked at every tenth of a second."""

    def __init__(self, root: int, *, interval_seconds: float = 0.1):
        self.root, self.interval_seconds, self.bytes = root, interval_seconds, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_seconds):
            self.bytes = max(self.bytes, pss_bytes(descendants(self.root)))


def mapping_bytes(pid: int, *, path_contains: str) -> dict[str, int]:
    """Rss, Pss, shared and private bytes of the mappings of a process whose file name contains a text."""
    total: dict[str, int] = {}
    wanted = False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            head = line.split(None, 1)[0]
            if not head.endswith(":"):
                wanted = path_contains in line
            elif wanted:
                for name, value in _fields([line]).items():
                    total[name] = total.get(name, 0) + value
    names = ("Rss", "Pss", "Shared_Clean", "Shared_Dirty", "Private_Clean", "Private_Dirty")
    return {name: total.get(name, 0) for name in names}


def _fields(lines: Iterable[str]) -> dict[str, int]:
    """``Pss:  12 kB`` lines as bytes."""
    out = {}
    for line in lines:
        parts = line.split()
        if len(parts) == 3 and parts[2] == "kB":
            out[parts[0].rstrip(":")] = int(parts[1]) * 1024
    return out
