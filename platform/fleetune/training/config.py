"""The fields of a job file for a client's local work."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from fleetune.config import Config

MAX_DRAWN = 100_000_000  # assumed: their places in a client's data are drawn at once


class LocalConfig(Config):
    """The optimizer steps of one client in one round."""

    steps: int = Field(8, ge=1, le=1_000_000)
    """Optimizer steps per round, every batch full; ignored where epochs is given."""
    epochs: float | None = Field(None, gt=0, le=10_000)
    """Passes over the client's own examples per round: clients with more examples take more steps. A pass sees each example
    once, and its last batch is what is left; of a pass in part (0.5) as many examples, rounded, but one at least."""
    batch_size: int = Field(8, ge=1, le=65_536)
    """Examples per step; with epochs the last step of a pass may have fewer."""
    learning_rate: float = Field(1.0e-3, ge=0, le=1e6)
    """Step size of the first round."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the rounds (constant inside a round): constant, or cosine down to min_learning_rate."""
    min_learning_rate: float = Field(1.0e-6, ge=0, le=1e6)
    """Where the cosine schedule ends."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW starts each round with fresh moments, as the published federated baselines do; SGD is without momentum."""
    weight_decay: float = Field(0.0, ge=0, le=1e6)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float | None = Field(1.0, gt=0, le=1e12)
    """Each client's gradient is scaled down to this norm; null: never."""

    checkpointing: bool = False
    """Blocks keep only their input and are computed again in the backward pass: less memory, more FLOPs, the same result."""

    @model_validator(mode="after")
    def _examples_fit(self) -> LocalConfig:
        if self.steps * self.batch_size > MAX_DRAWN:
            raise ValueError(f"steps times batch_size is more than {MAX_DRAWN} examples a round")
        return self

    def learning_rate_at(self, round_idx: int, num_rounds: int) -> float:
        """The step size of a round: lr_min + (lr_0 - lr_min) (1 + cos(pi t / T)) / 2 for cosine."""
        if self.schedule == "constant":
            return self.learning_rate
        low = min(self.min_learning_rate, self.learning_rate)
        return low + 0.5 * (self.learning_rate - low) * (1 + math.cos(math.pi * round_idx / num_rounds))

    def batches(self, num_examples: int) -> list[tuple[int, int]]:
        """(examples of a batch, number of such batches) in the round of a client that holds ``num_examples``; a step each."""
        if self.epochs is None:
            return [(self.batch_size, self.steps)]
        out = []
        for size, times in self.passes(num_examples):
            full, rest = divmod(size, self.batch_size)
            out += [(self.batch_size, full * times), (rest, times)]
        return [(size, times) for size, times in out if size and times]

    def passes(self, num_examples: int) -> list[tuple[int, int]]:
        """(examples of a pass, number of such passes) over a client's own examples: full passes, and one in part."""
        num_full, fraction = divmod(self.epochs or 0.0, 1.0)
        # A client trains on one example at least, also if the fraction of its examples rounds to none.
        rest = min(max(round(fraction * num_examples), 0 if num_full else 1), num_examples)
        return [(size, times) for size, times in ((num_examples, int(num_full)), (rest, 1)) if size and times]
