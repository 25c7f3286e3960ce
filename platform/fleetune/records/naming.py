"""Names of runs for tables, figures and MLflow, made from their specs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fleetune.config import flatten
from fleetune.records.run_directory import RunDirectory


def filled_fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted fields of nested data that hold something: neither null nor empty. Lists are values."""
    return {field: value for field, value in flatten(spec).items() if value is not None and value not in ([], {})}


def shown(value: Any) -> str:
    """A value as short text: 0.001, not 0.0010000000000000; lists as JSON."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def method_of(run: RunDirectory) -> str:
    """The method's name."""
    return str((run.spec.get("method") or {}).get("name", "-"))


def run_name(run: RunDirectory, *, seed: bool = True) -> str:
    """A readable name, e.g. ``devft · r8 · 20 clients · seed 0``; a trial's says what it changed."""
    spec, meta = run.spec, run.meta
    if "method" not in spec:
        return str(meta.get("sweep") or spec.get("name") or run.run_id)
    parts = [method_of(run)]
    overrides = {k: v for k, v in (meta.get("overrides") or {}).items() if k not in ("seed", "method.name")}
    if overrides:
        parts += [f"{field.rpartition('.')[2]} {shown(value)}" for field, value in overrides.items()]
    else:
        rank = ((spec.get("model") or {}).get("lora") or {}).get("rank")
        num_clients = (spec.get("fleet") or {}).get("num_clients")
        parts += [f"r{rank}"] if rank is not None else []
        parts += [f"{num_clients} clients"] if num_clients is not None else []
    if seed and spec.get("seed") is not None:
        parts.append(f"seed {spec['seed']}")
    return " · ".join(parts)


def group_labels(runs: list[RunDirectory]) -> dict[str, list[RunDirectory]]:
    """Label -> the runs that differ in their seed only. Labels that would collide get the fields that differ."""
    specs = {run.path: {k: v for k, v in filled_fields(run.spec).items() if _describes_work(k)} for run in runs}
    groups: dict[str, list[RunDirectory]] = {}
    for run in runs:
        groups.setdefault(json.dumps(specs[run.path], sort_keys=True), []).append(run)
    labels = [run_name(members[0], seed=False) for members in groups.values()]
    named: dict[str, list[RunDirectory]] = {}
    for label, members in zip(labels, groups.values(), strict=True):
        if labels.count(label) > 1:
            rivals = [g[0] for other, g in zip(labels, groups.values(), strict=True) if other == label]
            label = _distinguished(label, specs[members[0].path], [specs[rival.path] for rival in rivals])
        while label in named:
            label += f" · {members[0].run_id}"
        named[label] = members
    return named


def varied_fields(runs: list[RunDirectory]) -> dict[str, list[Any]]:
    """Dotted field -> its values, one per run, for fields in which these runs differ; seed, name and execution do not count."""
    specs = [{k: v for k, v in filled_fields(run.spec).items() if _describes_work(k)} for run in runs]
    names = dict.fromkeys(name for spec in specs for name in spec)
    values = {name: [spec.get(name) for spec in specs] for name in names}
    return {name: found for name, found in values.items() if len({json.dumps(v) for v in found}) > 1}


def _describes_work(field: str) -> bool:
    """True if a field says what was simulated, and not how or under which name."""
    return field not in ("seed", "name") and field.partition(".")[0] not in ("tracking", "execution")


def _distinguished(label: str, spec: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    differing = [k for k in spec if any(rival.get(k) != spec[k] for rival in rivals)]
    return " · ".join([label, *(f"{k.rpartition('.')[2]} {shown(spec[k])}" for k in differing[:3])])
