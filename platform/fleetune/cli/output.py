"""What commands print: messages on stderr, results on stdout, and with ``--json`` one JSON document as the last line."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from fleetune.errors import printable
from fleetune.redaction import redacted


def say(text: str) -> None:
    """Print a message on stderr, without passwords and control characters."""
    print(printable(redacted(text)), file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Print a document on one line of stdout."""
    print(json.dumps(_finite(document), default=str), flush=True)


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have, and without passwords in addresses."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def complain(text: str, document: dict[str, Any], *, status: int) -> int:
    """Print why a command fails, with ``--json`` the document too; returns the exit status.

    The option is looked up in the arguments: a mistake in them is found before they are parsed.
    """
    say(f"fleetune: {text}")
    if "--json" in sys.argv:
        print_json(document)
    return status


def print_result(result: Any, as_json: bool) -> None:
    """Print the result of a run: quality, costs, refused clients, and the next commands."""
    from fleetune.units import duration, energy, size

    if as_json:
        print_json(result.to_dict())
        return
    metrics, totals = result.metrics, result.totals
    accuracy, untrained = metrics.get("eval_accuracy"), metrics.get("baseline_eval_accuracy")
    if accuracy is not None:
        start = f"{untrained:.1%} → " if untrained is not None else ""
        print(f"accuracy   {start}{accuracy:.1%}")
    if metrics.get("eval_loss") is not None:
        print(f"eval loss  {metrics['baseline_eval_loss']:.3f} → {metrics['eval_loss']:.3f}")
    if metrics.get("eval_personal_loss") is not None:
        worst = metrics["eval_personal_loss_worst"]
        print(f"own loss   {metrics['eval_personal_loss']:.3f}, worst tenth of the clients {worst:.3f}")
    print(f"virtual    {duration(totals['sim_seconds'])}, {energy(totals['energy_joules'])} on all devices")
    print(f"links      {size(totals['uplink_bytes'])} up, {size(totals['downlink_bytes'])} down")
    if totals.get("num_oom", 0) + totals.get("num_refused", 0) > 0:
        from fleetune.records.run_directory import RunDirectory
        from fleetune.reports.client_stats import refusal_lines

        for i, line in enumerate(refusal_lines(RunDirectory.open(result.run_dir).clients())):
            print(f"{'' if i else 'refused':<10} {line}")
    print(printable(f"run        {result.run_dir}\nnext       fleetune ui · fleetune report {result.run_dir}"))
