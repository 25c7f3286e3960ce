"""Fill the result pages from the sweeps of a workspace: the comparison of each, and the verdicts on its claims.

python docs/results.py WORKSPACE            every sweep that a page names and the workspace has
python docs/results.py WORKSPACE NAME...    these alone

A page marks the place of a sweep's results with ``<!-- results of NAME -->`` and ``<!-- end of NAME -->``. What stands between is
replaced by what ``fleetune report WORKSPACE/sweeps/NAME-<id> --markdown`` prints. ``<!-- results of NAME, target 0.25 -->`` adds
``--target 0.25``. If there are several of one name, the last that was written counts.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fleetune.errors import UserError
from fleetune.records import SweepDirectory
from fleetune.reports.sweep_report import sweep_markdown

PAGES = Path(__file__).parent / "results"
PLACE = re.compile(
    r"(?P<begin><!-- results of (?P<name>\w+)(?:, target (?P<target>[\d.]+))? -->)\n.*?(?P<end><!-- end of (?P=name) -->)",
    re.DOTALL,
)


def main(workspace: Path, names: list[str]) -> int:
    """Fill all pages; returns the exit status: 1 if a sweep that was asked for is not there."""
    missing: list[str] = []
    for path in sorted(PAGES.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(filled(text, workspace, names, missing), encoding="utf-8")
    for reason in missing:
        print(reason, file=sys.stderr)
    return 1 if names and missing else 0


def filled(text: str, workspace: Path, names: list[str], missing: list[str]) -> str:
    """The page with the results of those sweeps that are there; ``missing`` gets a line for each that is not."""

    def results(place: re.Match[str]) -> str:
        name = place["name"]
        if names and name not in names:
            return place[0]
        sweep = newest(workspace, name)
        if sweep is None:
            missing.append(f"{name}: not in {workspace / 'sweeps'}")
            return place[0]
        try:
            found = sweep_markdown(sweep, targets=[place["target"]] if place["target"] else [])
        except UserError as error:
            missing.append(f"{name}: {error}")
            return place[0]
        states = SweepDirectory.open(sweep).trials()["status"].value_counts()
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        return f"{place['begin']}\n\n{counts} of {int(states.sum())} trials.\n\n{found}\n\n{place['end']}"

    return PLACE.sub(results, text)


def newest(workspace: Path, name: str) -> Path | None:
    """The last written directory of a sweep; None if there is none."""
    found = [
        path for path in (workspace / "sweeps").glob(f"{name}-*") if re.fullmatch(f"{name}-[0-9a-f]{{8}}", path.name)
    ]
    return max(found, key=lambda path: (path / SweepDirectory.SPEC).stat().st_mtime, default=None)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
