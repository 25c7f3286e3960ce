"""What a workspace's runs have come to already, by the identity of their results."""

from __future__ import annotations

from pathlib import Path

from fleetune.records.run_directory import RunDirectory


def finished_runs(workspace: Path) -> dict[str, RunDirectory]:
    """spec_hash -> a finished run; the first by name where there are several."""
    found: dict[str, RunDirectory] = {}
    for path in sorted((workspace / "runs").glob("*/result.json")):
        run = RunDirectory(path.parent)
        try:
            spec_hash, status = run.meta.get("spec_hash"), (run.result() or {}).get("status")
        except (OSError, ValueError):  # somebody else's, or damaged: not one to rely on
            continue
        if spec_hash and status == "finished":
            found.setdefault(str(spec_hash), run)
    return found
