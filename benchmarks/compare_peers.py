"""fleetune beside Flower and pfl-research on the same work, interleaved, each in an environment of its own.

    python benchmarks/compare_peers.py                          # three repetitions of everything: about half an hour
    python benchmarks/compare_peers.py --only lora --repeats 1 --rounds 2

The peers' environments are made at the first call (about 3 GB, from benchmarks/peers/requirements-*.txt); the systems then take
turns, so that whatever else the machine does meets all of them. Each runs in a process of its own, on two worker processes of
one thread, and the memory of its whole process tree (PSS) is watched.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import measure

HERE = Path(__file__).parent
PEERS = HERE / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fleetune-bench"


def environment(name: str) -> Path:
    """The bin folder of a peer's virtual environment, made if it is not there."""
    folder = CACHE / name
    if not (folder / "ready").exists():
        print(f"making {folder} …", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True, clear=True)
        requirements = PEERS / f"requirements-{name}.txt"
        subprocess.run([folder / "bin" / "pip", "install", "-q", "-r", requirements], check=True)
        (folder / "ready").touch()
    return folder / "bin"


def systems(work: str, num_clients: int, num_elements: int, num_rounds: int, plain: bool) -> dict[str, list[str]]:
    """Command of every system for one piece of work."""
    flower, pfl = environment("flower"), environment("pfl")
    sizes = ["--clients", str(num_clients), "--rounds", str(num_rounds)]
    theirs = ["--work", work, "--elements", str(num_elements), *sizes]
    run_flower = [str(flower / "python"), str(PEERS / "run_flower.py"), *theirs]
    run_pfl = [str(PEERS / "run_pfl.py"), *theirs]
    two_processes = [str(pfl / "torchrun"), "--standalone", "--nproc_per_node=2"]
    out: dict[str, list[str]] = {}
    if work == "lora":
        out["fleetune, 2 workers"] = [sys.executable, str(HERE / "lora.py"), "--workers", "2", *sizes]
        out["fleetune, 1 worker"] = [sys.executable, str(HERE / "lora.py"), "--workers", "1", *sizes]
        out["Flower, model kept in the worker"] = [*run_flower, "--keep-model"]
        out["Flower, model built per client"] = run_flower
    else:
        out["fleetune, 2 workers"] = [sys.executable, str(HERE / "engine.py"), "--elements", str(num_elements), *sizes]
        out["Flower, 2 workers"] = run_flower
    out["pfl-research, 2 processes"] = [*two_processes, *run_pfl]
    out["pfl-research, 1 process"] = [str(pfl / "python"), *run_pfl]
    if plain and work == "lora":
        out["plain loop, 1 process"] = [str(pfl / "python"), str(PEERS / "run_direct.py"), *theirs]
    return out


def run_once(command: list[str], *, timeout_seconds: float) -> dict[str, Any]:
    """One system, once: the row that it prints, and the peak of its process tree. Raises RuntimeError where it fails."""
    # Ray lets its workers run at nice 15: on a machine that does something else, that alone would decide against Ray.
    values = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_worker_niceness": "0"}
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryDirectory(prefix="fleetune-bench-") as folder:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=values, cwd=folder)
        with measure.PeakMemory(process.pid, interval_seconds=0.5) as peak:
            process.wait(timeout=timeout_seconds)
        log.seek(0)
        lines = log.read().splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"') and '"rows"' in line]
    if process.returncode or not found:
        raise RuntimeError(f"{' '.join(command)} failed:\n" + "\n".join(lines[-30:]))
    return {**found[-1]["rows"][-1], "peak_bytes": peak.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that are measured in each repetition")
    parser.add_argument("--only", choices=("lora", "noop"), nargs="*", default=["lora", "noop"])
    parser.add_argument("--clients", type=int, nargs="*", default=[100], help="clients per round of the no-op")
    parser.add_argument("--elements", type=int, nargs="*", default=[16384, 1126400], help="fp32 numbers of its state")
    parser.add_argument("--plain", action="store_true", help="the plain loop as well")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which a system is given up")
    args = parser.parse_args()
    cases = [("lora", 100, 16384)] if "lora" in args.only else []
    cases += [("noop", c, e) for c in args.clients for e in args.elements] if "noop" in args.only else []

    measured: dict[tuple[str, int, int, str], list[dict[str, Any]]] = {}
    for repeat in range(args.repeats):
        for case in cases:
            for name, command in systems(*case, args.rounds, args.plain).items():
                row = run_once(command, timeout_seconds=args.timeout)
                measured.setdefault((*case, name), []).append(row)
                figure, load = row["ms_per_client"], os.getloadavg()[0]
                print(f"{repeat + 1} {case} {name}: {figure:.3g} ms, load {load:.1f}", file=sys.stderr, flush=True)
    measure.report("compare_peers", [summary(key, rows) for key, rows in measured.items()])


def summary(key: tuple[str, int, int, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A system's row of the table: the median over repetitions of each one's median round, and the best round of all."""
    work, num_clients, num_elements, name = key
    return {
        "system": name,
        "work": work,
        "clients": num_clients,
        "state_bytes": 4 * num_elements,
        "ms_per_client": statistics.median(row["ms_per_client"] for row in rows),
        "best_ms_per_client": min(row["best_ms_per_client"] for row in rows),
        "peak_GiB": statistics.median(row["peak_bytes"] for row in rows) / 2**30,
        "repeats": len(rows),
    }


if __name__ == "__main__":
    main()
