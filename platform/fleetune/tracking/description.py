"""The note on top of a run's page in MLflow: what was run, how it came out, and the job's text. Markdown."""

from __future__ import annotations

from fleetune.records.naming import filled_fields, shown
from fleetune.records.run_directory import RunDirectory

# Fields of the spec that a run's note names.
NAMED_FIELDS = (
    "model.base",
    "data.dataset",
    "fleet.num_clients",
    "fleet.network",
    "rounds.num_rounds",
    "rounds.clients_per_round",
)


def note(run: RunDirectory) -> str:
    """Fields that tell runs apart, the result's numbers, what a trial changed, and the text of the job or sweep file."""
    flat = filled_fields(run.spec)
    named = [
        f"{field.rpartition('.')[2].replace('_', ' ')} **{shown(flat[field])}**"
        for field in NAMED_FIELDS
        if field in flat
    ]
    blocks = [" · ".join(named)] if named else []
    changed = ", ".join(
        f"`{field}={shown(value)}`" for field, value in filled_fields(run.meta.get("overrides") or {}).items()
    )
    if changed:
        blocks.append(f"Trial of **{run.meta.get('sweep')}**: {changed}")
    result = run.result() or {}
    numbers = filled_fields({**(result.get("metrics") or {}), **(result.get("totals") or {})})
    rows = [f"| {name} | {shown(value)} |" for name, value in numbers.items() if isinstance(value, int | float)]
    if rows:
        blocks.append("\n".join(["| result | |", "| --- | --- |", *rows]))
    if result.get("error"):
        blocks.append(f"Failed: {result['error']}")
    if run.meta.get("text"):
        blocks.append(f"```yaml\n{str(run.meta['text']).strip()}\n```")
    blocks.append(f"Run directory: `{run.path}`")
    return "\n\n".join(blocks)
