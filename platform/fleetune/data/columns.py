"""Finds the source's columns for prompt, response and category: by the job, or else by the usual names."""

from __future__ import annotations

from dataclasses import dataclass

from fleetune.data.config import ColumnMapping, DataConfig
from fleetune.data.files import Table
from fleetune.data.template import column_names
from fleetune.errors import UserError, unknown_name

PROMPT_NAMES = ("prompt", "question", "instruction", "query", "problem", "input", "text")
RESPONSE_NAMES = ("response", "completion", "output", "solution", "answer", "rationale", "target", "label")
CATEGORY_NAMES = ("category", "skill", "topic", "subject", "task", "type")
REFERENCE_NAMES = ("reference", "ground_truth")
CHAT_NAMES = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat")
CHAT_HINT = "chats are not read; write what the user says and what is to be learnt as two columns of text"
ROLES = frozenset({"prompt", "response", "category"})


@dataclass(frozen=True)
class Roles:
    """The source's column for each role."""

    prompt: str
    response: str
    category: str | None
    input_follows: bool
    """True if the prompt is an instruction and its input is in another column."""

    def required(self, config: DataConfig) -> dict[str, str]:
        """Source columns that must hold text, each with the field of the job that requires it."""
        required = dict.fromkeys(column_names(config.template), "data.template")
        if self.input_follows:
            required["input"] = "data.columns.prompt"
        key = _key_column(config)
        if key is not None:
            required[key] = "data.partition.key"
        if self.category is not None and (config.columns.category is not None or "category" in required):
            required[self.category] = "data.columns.category"
        return {**required, self.prompt: "data.columns.prompt", self.response: "data.columns.response"}

    def used(self, config: DataConfig) -> set[str]:
        """Source columns that end up in an example. In a template the roles' names mean the roles."""
        named = set(column_names(config.template))
        used = {self.response, *(named - ROLES)}
        if "prompt" in named:
            used |= {self.prompt, "input"} if self.input_follows else {self.prompt}
        named_by_the_job = (self.category, _key_column(config), config.columns.reference)
        return used | {name for name in named_by_the_job if name is not None} | set(REFERENCE_NAMES)


def find_roles(table: Table, config: DataConfig) -> Roles:
    """The source's column for each role. Raises UserError if a named column is missing, or if none has a usual name."""
    found: dict[str, str] = {}
    for role, usual in (("prompt", PROMPT_NAMES), ("response", RESPONSE_NAMES), ("category", CATEGORY_NAMES)):
        name = _find(role, usual, table, config.columns, taken=set(found.values()))
        if name is not None:
            found[role] = name
    others = {found["response"], found.get("category"), *column_names(config.template)}
    follows = found["prompt"] == "instruction" and "input" in table.names and "input" not in others
    return Roles(found["prompt"], found["response"], found.get("category"), follows)


def _find(role: str, usual: tuple[str, ...], table: Table, mapping: ColumnMapping, *, taken: set[str]) -> str | None:
    """The column of one role; None for a category that is not there."""
    known = table.names
    named: str | None = getattr(mapping, role)
    if named is not None and named not in known:
        raise unknown_name(f"column in {table.name}", named, known, field=f"data.columns.{role}")
    if named is not None:
        return named
    taken = taken | set(mapping.model_dump(exclude_none=True).values())
    free = next((name for name in usual if name in known and name not in taken), None)
    if free is None and role != "category":
        shown = ", ".join(name if len(name) <= 40 else name[:39] + "…" for name in known)
        rule = f"{table.name}: no column is named like a {role} ({', '.join(usual)})"
        header = "; the first line must be a header" if table.name.endswith((".csv", ".tsv")) else ""
        chat = f"; {CHAT_HINT}" if any(name.lower() in CHAT_NAMES for name in known) else ""
        raise UserError(rule, field=f"data.columns.{role}", hint=f"name one of: {shown}{header}{chat}")
    return free


def _key_column(config: DataConfig) -> str | None:
    """The column by which the examples are dealt to the clients, None if the partition needs none."""
    return config.partition.key if config.partition.kind not in ("iid", "quantity") else None
