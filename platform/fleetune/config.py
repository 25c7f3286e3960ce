"""The base of every part of a job file: frozen, strict, and documented field by field."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A frozen part of a job file. Each component owns its own subclass; unknown fields, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _may_be_a_path(text: str) -> str:
    """The text. Raises ValueError if no file system takes it as a path: ``Path.exists`` would raise instead of saying no."""
    try:
        parts = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        raise ValueError("holds characters that no file's name can hold") from None
    if "\0" in text or max(map(len, parts)) > 255:
        raise ValueError("names no file: a part of it is longer than 255 bytes, or holds a zero byte")
    return text


Place = Annotated[str, Field(min_length=1, max_length=4000), AfterValidator(_may_be_a_path)]
"""A field that can name a file or a folder; a hub id and the like are short enough, too."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted fields; lists and empty mappings are values."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        out.update(flatten(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value})
    return out
