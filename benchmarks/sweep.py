"""A sweep of many small trials: how busy the cores are, what the sweep layer adds, what one more trial costs, what one waits for.

python benchmarks/sweep.py                        # 64 trials of the quickstart, one round each, all cores
python benchmarks/sweep.py --trials 16 --rounds 4
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

JOB = Path(__file__).parent.parent / "jobs" / "quickstart.yaml"


def child(path: Path, workspace: Path) -> None:
    """Run the sweep in this process; print what only it knows."""
    from fleetune.sweep import config, launch

    result = launch.run(config.load(path), workspace=workspace, warn=lambda text: print(text, file=sys.stderr))
    cpu = os.times()
    print(
        json.dumps({"sweep_dir": str(result.sweep_dir), "trials": result.trials, "cpu_seconds": cpu.user + cpu.system})
    )


def busy_and_all() -> tuple[float, float]:
    """Seconds that all cores together worked, and seconds that there were, since the machine started."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = [int(value) / os.sysconf("SC_CLK_TCK") for value in file.readline().split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)  # without idle and waiting for disks


class CoreLog:
    """Busy seconds of all cores, sampled while a process runs."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float, float]] = []

    def watch(self, process: subprocess.Popen[str]) -> None:
        """Sample until the process ends."""
        while process.poll() is None:
            self.samples.append((time.time(), *busy_and_all()))
            time.sleep(0.5)

    def share(self, start: float, end: float) -> float:
        """Busy share of all cores between two times."""
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        return (inside[-1][1] - inside[0][1]) / (inside[-1][2] - inside[0][2])


def spans(sweep_dir: Path) -> list[tuple[float, float, float]]:
    """(begin of the first round, end of the last, seconds inside rounds) of every trial, by begin. Real time."""
    from fleetune.records import SweepDirectory

    out = []
    for run in SweepDirectory.open(sweep_dir).runs():
        rounds = run.round_rows()
        seconds = [float(row["wall_seconds"]) for row, _ in rounds]
        out.append((rounds[0][1] / 1000 - seconds[0], rounds[-1][1] / 1000, sum(seconds)))
    return sorted(out)


def gaps(trials: list[tuple[float, float, float]]) -> list[float]:
    """Seconds between a trial's last round and the next one's first in the same process: each begins where one has just ended."""
    out, free = [], []
    ends = sorted(end for _, end, _ in trials)
    for begin, _, _ in trials:
        while ends and ends[0] <= begin:
            free.append(ends.pop(0))
        if free:
            out.append(begin - free.pop(0))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-tracking", action="store_true", help="without MLflow's process beside")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(*args.child)
        return
    with tempfile.TemporaryDirectory(prefix="fleetune-bench-") as folder:
        rates = [round(1e-3 * 1.03**i, 8) for i in range(args.trials)]
        base = {"rounds.num_rounds": args.rounds, "evaluation.every": args.rounds}
        base["tracking.enabled"] = not args.no_tracking
        path = Path(folder) / "sweep.yaml"
        path.write_text(json.dumps({"base": _base(base), "grid": {"local.learning_rate": rates}}))
        cores = CoreLog()
        started = time.time()
        command = [sys.executable, __file__, "--child", str(path), folder]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        cores.watch(process)
        ended = time.time()
        told: dict[str, Any] = json.loads(process.communicate()[0].strip().splitlines()[-1])
        assert process.returncode == 0
        assert told["trials"] == {"finished": args.trials}, told
        trials = spans(Path(told["sweep_dir"]))
    first, last = trials[0][0], max(end for _, end, _ in trials)
    begins_last = trials[-1][0]  # from here on processes run out of work
    num_cores = len(os.sched_getaffinity(0))
    inside = sum(seconds for _, _, seconds in trials)
    between = gaps(trials)
    median, best = measure.median_and_min(between) if between else (float("nan"), float("nan"))
    rows = [
        {"what": "launch to the first trial training", "value": first - started, "unit": "s"},
        {"what": "busy share of all cores, while trials wait", "value": cores.share(first, begins_last), "unit": ""},
        {"what": "between two trials of a process, median", "value": median, "unit": "s"},
        {"what": "between two trials of a process, least", "value": best, "unit": "s"},
        {"what": "outside of rounds, of the trials' time", "value": sum(between) / inside, "unit": ""},
        {"what": "driver's processor time, of the cores' time", "unit": "",
         "value": told["cpu_seconds"] / (num_cores * (ended - started))},
        {"what": "rounds of all trials", "value": inside, "unit": "s"},
        {"what": "first training to last round", "value": last - first, "unit": "s"},
        {"what": "last round to the command's end", "value": ended - last, "unit": "s"},
    ]  # fmt: skip
    measure.report("sweep", rows)


def _base(overrides: dict[str, Any]) -> dict[str, Any]:
    from fleetune.spec import load

    return load(JOB, {**overrides, "execution": "auto"}).to_dict()


if __name__ == "__main__":
    main()
