"""The error that a job gives."""

from __future__ import annotations

from typing import Any

import pytest

from fleetune.errors import UserError
from fleetune.spec import from_dict


def complaint(values: dict[str, Any]) -> UserError:
    """The UserError of a job that is not valid."""
    with pytest.raises(UserError) as caught:
        from_dict(values)
    return caught.value
