"""A report of one run, several runs, or a sweep: one HTML file that holds its figures, and the figures as PNG beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fleetune.errors import UserError
from fleetune.records.find import find_runs
from fleetune.records.naming import filled_fields, group_labels, run_name, shown, varied_fields
from fleetune.records.run_directory import RunDirectory
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.reports.client_report import personal_sections, profile_sections
from fleetune.reports.figures import runs as figures
from fleetune.reports.figures.adapter_pool import adapter_pool
from fleetune.reports.figures.block_groups import block_groups
from fleetune.reports.figures.devices import cost_by_device
from fleetune.reports.figures.timeline import timeline
from fleetune.reports.html import Cell, Note, Page, Part, Section, Table, image
from fleetune.reports.run_stats import RUN_COSTS, STATUSES, device_costs, paid, run_totals
from fleetune.reports.sweep_report import sweep_report
from fleetune.units import NOTHING, percent, readable

# Fields of the spec that the header names.
HEADER_FIELDS = (
    "model.base",
    "cost.model",
    "data.dataset",
    "fleet.num_clients",
    "fleet.network",
    "rounds.num_rounds",
    "rounds.clients_per_round",
    "rounds.close",
    "local.steps",
    "local.learning_rate",
)
MAX_DEVICE_TABLES = 12  # more tables than this belong into clients.parquet
MAX_TIMELINES = 3
FILES = ("spec.yaml", "result.json", "rounds.parquet", "clients.parquet", "personal.parquet", "trace.json")


def report(
    paths: Iterable[str | Path],
    out: str | Path | None = None,
    *,
    budgets: Iterable[str] = (),
    targets: Iterable[str] = (),
) -> Path:
    """Writes ``out`` (an HTML file, or a folder that gets ``report.html``), and ``figures/`` beside it.

    ``paths`` are run directories, or one sweep directory; its report is that of :func:`sweep_report`, to which
    ``budgets`` and ``targets`` belong. ``out`` is by default ``report/``, or the sweep's directory. Returns the HTML
    file. Raises UserError if a path holds neither.
    """
    paths, budgets, targets = list(paths), list(budgets), list(targets)
    sweeps = [path for path in paths if (Path(path) / SweepDirectory.SPEC).is_file()]
    if sweeps and len(paths) == 1:
        return sweep_report(sweeps[0], out, budgets=budgets, targets=targets)
    if budgets or targets:
        hint = "give one sweep directory, or leave the option out"
        raise UserError("only the report of a sweep takes it", field="--budget" if budgets else "--target", hint=hint)
    return runs_report(find_runs(paths), Path("report" if out is None else out))


def runs_report(runs: Sequence[RunDirectory], out: Path) -> Path:
    """The report of one run or several."""
    out = out if out.suffix in (".html", ".htm") else out / "report.html"
    folder = out.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    sections = [
        Section("Runs", [_runs_table(runs)]),
        Section("Learning curves", [image(figures.learning_curve(runs, path=folder / "learning_curve.png"))]),
        *_swept(runs, folder),
        Section("Accuracy against cost", [image(figures.accuracy_vs_cost(runs, path=folder / "accuracy_vs_cost.png"))]),
        *_groups(runs, folder),
        Section("Cost per device class", _device_costs(runs, folder)),
        *(profile_sections(runs[0].clients(), folder) if len(runs) == 1 and len(runs[0].clients()) else []),
        *(personal_sections(runs[0].clients(), runs[0].personal(), folder) if len(runs) == 1 else []),
        Section("Timeline", _timelines(runs, folder)),
        Section("Files", [_files(runs, out.parent)]),
    ]
    title = run_name(runs[0]) if len(runs) == 1 else _common_name(runs)
    return Page(title, _subtitle(runs), sections, facts=_facts(runs)).write(out)


def _common_name(runs: Sequence[RunDirectory]) -> str:
    """The sweep's name if all are its trials, else how many runs these are."""
    sweeps = {run.meta.get("sweep") for run in runs}
    sweep = next(iter(sweeps)) if len(sweeps) == 1 else None
    return str(sweep) if sweep else f"{len(runs)} runs"


def _subtitle(runs: Sequence[RunDirectory]) -> str:
    """How the runs ended, and the commits of the code."""
    commits = {str(run.meta["git_commit"])[:10] for run in runs if run.meta.get("git_commit")}
    states = [(run.result() or {}).get("status", "not finished") for run in runs]
    counts = [f"{states.count(state)} {state}" if len(runs) > 1 else state for state in dict.fromkeys(states)]
    return " · ".join([*counts, *(f"git {commit}" for commit in sorted(commits))])


def _facts(runs: Sequence[RunDirectory]) -> list[tuple[str, str]]:
    """The fields that all runs have in common, and those that were varied."""
    specs = [filled_fields(run.spec) for run in runs]
    fields = [*HEADER_FIELDS, *(k for k in specs[0] if k.startswith(("method.", "model.lora.", "fleet.devices.")))]
    common = {k: specs[0][k] for k in fields if k in specs[0] and all(spec.get(k) == specs[0][k] for spec in specs)}
    varied = {k: sorted({shown(v) for v in values if v is not None}) for k, values in varied_fields(list(runs)).items()}
    return [(k, shown(v)) for k, v in common.items()] + [(k, "varied: " + ", ".join(v[:8])) for k, v in varied.items()]


