"""The links that ship with fleetune: fleet/networks.yaml, with a source for every number."""

from __future__ import annotations

from fleetune.fleet.device_file import built_in
from fleetune.fleet.links import NetworkProfile

NETWORKS: dict[str, NetworkProfile] = built_in().networks


def network(name: str) -> NetworkProfile:
    """The link of that name that ships with fleetune. Raises UserError with the nearest name if there is none."""
    return built_in().network(name)
