"""A report of one run, several runs, or a sweep: one HTML file that holds its figures, and the figures as PNG
beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fleetune.errors import UserError
from fleetune.records.find import find_runs
from fleetune.records.naming import flatten, group_labels, run_name, shown, varied_fields
from fleetune.records.run_directory import RunDirectory
from fleetune.records.sweep_directory import SweepDirectory
from fleetune.reports.client_report import profile_sections
from fleetune.reports.figures import runs as figures
from fleetune.reports.html import image, page, percent, section, table, text
from fleetune.reports.run_stats import STATUSES, device_costs, readable, run_totals
from fleetune.reports.sweep_report import sweep_report

# Fields of the spec that the header names.
TOLD = (
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
# More tables than this belong into clients.parquet.
MAX_DEVICE_TABLES = 12


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
    file. UserError where a path holds neither.
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
    title = run_name(runs[0]) if len(runs) == 1 else _common_name(runs)
    body = [f"<h1>{text(title)}</h1>", f'<p class="sub">{text(_subtitle(runs))}</p>', _told(runs)]
    body += [section("Runs", _runs_table(runs))]
    body += [section("Learning curves", image(figures.learning_curve(runs, path=folder / "learning_curve.png")))]
    if len(runs) > 1:
        effect = figures.sweep_effect(runs, path=folder / "sweep_effect.png")
        body += [section("What the varied fields do", image(effect))] if effect else []
    body += [
        section(
            "Accuracy against cost",
            image(figures.accuracy_vs_cost(runs, path=folder / "accuracy_vs_cost.png")),
        )
    ]
    costs = image(figures.cost_by_device(runs, path=folder / "cost_by_device.png"))
    body += [section("Cost per device class", costs + _device_tables(runs))]
    if len(runs) == 1 and len(runs[0].clients()):
        body += profile_sections(runs[0].clients(), folder)
    body += [section("Timeline", _timelines(runs, folder)), section("Files", _links(runs, out.parent))]
    out.write_text(page(title, body), encoding="utf-8")
    return out


def _common_name(runs: Sequence[RunDirectory]) -> str:
    """The sweep's name where all are its trials, else how many runs these are."""
    sweeps = {run.meta.get("sweep") for run in runs}
    sweep = next(iter(sweeps)) if len(sweeps) == 1 else None
    return str(sweep) if sweep else f"{len(runs)} runs"


def _subtitle(runs: Sequence[RunDirectory]) -> str:
    commits = {str(run.meta["git_commit"])[:10] for run in runs if run.meta.get("git_commit")}
    states = [(run.result() or {}).get("status", "not finished") for run in runs]
    told = [f"{states.count(state)} {state}" if len(runs) > 1 else state for state in dict.fromkeys(states)]
    return " · ".join([*told, *(f"git {commit}" for commit in sorted(commits))])


def _told(runs: Sequence[RunDirectory]) -> str:
    """What all runs have in common, field by field, and which fields were varied."""
    specs = [flatten(run.spec) for run in runs]
    fields = [*TOLD, *(k for k in specs[0] if k.startswith(("method.", "model.lora.", "fleet.devices.")))]
    common = {k: specs[0][k] for k in fields if k in specs[0] and all(spec.get(k) == specs[0][k] for spec in specs)}
    varied = {k: sorted({shown(v) for v in values if v is not None}) for k, values in varied_fields(list(runs)).items()}
    rows = [(k, shown(v)) for k, v in common.items()] + [(k, "varied: " + ", ".join(v[:8])) for k, v in varied.items()]
    return "<dl>" + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in rows) + "</dl>"


def _runs_table(runs: Sequence[RunDirectory]) -> str:
    header = [
        "run",
        "rounds",
        "accuracy",
        "best",
        "train loss",
        "virtual time",
        "uplink",
        "downlink",
        "energy",
        "out of memory",
    ]
    totals = [run_totals(run) for run in runs]
    best = max((t["eval_accuracy"] for t in totals if t["eval_accuracy"] is not None), default=None)
    lines = []
    for run, t in sorted(zip(runs, totals, strict=True), key=lambda pair: -(pair[1]["eval_accuracy"] or 0.0)):
        cells = [
            percent(t["eval_accuracy"]),
            percent(t["best_accuracy"]),
            "–" if t["train_loss"] is None else f"{t['train_loss']:.3f}",
            readable(t["sim_seconds"], "seconds"),
            readable(t["uplink_bytes"], "bytes"),
            readable(t["downlink_bytes"], "bytes"),
            readable(t["energy_joules"], "joules"),
            percent(t["oom_fraction"]),
        ]
        first = f"<td>{text(run_name(run))}</td><td class='n'>{t['num_rounds']:.0f}</td>"
        marks = [
            "n best" if i == 0 and best is not None and t["eval_accuracy"] == best else "n" for i in range(len(cells))
        ]
        lines.append(first + "".join(f"<td class='{m}'>{text(c)}</td>" for c, m in zip(cells, marks, strict=True)))
    return table(header, lines)


def _device_tables(runs: Sequence[RunDirectory]) -> str:
    header = [
        "device class",
        "turns",
        "time of a turn",
        "computing",
        "receiving",
        "sending",
        "sent",
        "energy",
        "peak memory",
    ]
    header += ["budget", "out of memory", "refused", "dropped", "late", "failed"]
    blocks = []
    for label, members in list(group_labels(list(runs)).items())[:MAX_DEVICE_TABLES]:
        lines = []
        for device, c in device_costs(members[0]).iterrows():
            cells = [f"{c['num_turns']:.0f}"]
            cells += [readable(c[f"{phase}_seconds"], "seconds") for phase in ("sim", "compute", "downlink", "uplink")]
            cells += [readable(c["uplink_bytes"], "bytes"), readable(c["energy_joules"], "joules")]
            cells += [readable(c[name], "memory") for name in ("peak_memory_bytes", "budget_bytes")]
            cells += [percent(c[f"{status}_fraction"]) for status in STATUSES]
            lines.append(f"<td>{text(device)}</td>" + "".join(f"<td class='n'>{text(cell)}</td>" for cell in cells))
        name = label if len(members) == 1 else f"{label} (seed {members[0].spec.get('seed')})"
        blocks.append((f"<p><b>{text(name)}</b></p>" if len(runs) > 1 else "") + table(header, lines))
    return "".join(blocks)


def _timelines(runs: Sequence[RunDirectory], folder: Path) -> str:
    """The timeline of one run of each of the first three groups."""
    blocks = []
    for i, (label, members) in enumerate(list(group_labels(list(runs)).items())[:3]):
        drawn = image(figures.timeline(members[0], path=folder / f"timeline_{i}.png"))
        blocks.append((f"<p><b>{text(label)}</b></p>" if len(runs) > 1 else "") + drawn)
    return "".join(blocks) + "<p>All rounds: open <code>trace.json</code> of a run in ui.perfetto.dev.</p>"


def _links(runs: Sequence[RunDirectory], base: Path) -> str:
    names = ("spec.yaml", "result.json", "rounds.parquet", "clients.parquet", "trace.json")
    lines = []
    for run in runs:
        links = [
            f'<a href="{text(os.path.relpath(run.path / n, base.absolute()))}">{n}</a>'
            for n in names
            if (run.path / n).exists()
        ]
        cells = [text(run_name(run)), " · ".join(links), f"<code>{text(run.path.name)}</code>"]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return table(["run", "files", "run directory"], lines, num_text_columns=3)
