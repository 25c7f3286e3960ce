"""What stands beside an adapter of a library (`SKILL`), and what the library shows of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetune import files
from fleetune.errors import UserError
from fleetune.models.library import SKILL, Skill, find_adapters, read_skill

PLACE = "FOLDER"
"""The field that a mistake in a folder of the command line is about."""


def write_skill_file(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what an adapter can do, how well, and what it was trained on. ``facts``: plain data."""
    files.write(folder / SKILL, (json.dumps(facts, indent=2) + "\n").encode())


def library_rows(paths: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each adapter that the paths lead to, in their order; an adapter that cannot be used says why.

    Raises UserError if a path leads to no adapter.
    """
    rows = []
    for name, folder in find_adapters(paths, field=PLACE).items():
        try:
            row = {**_row(read_skill(folder, name, field=PLACE)), "cannot_be_used": None}
        except UserError as error:
            row = {**dict.fromkeys(_COLUMNS), "cannot_be_used": error.rule}
        rows.append({"name": name, **row, "folder": str(folder)})
    return rows


def adapter_details(path: str) -> dict[str, Any]:
    """All that is known of one adapter. Raises UserError if the path leads to none or to several, or if it cannot be used."""
    found = find_adapters([path], field=PLACE)
    if len(found) > 1:
        rule = f"holds {len(found)} adapters: {', '.join(found)}"
        raise UserError(rule, field=PLACE, value=path, hint="name the folder of one; adapters list shows them all")
    (name, folder), *_ = found.items()
    skill = read_skill(folder, name, field=PLACE)
    ranks = {site.removesuffix(".lora_A"): t.shape[0] for site, t in skill.tensors.items() if site.endswith(".lora_A")}
    return {
        "name": name,
        **_row(skill),
        "scaling": skill.scaling,
        "num_params": sum(t.numel() for t in skill.tensors.values()),
        "num_matrices": len(ranks),
        "ranks": dict.fromkeys(ranks, skill.rank) | ranks,
        **{key: value for key, value in skill.metadata.items() if key not in _COLUMNS},
        "files": skill.content,
        "folder": str(folder),
    }


_COLUMNS = ("skill", "base", "rank", "targets", "data", "eval_loss", "untrained_loss", "eval_accuracy")


def _row(skill: Skill) -> dict[str, Any]:
    """`_COLUMNS` of an adapter; None where nothing says it, as in folders from elsewhere."""
    facts, kinds = skill.metadata, {site.rpartition(".")[0].rpartition(".")[2] for site in skill.tensors}
    quality = facts.get("quality")
    measured = quality if isinstance(quality, dict) else {}
    return {
        "skill": facts.get("skill"),
        "base": facts.get("base"),
        "rank": skill.rank,
        "targets": sorted(kinds),
        "data": facts.get("data"),
        **{name: measured.get(name) for name in ("eval_loss", "untrained_loss", "eval_accuracy")},
    }