def _runs_table(runs: Sequence[RunDirectory]) -> Table:
    """A row per run, the best accuracy first."""
    header = [
        "run",
        "rounds",
        "accuracy",
        "best accuracy",
        "training loss",
        *(cost.title for cost in RUN_COSTS.values()),
    ]
    totals = [run_totals(run) for run in runs]
    best = max((t["eval_accuracy"] for t in totals if t["eval_accuracy"] is not None), default=None)
    rows = []
    for run, t in sorted(zip(runs, totals, strict=True), key=lambda pair: -(pair[1]["eval_accuracy"] or 0.0)):
        loss = t["train_loss"]
        is_best = best is not None and t["eval_accuracy"] == best
        rows.append([
            Cell(run_name(run)),
            Cell(f"{t['num_rounds']:.0f}", t["num_rounds"]),
            Cell(percent(t["eval_accuracy"]), t["eval_accuracy"], best=is_best),
            Cell(percent(t["best_accuracy"]), t["best_accuracy"]),
            Cell(NOTHING if loss is None else f"{loss:.3f}", loss),
            *(Cell(readable(t[name], cost.unit), t[name]) for name, cost in RUN_COSTS.items()),
            Cell(percent(t["oom_fraction"]), t["oom_fraction"]),
        ])  # fmt: skip
    return Table([*header, "out of memory"], rows, caption="Runs")


def _swept(runs: Sequence[RunDirectory], folder: Path) -> list[Section]:
    """The effect of the varied fields, if several runs vary one."""
    effect = figures.sweep_effect(runs, path=folder / "sweep_effect.png") if len(runs) > 1 else None
    return [Section("What the varied fields do", [image(effect)])] if effect else []


def _groups(runs: Sequence[RunDirectory], folder: Path) -> list[Section]:
    """How blocks were grouped, or adapters used, of a single run whose method has kept that."""
    if len(runs) != 1:
        return []
    found = {
        "Groups of blocks": block_groups(runs[0], path=folder / "block_groups.png"),
        "The pool of adapters": adapter_pool(runs[0], path=folder / "adapter_pool.png"),
    }
    return [Section(title, [image(figure)]) for title, figure in found.items() if figure]


def _device_costs(runs: Sequence[RunDirectory], folder: Path) -> list[Part]:
    """A figure of all, and a table for the first run of each group."""
    parts: list[Part] = [image(cost_by_device(runs, path=folder / "cost_by_device.png"))]
    for label, members in list(group_labels(list(runs)).items())[:MAX_DEVICE_TABLES]:
        name = label if len(members) == 1 else f"{label} (seed {members[0].spec.get('seed')})"
        if len(runs) > 1:
            parts.append(Note(name, style="heading"))
        parts.append(_device_table(members[0], caption=f"Costs per device class: {name}"))
    return parts


TURN_ENDS = {"out of memory" if status == "oom" else status: status for status in STATUSES}


def _device_table(run: RunDirectory, *, caption: str) -> Table:
    """Means of a turn per device class, and how many turns ended in which way."""
    rows, table = [], device_costs(run)
    columns = paid(table)
    for device, costs in table.iterrows():
        cells = [Cell(str(device)), Cell(f"{costs['num_turns']:.0f}", costs["num_turns"])]
        cells += [Cell(readable(costs[c.name], c.unit), costs[c.name]) for c in columns]
        cells += [Cell(percent(costs[f"{s}_fraction"]), costs[f"{s}_fraction"]) for s in TURN_ENDS.values()]
        rows.append(cells)
    header = ["device class", "turns", *(c.title for c in columns), *TURN_ENDS]
    return Table(header, rows, caption=caption)


def _timelines(runs: Sequence[RunDirectory], folder: Path) -> list[Part]:
    """The timeline of one run of each of the first groups."""
    parts: list[Part] = []
    for i, (label, members) in enumerate(list(group_labels(list(runs)).items())[:MAX_TIMELINES]):
        if len(runs) > 1:
            parts.append(Note(label, style="heading"))
        parts.append(image(timeline(members[0], path=folder / f"timeline_{i}.png"), f"timeline of {label}"))
    return [*parts, Note("All rounds: open trace.json of a run in ui.perfetto.dev.")]


def _files(runs: Sequence[RunDirectory], base: Path) -> Table:
    """Links to the files of each run."""
    rows = []
    for run in runs:
        links = [
            (name, os.path.relpath(run.path / name, base.absolute())) for name in FILES if (run.path / name).exists()
        ]
        rows.append([Cell(run_name(run)), Cell(", ".join(FILES), links=tuple(links)), Cell(run.path.name)])
    return Table(["run", "files", "run directory"], rows, caption="Files")
