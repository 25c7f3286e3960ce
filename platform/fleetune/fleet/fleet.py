"""The fleet: which client has which device and link, whose link is fast this round, and who leaves.

A struct of arrays: a registered client is four bytes, not an object. Draws are made for the full fleet and
then indexed, so that what happens to a client in a round does not depend on who else was sampled.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from fleetune.config import Config, Place
from fleetune.errors import UserError, unknown_name
from fleetune.fleet.availability import Availability, AvailabilityConfig, build_availability
from fleetune.fleet.availability_trace import AvailabilityTrace, read_trace
from fleetune.fleet.budgets import Budgets, BudgetsConfig, build_budgets
from fleetune.fleet.device_file import Catalogue, built_in, catalogue
from fleetune.fleet.links import NetworkProfile, RadioEnergy
from fleetune.fleet.profile import DeviceProfile
from fleetune.seeds import rng

BATCH, CHECKPOINTING, CAPACITY, RANK = "batch", "checkpointing", "capacity", "rank"
"""The values of fleet.adapt: the part of a client's work that is made smaller."""
DEFAULT_DEVICES = {"jetson-nano": 0.5, "jetson-orin-nano-8gb": 0.3, "jetson-agx-orin-64gb": 0.2}


class FleetConfig(Config):
    """The simulated clients: how many, on which devices, behind which links."""

    num_clients: int = Field(default=20, gt=0, le=10_000_000)
    """Registered clients."""
    device_files: tuple[Place, ...] = ()
    """Files with devices and links of your own (docs/guides/adding_a_device.md), which can then be named below."""
    devices: dict[str, float] = Field(default_factory=lambda: dict(DEFAULT_DEVICES))
    """Fraction of the clients on each device, summing to 1.

    A power mode is a device: ``jetson-agx-orin-64gb@30w``.
    """
    network: str | dict[str, float] = "wifi"
    """The link of all clients, or the fraction of the clients on each."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a sampled client leaves during the round, before it sends its update."""
    server: str = "server-a100"
    """The server's device: computes the server's half in split learning."""
    availability: AvailabilityConfig = AvailabilityConfig()
    """Who can be sampled when."""
    budgets: BudgetsConfig = BudgetsConfig()
    """What a client may spend in a round; who would need more is refused."""
    adapt: Literal["none", "batch", "checkpointing", "capacity", "rank"] = "none"
    """What a client whose budget is broken makes smaller until its work fits: its batches, the activations that it keeps,
    the blocks of its submodel (methods with submodels), or the rank of its adapter. none: it is refused."""

    @field_validator("device_files")
    @classmethod
    def _readable(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        catalogue(files)
        return files

    @field_validator("devices")
    @classmethod
    def _known_devices(cls, devices: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        known = catalogue(info.data.get("device_files", ()))
        for name in devices:
            known.device(name)
        return _in_order(known.devices, built_in().devices, _checked_fractions(devices, field="fleet.devices"))

    @field_validator("server")
    @classmethod
    def _known_server(cls, name: str, info: ValidationInfo) -> str:
        return catalogue(info.data.get("device_files", ())).device(name, field="fleet.server").name

    @field_validator("network")
    @classmethod
    def _known_networks(cls, networks: str | dict[str, float], info: ValidationInfo) -> str | dict[str, float]:
        known = catalogue(info.data.get("device_files", ()))
        if isinstance(networks, str):
            return known.network(networks).name
        for name in networks:
            known.network(name)
        return _in_order(known.networks, built_in().networks, _checked_fractions(networks, field="fleet.network"))

    def catalogue(self) -> Catalogue:
        """The devices and links that this job can name."""
        return catalogue(self.device_files)

    def outside_device_files(self) -> tuple[str, ...]:
        """The files whose content decides what clients cost: part of a run's identity."""
        return self.device_files

    @model_validator(mode="after")
    def _budgets_of_known_devices(self) -> FleetConfig:
        for name in sorted(self.budgets.named_devices()):
            if name not in self.devices:
                raise unknown_name("device in fleet.devices", name, self.devices, field="fleet.budgets")
        return self


@dataclass(frozen=True)
class Fleet:
    """All registered clients as arrays. ``devices`` and ``networks`` hold each kind once."""

    devices: tuple[DeviceProfile, ...]
    networks: tuple[NetworkProfile, ...]
    device_index: np.ndarray
    """(num_clients,) int16: index into ``devices``."""
    network_index: np.ndarray
    """(num_clients,) int16: index into ``networks``."""
    dropout: float
    """Probability that a sampled client leaves during a round."""
    availability: Availability
    budgets: Budgets
    server: DeviceProfile

    @property
    def num_clients(self) -> int:
        """Registered clients."""
        return len(self.device_index)

    @property
    def device_names(self) -> list[str]:
        """The names of the kinds of devices, in the order that ``device_index`` counts them."""
        return [profile.name for profile in self.devices]

    def profile(self, client_id: int) -> DeviceProfile:
        """The device of one client."""
        return self.devices[self.device_index[client_id]]

    def network(self, client_id: int) -> NetworkProfile:
        """The link of one client."""
        return self.networks[self.network_index[client_id]]

    def draw_rates(
        self, run_seed: int, round_idx: int, client_ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """This round's downlink rate and uplink rate in bits/s and one-way latency in seconds of these clients, (n,) each."""
        ids = np.asarray(client_ids)
        # Drawn for the full fleet and then indexed: a client's rate does not depend on who else was sampled.
        z = rng(run_seed, "link-rates", round_idx).standard_normal(self.num_clients)[ids]
        spread = np.exp(self._of_links("sigma", ids) * z)
        limit = self._of_links("max_bps", ids)
        down_bps = np.minimum(self._of_links("down_bps", ids) * spread, limit)
        up_bps = np.minimum(self._of_links("up_bps", ids) * spread, limit)
        return down_bps, up_bps, self._of_links("latency_seconds", ids)

    def radio(self, client_ids: np.ndarray) -> RadioEnergy:
        """The radio's energy terms of these clients, arrays (n,)."""
        ids = np.asarray(client_ids)
        return RadioEnergy(
            downlink_joules_per_byte=self._of_links("downlink_joules_per_megabyte", ids) / 1e6,
            uplink_joules_per_byte=self._of_links("uplink_joules_per_megabyte", ids) / 1e6,
            radio_watts=self._of_links("radio_watts", ids),
            linear_to_bps=self._of_links("radio_linear_to_bps", ids),
            tail_joules=self._of_links("tail_joules", ids),
            tail_watts=self._of_links("tail_joules", ids) / self._of_links("tail_seconds", ids),
        )

    def dropped(self, run_seed: int, round_idx: int, client_ids: np.ndarray) -> np.ndarray:
        """True for each of these clients that leaves during the round, bool (n,)."""
        draws = rng(run_seed, "dropout", round_idx).random(self.num_clients)
        return draws[np.asarray(client_ids)] < self.dropout

    def rate_notes(self, precision: str) -> list[str]:
        """Sentences that name the devices without this precision, and the precision whose rate stands for it."""
        missing: dict[str, list[str]] = {}
        for profile in self.devices:
            if (other := profile.stand_in(precision)) is not None:
                missing.setdefault(other, []).append(profile.name)
        return [
            f"no {precision} on {', '.join(names)}: the {other} rate stands for it" for other, names in missing.items()
        ]

    def _of_links(self, name: str, client_ids: np.ndarray) -> np.ndarray:
        """A field of each client's link, (n,) float."""
        return np.array([getattr(link, name) for link in self.networks], float)[self.network_index[client_ids]]


def build_fleet(config: FleetConfig, seed: int, *, trace: AvailabilityTrace | None = None) -> Fleet:
    """The fleet of a job: exact counts of each kind, dealt out in an order that depends on the seed alone.

    ``trace``: the result of `read_availability`, if its file was read before.
    """
    networks = {config.network: 1.0} if isinstance(config.network, str) else config.network
    known = config.catalogue()
    devices = tuple(known.device(name) for name in config.devices)
    return Fleet(
        devices=devices,
        networks=tuple(known.network(name) for name in networks),
        device_index=_device_index(config, seed),
        network_index=_dealt(networks, config.num_clients, rng(seed, "fleet-networks")),
        dropout=config.dropout,
        availability=build_availability(
            config.availability,
            config.num_clients,
            run_seed=seed,
            trace=trace or read_availability(config, seed),
        ),
        budgets=build_budgets(config.budgets, devices),
        server=known.device(config.server),
    )


def read_availability(config: FleetConfig, seed: int) -> AvailabilityTrace | None:
    """The intervals of the job's trace file, None if it names none. Raises UserError if something is wrong with it."""
    if config.availability.path is None:
        return None
    names = list(config.devices)
    return read_trace(config.availability.path, device_names=names, device_index=_device_index(config, seed))


def _device_index(config: FleetConfig, seed: int) -> np.ndarray:
    """(num_clients,) int16: which device of ``config.devices`` each client has."""
    return _dealt(config.devices, config.num_clients, rng(seed, "fleet-devices"))


def counts_of(fractions: Mapping[str, float], total: int) -> list[int]:
    """Whole counts that sum to ``total``, by largest remainder; ties go to the kind that stands first."""
    shares = [total * fraction for fraction in fractions.values()]
    counts = [int(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda kind: (round(counts[kind] - shares[kind], 9), kind))
    for kind in by_remainder[: total - sum(counts)]:
        counts[kind] += 1
    return counts


def _dealt(fractions: Mapping[str, float], total: int, generator: np.random.Generator) -> np.ndarray:
    """(total,) int16: a kind for each client, in exact numbers and random order."""
    counts = counts_of(fractions, total)
    return generator.permutation(np.repeat(np.arange(len(counts), dtype=np.int16), counts))


def _in_order(known: Iterable[str], built_in: Container[str], fractions: Mapping[str, float]) -> dict[str, float]:
    """The fractions, sorted: entries of the job's own files first, then in the catalogue's order, power modes by name.

    The order in which a job file lists them must not change a run, and ties in `counts_of` go to the kind that stands first.
    """
    place = {name: (name in built_in, i) for i, name in enumerate(known)}
    return {name: fractions[name] for name in sorted(fractions, key=lambda name: (place[name.partition("@")[0]], name))}


def _checked_fractions(fractions: dict[str, float], *, field: str) -> dict[str, float]:
    if any(fraction < 0 for fraction in fractions.values()):
        raise UserError("fractions are not negative", field=field, value=fractions)
    if abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(
            "fractions must sum to 1",
            field=field,
            value=fractions,
            hint=f"they sum to {sum(fractions.values()):g}",
        )
    return fractions
