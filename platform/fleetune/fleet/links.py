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


@dataclass(frozen=True, kw_only=True)
class NetworkProfile:
    """One kind of link."""

    name: str
    down_bps: float
    """Median rate to the client, bits per second."""
    up_bps: float
    """Median rate to the server, bits per second."""
    latency_seconds: float
    """One way: half of a measured ping."""
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
    """Spent after a transfer until the radio sleeps, if nothing else is sent before."""
    tail_seconds: float = 1.0
    """Length of the tail."""
    source: str = field(compare=False)


@dataclass(frozen=True)
class RadioEnergy:
    """Radio terms of n clients: joules per byte each way up to a rate, watts while the link is busy, and the tail after."""

    downlink_joules_per_byte: np.ndarray  # (n,)
    uplink_joules_per_byte: np.ndarray  # (n,)
    radio_watts: np.ndarray  # (n,) while the link is busy
    linear_to_bps: np.ndarray  # (n,) bits/s: above this rate a byte takes less energy
    tail_joules: np.ndarray  # (n,) after a transfer
    tail_watts: np.ndarray  # (n,) during the tail

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
