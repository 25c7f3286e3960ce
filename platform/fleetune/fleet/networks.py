"""The links between client and server: rates, latency, how much they vary, and what the radio draws.

A rate is drawn for each client and round as ``median · exp(sigma · z)``, one z for both directions. Latency
is one way: half of a measured ping. Radio power is linear in the rate to about 30 Mbit/s and flat from there (Huang et al.,
MobiSys 2012: hardware of 2012): ``alpha · min(rate, 30) + base`` watts, which is ``8 · alpha`` joules per megabyte up to
there and ``base`` watts while sending. LTE's radio stays on after each transfer: 12.3 J until it sleeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from fleetune.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """One kind of link."""

    name: str
    down_bps: float
    """Median rate to the client, bits per second."""
    up_bps: float
    latency_seconds: float
    sigma: float = 0.0
    """Spread of the lognormal over clients and rounds; 0: always the median."""
    max_bps: float = float("inf")
    """Upper end of the drawn rates."""
    downlink_joules_per_megabyte: float = 0.0
    uplink_joules_per_megabyte: float = 0.0
    radio_watts: float = 0.0
    """Drawn by the radio while it sends or receives, whatever the rate."""
    radio_linear_to_bps: float = float("inf")
    """Up to this rate a megabyte takes its joules; from there on the radio draws no more watts."""
    tail_joules: float = 0.0
    """Spent after a transfer until the radio sleeps, where nothing else is sent before."""
    tail_seconds: float = 1.0
    """How long that takes."""
    source: str = field(compare=False)


@dataclass(frozen=True)
class RadioEnergy:
    """Radio terms of n clients, arrays (n,): joules per byte each way up to a rate, watts while the link is busy, and the tail
    after a transfer."""

    downlink_joules_per_byte: np.ndarray
    uplink_joules_per_byte: np.ndarray
    radio_watts: np.ndarray
    linear_to_bps: np.ndarray
    tail_joules: np.ndarray
    tail_watts: np.ndarray

    def joules(
        self,
        downlink_bytes: ArrayLike,  # (n,)
        uplink_bytes: ArrayLike,  # (n,)
        *,
        down_bps: ArrayLike,  # (n,) bits per second
        up_bps: ArrayLike,  # (n,)
        link_seconds: ArrayLike,  # (n,) both ways, latency included
        quiet_seconds: ArrayLike,  # (n,) of the turn between transfers
        num_messages: ArrayLike = 1,  # each way in which anything is sent
    ) -> np.ndarray:
        """Energy of moving these bytes in one turn, (n,).

        A tail ends with the next transfer, so between transfers there is no more of it than there is quiet time.
        """
        down, up = np.asarray(downlink_bytes, float), np.asarray(uplink_bytes, float)
        moving = (
            self.downlink_joules_per_byte * down * np.minimum(1.0, self.linear_to_bps / np.asarray(down_bps, float))
        )
        moving = moving + self.uplink_joules_per_byte * up * np.minimum(
            1.0, self.linear_to_bps / np.asarray(up_bps, float)
        )
        num_transfers = np.asarray(num_messages) * ((down > 0).astype(float) + (up > 0))
        last = self.tail_joules * (num_transfers > 0)
        tails = np.minimum(self.tail_joules * num_transfers, last + self.tail_watts * np.asarray(quiet_seconds, float))
        return moving + self.radio_watts * np.asarray(link_seconds) + tails


_WIFI_RADIO = {
    "downlink_joules_per_megabyte": 8 * 0.13701,
    "uplink_joules_per_megabyte": 8 * 0.28317,
    "radio_watts": 0.13286,
    "radio_linear_to_bps": 30e6,
}
_LTE_RADIO = {
    "downlink_joules_per_megabyte": 8 * 0.05197,
    "uplink_joules_per_megabyte": 8 * 0.43839,
    "radio_watts": 1.28804,
    "radio_linear_to_bps": 30e6,
    "tail_joules": 12.3,
    "tail_seconds": 11.6,
}
_3G_RADIO = {
    "downlink_joules_per_megabyte": 8 * 0.12212,
    "uplink_joules_per_megabyte": 8 * 0.86898,
    "radio_watts": 0.81788,
    "radio_linear_to_bps": 30e6,
}
_UCC = "uccmisl/5Gdataset"


def _network(
    name: str, down_mbps: float, up_mbps: float, latency_ms: float, radio: dict[str, float], source: str, *,
    sigma: float = 0.0, max_mbps: float = float("inf"),
) -> NetworkProfile:  # fmt: skip
    return NetworkProfile(
        name=name, down_bps=down_mbps * 1e6, up_bps=up_mbps * 1e6,
        latency_seconds=latency_ms * 1e-3, sigma=sigma, max_bps=max_mbps * 1e6, source=source, **radio,
    )  # fmt: skip


NETWORKS: dict[str, NetworkProfile] = {
    network.name: network
    for network in (
        # name, down Mbit/s, up Mbit/s, one-way latency ms
        _network("wifi", 34.5, 26.3, 5, _WIFI_RADIO, sigma=0.5, max_mbps=400,
                 source="medians and spread of 19 volunteers (PKU-Chengxu/FLASH speed_distri.json, read as "
                        "KB/s as its code "
                        "does); latency assumed; at most the link rate of Wi-Fi 5 in EdgeFlowerTune"),
        _network("wifi-lab", 200, 200, 2, _WIFI_RADIO,
                 source="Wi-Fi 5 at a link rate of 400 Mbit/s (EdgeFlowerTune), half of it as goodput "
                        "(recalled); latency assumed"),
        _network("ethernet", 1000, 1000, 0.2, {},
                 source="gigabit Ethernet of EdgeFlowerTune's Jetsons; latency assumed"),
        _network("5g", 31.8, 14.7, 34.5, _LTE_RADIO, sigma=1.3, max_mbps=250,
                 source=f"static downloads, median and spread computed from {_UCC}; uplink assumed at LTE's "
                        f"ratio of "
                        "6 to 13; radio assumed as LTE's"),
        _network("5g-driving", 16.7, 7.7, 37.5, _LTE_RADIO, sigma=1.5, max_mbps=250,
                 source=f"median and spread computed from {_UCC}; uplink and radio assumed as for 5g"),
        _network("lte", 13, 6, 42, _LTE_RADIO, sigma=1.0, max_mbps=100,
                 source=f"field medians of Huang et al., MobiSys 2012; latency and spread computed from "
                        f"{_UCC}; maximum assumed"),
        _network("lte-driving", 7.1, 3.3, 42, _LTE_RADIO, sigma=1.0, max_mbps=100,
                 source=f"median and spread computed from {_UCC}; uplink assumed at 6 to 13; maximum "
                        f"assumed"),
        _network("3g", 2.5, 0.94, 61.5, _3G_RADIO, sigma=0.86, max_mbps=20,
                 source=f"HSPA+ while driving, computed from {_UCC}; uplink at Neurosurgeon's ratio of 1.44 "
                        f"to 3.84; maximum assumed"),
        _network("fedadapter", 8, 8, 0, {},
                 source="1 MB/s both ways (FedAdapter, AutoFedNLP trial_error.py)"),
        _network("fwdllm", 10.48576, 10.48576, 0, {},
                 source="10 · 1024² bits/s both ways (FwdLLM, plot.ipynb)"),
    )
}  # fmt: skip


def network(name: str) -> NetworkProfile:
    """The network of that name; ``UserError`` with the nearest name for an unknown one."""
    if name not in NETWORKS:
        raise unknown_name("network", name, NETWORKS, field="fleet.network")
    return NETWORKS[name]
