"""The command ``check``: does a method keep the contract that every built-in one keeps?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fleetune.cli.options import Assignments, Json
from fleetune.cli.output import print_json, say
from fleetune.errors import printable


def check(
    name: Annotated[
        str, typer.Argument(metavar="METHOD", help="my_module:MyMethod, an installed method, or a built-in one.")
    ],
    assignments: Assignments = None,
    as_json: Json = False,
) -> int:
    """Check a method against the contract that every built-in method keeps. Takes about half a minute; exit status 1: broken."""
    from fleetune.check.matrix import BROKEN, outcomes
    from fleetune.spec import parse_overrides

    rows: list[dict[str, Any]] = []
    for outcome in outcomes(name, parse_overrides(assignments or [], method=name)):
        rows.append(vars(outcome))
        lines = [f"{outcome.status:<14} {outcome.check}"]
        if outcome.status == BROKEN:
            lines.append(f"{'':<14} expected: {outcome.expected}")
        if outcome.found is not None:
            lines.append(f"{'':<14} {'found: ' if outcome.status == BROKEN else ''}{outcome.found}")
        text = "\n".join(lines)
        say(text) if as_json else print(printable(text), flush=True)
    num_broken = sum(row["status"] == BROKEN for row in rows)
    if as_json:
        print_json({"method": name, "broken": num_broken, "checks": rows})
    else:
        print(
            printable(
                f"{name} breaks {num_broken} of {len(rows)} checks" if num_broken else f"{name} keeps the contract"
            )
        )
    return 1 if num_broken else 0
