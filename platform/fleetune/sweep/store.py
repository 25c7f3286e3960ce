"""What a workspace's runs have come to already, by the identity of their results."""

from __future__ import annotations

from pathlib import Path

from fleetune.records.run_directory import FORMAT, RunDirectory


def finished_runs(workspace: Path) -> dict[str, list[RunDirectory]]:
    """spec_hash -> finished runs of that spec, by name. What each of them read is in its ``meta``."""
    found: dict[str, list[RunDirectory]] = {}
    for path in sorted((workspace / "runs").glob("*/result.json")):
        run = RunDirectory(path.parent)
        try:
            spec_hash, status = run.meta.get("spec_hash"), (run.result() or {}).get("status")
            is_readable = run.format == FORMAT
        except (OSError, ValueError):  # somebody else's, or damaged: not one to rely on
            continue
        if spec_hash and status == "finished" and is_readable:
            found.setdefault(str(spec_hash), []).append(run)
    return found
