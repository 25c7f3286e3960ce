"""A report of one run, several runs, or a sweep: one HTML file that holds its figures, and the figures as PNG
beside it.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fleetune.records import figures
from fleetune.records.aggregates import device_costs, readable, run_totals
from fleetune.records.naming import flatten, group_labels, run_name, shown, varied_fields
from fleetune.records.run_directory import RunDirectory, find_runs

CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 1280px; margin: 2.5rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; }
p.sub { color: #666; margin: .2rem 0 1rem; }
img { max-width: 100%; display: block; margin: .5rem 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #ccc; padding: .3rem 1rem .3rem 0; }
td { border-bottom: 1px solid #eee; padding: .3rem 1rem .3rem 0; white-space: nowrap; }
td.n, th.n { text-align: right; }
td.best { font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: #666; }
dd { margin: 0; }
code { font-size: .88em; }
"""
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


def report(paths: Iterable[str | Path], out: str | Path) -> Path:
    """Writes ``out`` (an HTML file, or a folder that gets ``report.html``), and ``figures/`` beside it.

    ``paths`` are run directories and sweep directories. Returns the HTML file. UserError where one
    holds no run.
    """
    runs = find_runs(paths)
    out = Path(out)
    out = out if out.suffix in (".html", ".htm") else out / "report.html"
    folder = out.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    title = run_name(runs[0]) if len(runs) == 1 else _common_name(runs)
    body = [f"<h1>{_text(title)}</h1>", f'<p class="sub">{_text(_subtitle(runs))}</p>', _told(runs)]
    body += [_section("Runs", _runs_table(runs))]
    body += [_section("Learning curves", _image(figures.learning_curve(runs, path=folder / "learning_curve.png")))]
    if len(runs) > 1:
        effect = figures.sweep_effect(runs, path=folder / "sweep_effect.png")
        body += [_section("What the varied fields do", _image(effect))] if effect else []
    body += [
        _section(
            "Accuracy against cost",
            _image(figures.accuracy_vs_cost(runs, path=folder / "accuracy_vs_cost.png")),
        )
    ]
    costs = _image(figures.cost_by_device(runs, path=folder / "cost_by_device.png"))
    body += [_section("Cost per device class", costs + _device_tables(runs))]
    body += [_section("Timeline", _timelines(runs, folder)), _section("Files", _links(runs, out.parent))]
    page = '<!doctype html><html lang="en"><meta charset="utf-8">'
    page += f"<title>{_text(title)}</title><style>{CSS}</style>\n"
    out.write_text(page + "\n".join(body) + "\n</html>\n", encoding="utf-8")
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
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in rows) + "</dl>"


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
            _percent(t["eval_accuracy"]),
            _percent(t["best_accuracy"]),
            "–" if t["train_loss"] is None else f"{t['train_loss']:.3f}",
            readable(t["sim_seconds"], "seconds"),
            readable(t["uplink_bytes"], "bytes"),
            readable(t["downlink_bytes"], "bytes"),
            readable(t["energy_joules"], "joules"),
            _percent(t["oom_fraction"]),
        ]
        first = f"<td>{_text(run_name(run))}</td><td class='n'>{t['num_rounds']:.0f}</td>"
        marks = [
            "n best" if i == 0 and best is not None and t["eval_accuracy"] == best else "n" for i in range(len(cells))
        ]
        lines.append(first + "".join(f"<td class='{m}'>{_text(c)}</td>" for c, m in zip(cells, marks, strict=True)))
    return _table(header, lines)


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
    header += ["budget", "out of memory", "dropped", "late"]
    blocks = []
    for label, members in list(group_labels(list(runs)).items())[:MAX_DEVICE_TABLES]:
        lines = []
        for device, c in device_costs(members[0]).iterrows():
            cells = [f"{c['num_turns']:.0f}"]
            cells += [readable(c[f"{phase}_seconds"], "seconds") for phase in ("sim", "compute", "downlink", "uplink")]
            cells += [readable(c["uplink_bytes"], "bytes"), readable(c["energy_joules"], "joules")]
            cells += [readable(c[name], "memory") for name in ("peak_memory_bytes", "budget_bytes")]
            cells += [_percent(c[f"{status}_fraction"]) for status in ("oom", "dropped", "late")]
            lines.append(f"<td>{_text(device)}</td>" + "".join(f"<td class='n'>{_text(cell)}</td>" for cell in cells))
        name = label if len(members) == 1 else f"{label} (seed {members[0].spec.get('seed')})"
        blocks.append((f"<p><b>{_text(name)}</b></p>" if len(runs) > 1 else "") + _table(header, lines))
    return "".join(blocks)


def _timelines(runs: Sequence[RunDirectory], folder: Path) -> str:
    """The timeline of one run of each of the first three groups."""
    blocks = []
    for i, (label, members) in enumerate(list(group_labels(list(runs)).items())[:3]):
        image = _image(figures.timeline(members[0], path=folder / f"timeline_{i}.png"))
        blocks.append((f"<p><b>{_text(label)}</b></p>" if len(runs) > 1 else "") + image)
    return "".join(blocks) + "<p>All rounds: open <code>trace.json</code> of a run in ui.perfetto.dev.</p>"


def _links(runs: Sequence[RunDirectory], base: Path) -> str:
    names = ("spec.yaml", "result.json", "rounds.parquet", "clients.parquet", "trace.json")
    lines = []
    for run in runs:
        links = [
            f'<a href="{_text(os.path.relpath(run.path / n, base.absolute()))}">{n}</a>'
            for n in names
            if (run.path / n).exists()
        ]
        cells = [_text(run_name(run)), " · ".join(links), f"<code>{_text(run.path.name)}</code>"]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return _table(["run", "files", "run directory"], lines, num_text_columns=3)


def _table(header: Sequence[str], lines: Sequence[str], *, num_text_columns: int = 1) -> str:
    """Header and rows (each already cells) as a table that may scroll sideways."""
    kinds = ["" if i < num_text_columns else ' class="n"' for i in range(len(header))]
    head = "".join(f"<th{kind}>{_text(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    rows = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>'


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{content}"


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{_text(path.stem.replace("_", " "))}" src="data:image/png;base64,{data}">'


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None or fraction != fraction else f"{100 * fraction:.1f} %"


def _text(value: object) -> str:
    return html.escape(str(value))
