"""The base of every part of a job file: frozen, strict, and documented field by field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen part of a job file. Each component owns its own subclass; unknown fields, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
