"""What a method needs in a job file where nothing of it is run."""

from __future__ import annotations

from typing import Any

from fleetune.methods import METHODS


def settings(method: str) -> dict[str, Any]:
    """The method by name, and adapters for one that composes some: which ones does not matter, as none is read."""
    needs_adapters = "adapters" in METHODS[method].Config.model_fields
    return {"name": method, **({"adapters": ["my-skills"]} if needs_adapters else {})}
