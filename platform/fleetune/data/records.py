"""Makes examples, columns of text, from the columns of a source."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fleetune.data.cells import is_structure, text_of
from fleetune.data.columns import CHAT_HINT, find_roles
from fleetune.data.config import DataConfig
from fleetune.data.files import Table
from fleetune.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Text per column, one entry per example."""

    columns: dict[str, list[str]]
    """All of the source's columns, and ``prompt``, ``response`` and ``category`` (``all`` if it has none)."""
    has_categories: bool
    source: str = "examples"
    """The name of their source in messages."""
    field: str = "data.dataset"
    """The field of the job that names the source."""
    unused: tuple[str, ...] = ()
    """Columns with text that neither a role nor the template nor the partition uses."""

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    def __getitem__(self, column: str) -> list[str]:
        return self.columns[column]

    def take(self, rows: np.ndarray) -> Examples:
        """The examples at ``rows`` ``(n,)``, in that order."""
        picked = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=picked)

    def digest(self) -> str:
        """A hash of all text in all columns, by which a run's data are identified. 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.columns):
            for text in (name, str(len(self)), *self.columns[name]):
                data = text.encode("utf-8", "surrogatepass")
                digest.update(b"%d:" % len(data) + data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Records:
    """The examples of one run: those dealt to the clients and those held out."""

    name: str
    train: Examples
    eval: Examples
    content: dict[str, str]
    """Field that names a source -> digest of all its examples, before any were drawn from them."""


def to_examples(table: Table, *, config: DataConfig, field: str = "data.dataset") -> Examples:
    """The table as text, with columns prompt, response and category; examples without a text are left out."""
    if len(table) == 0:
        raise UserError("holds no examples", field=field, value=table.name)
    roles = find_roles(table, config)
    columns = _texts(table, roles.required(config))
    _refuse_structures(table, roles.prompt, "prompt")
    _refuse_structures(table, roles.response, "response")
    prompt, response = columns[roles.prompt], columns[roles.response]
    if roles.input_follows:
        pairs = zip(prompt, columns["input"], strict=True)
        prompt = ["\n".join(text for text in pair if text.strip()) for pair in pairs]
    category = columns.get(roles.category) if roles.category else None
    used = roles.used(config)
    examples = Examples(
        {**columns, "prompt": prompt, "response": response, "category": category or ["all"] * len(table)},
        has_categories=category is not None,
        source=table.name,
        field=field,
        unused=tuple(name for name, texts in columns.items() if name not in used and any(map(str.strip, texts))),
    )
    return _without_blanks(examples, table)


def _texts(table: Table, required: dict[str, str]) -> dict[str, list[str]]:
    """Each column's texts. One that has none is left out, or is a fault if it is ``required`` (column -> field)."""
    texts: dict[str, list[str]] = {}
    faults = dict(table.unreadable)
    for name, values in table.columns.items():
        try:
            texts[name] = [text_of(value) for value in values]
        except ValueError as error:
            faults[name] = str(error)
    for name, reason in faults.items():
        if name in required:
            hint = "write it as text, or name another column"
            raise UserError(f"{table.name}: column {name!r} cannot be read: {reason}", field=required[name], hint=hint)
    return texts


def _refuse_structures(table: Table, column: str, role: str) -> None:
    """Raises UserError if a cell is a list or an object: only the user can say which part of it is the text.

    A prompt may be a list of texts, which are its lines.
    """
    for row, value in enumerate(table.columns[column]):
        if not is_structure(value):
            continue
        is_list = isinstance(value, list | tuple)
        if role == "prompt" and is_list and all(isinstance(item, str) for item in value):
            continue
        is_chat = is_list and any(isinstance(item, dict) and {"content", "value"} & item.keys() for item in value)
        what = f"a list of {len(value)}" if is_list else f"an object with {', '.join(map(str, value)) or 'nothing'}"
        hint = CHAT_HINT if is_chat else "write the one text that is meant as a column of its own"
        rule = f"{table.place(row)}: {column!r} is {what}, not a text"
        raise UserError(rule, field=f"data.columns.{role}", hint=hint)


def _without_blanks(examples: Examples, table: Table) -> Examples:
    """The examples that have both a prompt and a response. Null, NaN, an empty text and blanks all count as no text."""
    prompt, response = examples["prompt"], examples["response"]
    no_response = [i for i, text in enumerate(response) if not text.strip()]
    no_prompt = [i for i, text in enumerate(prompt) if not text.strip() and response[i].strip()]
    left_out = set(no_response) | set(no_prompt)
    if not left_out:
        return examples
    if len(left_out) == len(examples):
        raise UserError(
            "every example has a blank prompt or response",
            field=examples.field,
            value=table.name,
            hint="name other columns in data.columns",
        )
    groups = (("response", no_response), ("prompt", no_prompt))
    counts = [f"{len(rows)} without a {role}" for role, rows in groups if rows]
    log.warning(
        "%s: %d of %d examples left out: blank (%s; the first is %s)",
        table.name, len(left_out), len(examples), ", ".join(counts), table.place(min(left_out)),
    )  # fmt: skip
    return examples.take(np.array([i for i in range(len(examples)) if i not in left_out]))


def category_codes(values: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Categories as codes int64 ``(n,)`` into their sorted names."""
    names, codes = np.unique(np.asarray(values, dtype=object), return_inverse=True)
    return codes.astype(np.int64), [str(name) for name in names]
