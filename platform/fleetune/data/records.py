"""Records: examples as columns of text, found in a source's columns under their usual names."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetune.data.config import ColumnMapping
from fleetune.data.files import Table
from fleetune.errors import UserError, unknown_name

log = logging.getLogger(__name__)

PROMPT_NAMES = ("prompt", "question", "instruction", "query", "problem", "input", "text")
RESPONSE_NAMES = ("response", "completion", "output", "solution", "answer", "rationale", "target", "label")
CATEGORY_NAMES = ("category", "skill", "topic", "subject", "task", "type")


@dataclass(frozen=True)
class Examples:
    """Text per column, one entry per example."""

    columns: dict[str, list[str]]
    """All of the source's columns, and ``prompt``, ``response`` and ``category`` (``all`` if it has none)."""
    has_categories: bool

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    def __getitem__(self, column: str) -> list[str]:
        return self.columns[column]

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at ``rows`` ``(n,)``, in that order."""
        picked = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Examples(columns=picked, has_categories=self.has_categories)

    def digest(self) -> str:
        """A hash of all text, for records of what was used."""
        content = json.dumps(self.columns, sort_keys=True).encode()
        return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclass(frozen=True)
class Records:
    """The examples of one run: those dealt to the clients and those held out."""

    name: str
    train: Examples
    eval: Examples


def to_examples(table: Table, *, mapping: ColumnMapping, field: str = "data.dataset") -> Examples:
    """The table as text, with columns prompt, response and category; blank examples are left out."""
    if len(table) == 0:
        raise UserError("holds no examples", field=field, value=table.name)
    names = _find_columns(table, mapping)
    columns = {name: [_text(value) for value in values] for name, values in table.columns.items()}
    for role in ("prompt", "response"):
        for row, value in enumerate(table.columns[names[role]]):
            if value is None:
                raise UserError(f"{table.place(row)}: no {names[role]!r}", field=f"data.columns.{role}")
    category = columns[names["category"]] if "category" in names else ["all"] * len(table)
    prompt, response = columns[names["prompt"]], columns[names["response"]]
    if names["prompt"] == "instruction" and "input" in columns and mapping.prompt is None:
        pairs = zip(prompt, columns["input"], strict=True)
        prompt = [f"{instruction}\n{more}" if more.strip() else instruction for instruction, more in pairs]
    columns = {**columns, "prompt": prompt, "response": response, "category": category}
    examples = Examples(columns=columns, has_categories="category" in names)
    kept = [i for i in range(len(table)) if prompt[i].strip() and response[i].strip()]
    if not kept:
        raise UserError("every example has a blank prompt or response", field=field, value=table.name)
    if len(kept) < len(table):
        log.warning("%s: %d of %d examples left out: blank", table.name, len(table) - len(kept), len(table))
        examples = examples.take(np.array(kept))
    return examples


def _find_columns(table: Table, mapping: ColumnMapping) -> dict[str, str]:
    """The source's column for each role; ``category`` only where there is one."""
    known = list(table.columns)
    found: dict[str, str] = {}
    roles = {"prompt": PROMPT_NAMES, "response": RESPONSE_NAMES, "category": CATEGORY_NAMES}
    for role, usual in roles.items():
        given = getattr(mapping, role)
        if given is not None and given not in known:
            raise unknown_name(f"column in {table.name}", given, known, field=f"data.columns.{role}")
        free = [name for name in usual if name in known and name not in found.values()]
        if given is None and not free and role != "category":
            shown = ", ".join(name if len(name) <= 40 else name[:39] + "…" for name in known)
            rule = f"{table.name}: no column is named like a {role} ({', '.join(usual)})"
            header = "; the first line must be a header" if table.name.endswith((".csv", ".tsv")) else ""
            raise UserError(rule, field=f"data.columns.{role}", hint=f"name one of: {shown}{header}")
        if given is not None or free:
            found[role] = given if given is not None else free[0]
    return found


def _text(value: Any) -> str:
    """A cell as text: lists of text one item a line, other structures as JSON, nothing for null."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def category_codes(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Categories as codes int64 ``(n,)`` into their sorted names."""
    names, codes = np.unique(np.asarray(values, dtype=object), return_inverse=True)
    return codes.astype(np.int64), [str(name) for name in names]
