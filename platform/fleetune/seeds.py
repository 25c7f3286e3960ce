"""Every random draw has an address: (run seed, purpose, round, client). Nothing is drawn from anywhere else.

The address is hashed, so that streams of different purposes are independent, and a run that is resumed, or spread
over other workers, draws the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(run_seed: int, purpose: str, *address: int) -> int:
    """A 63-bit seed for one address, e.g. ``seed_of(spec.seed, "batches", round_idx, client_id)``."""
    text = f"{run_seed}/{purpose}/" + "/".join(map(str, address))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def rng(run_seed: int, purpose: str, *address: int) -> np.random.Generator:
    """A NumPy generator at one address."""
    return np.random.Generator(np.random.Philox(key=seed_of(run_seed, purpose, *address)))
