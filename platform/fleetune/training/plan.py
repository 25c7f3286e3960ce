"""The local plan: a method's description of a client's work, as a value, and what the trainer takes and gives back for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fleetune.models.model import Model
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.seeds import seed_of
from fleetune.tensors import Stack, Tensors, weighted_sum

if TYPE_CHECKING:
    from fleetune.data.dataset import TokenizedDataset


def every(name: str) -> bool:
    """True for every name."""
    return True


def none(name: str) -> bool:
    """False for every name."""
    return False


Loss = Callable[[Network, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(network, hidden states (K b, S, D) after the last block, labels (K b, S), K) -> losses (K,) and counted tokens (K,)."""

AfterBackward = Callable[[Tensors, Tensors, Tensors, int], None]
"""(trained tensors, their gradients, tensors that are not trained, step), the tensors of n clients stacked: {name: (n, …)}.

It may change gradients and untrained tensors in place: importance scores, corrections of the gradient. Clients that have done
all of their steps are no longer among the n, so n may fall from step to step."""

PerClient = Callable[["ClientTask", "TokenizedDataset"], Tensors]


@dataclass(frozen=True)
class LocalPlan:
    """First-order local work: which blocks, what is trained, what goes up, what stays, what is added to the loss."""

    model: Model
    """What the client holds, frozen."""
    trainable: Callable[[str], bool] = every
    """True for the names of the adapter tensors that receive gradients."""
    uploads: Callable[[str], bool] = every
    """True for the names of the adapter tensors that go to the server afterwards."""
    keeps: Callable[[str], bool] = none
    """True for the names of those that stay with the client as its private state until its next round."""
    penalty: Callable[[Tensors, Tensors], Tensor] | None = None
    """Added to each client's loss: (parameters {name: (K, …)}, their values at the start) -> (K,)."""
    loss: Loss | None = None
    """Each client's loss, in place of `training.loss.cohort_loss`."""
    after_backward: AfterBackward | None = None
    """Called between a step's backward pass and the optimizer."""
    per_client: PerClient | None = None
    """Tensors of a client's own that its adapter starts with and that are not trained, made from its examples."""
    split: int | None = None
    """Number of blocks on the client if the model is cut (split learning); the server holds the rest. None: no cut."""
    pipelined: bool = False
    """True if client, links and server work on different micro-batches at once: the same result in less virtual time."""

    @property
    def submodel(self) -> Submodel:
        """The blocks that the client holds."""
        return self.model.submodel


@dataclass(frozen=True)
class ClientTask:
    """One client's work in one round, small enough to be sent with the call."""

    client_id: int
    weight: float
    """p_k = n_k / sum n over the clients whose updates count; 0 for one whose update comes too late."""
    rows: np.ndarray
    """(steps, batch) int64: the examples of each step, as rows of the tokenised dataset; NO_EXAMPLE fills up a batch."""
    learning_rate: float
    """Of all steps of this round."""
    address: tuple[int, int]
    """Run seed and round: with the client's id, the address of its own random draws."""
    private: Tensors | None = None
    """The tensors that stayed with the client after its last round, {name: shape of one client}; None: there are none."""

    @property
    def seed(self) -> int:
        """Seed of the client's own draws in this round (dropout, directions)."""
        run_seed, round_idx = self.address
        return seed_of(run_seed, "client", round_idx, self.client_id)


@dataclass
class CohortUpdate:
    """The results of K clients, in the order of their tasks."""

    upload: Stack | None
    """data (K, P): the tensors that each client sends to the server; None if the method sends none."""
    losses: np.ndarray
    """(K,) float: mean training loss over the client's steps, in nats per token."""
    num_tokens: np.ndarray
    """(K,) int: tokens that the client trained on, in all steps."""
    private: Stack | None = None
    """data (K, P'): the tensors that stay with each client until its next round; None if there are none."""
    server: Tensors = field(default_factory=dict)
    """The server's own tensors, trained meanwhile by its half of the model (split learning); they cross no link."""
    cut_bytes: np.ndarray | None = None
    """(2, K) int: bytes that each client sent over the cut and received over it (split learning)."""
    cut_paths: Sequence[np.ndarray] = ()
    """``cut_bytes`` path by path, each (2, K), if examples take several: the cost model needs them apart, as each has a length of
    its own. Empty: there is one path."""
    upload_bytes: np.ndarray | None = None
    """(K,) int: bytes of each client's upload, if some rows of ``upload`` are filled up to the length of others; else None."""
    diverged_at: np.ndarray | None = None
    """(K,) float: when each client's loss was first not finite, in any unit of time; inf if it never was. Only for clients that
    share something while they work (a server's half): there the first to diverge spoils the others, and is alone to blame."""

    @classmethod
    def joined(cls, updates: Sequence[CohortUpdate]) -> CohortUpdate:
        """One update for clients that worked one by one, in that order."""

        def stacked(parts: list[Stack | None]) -> Stack | None:
            there = [part for part in parts if part is not None]
            return Stack(there[0].shapes, torch.cat([part.data for part in there])) if there else None

        cuts = [u.cut_bytes for u in updates if u.cut_bytes is not None]
        sizes = [u.upload_bytes for u in updates if u.upload_bytes is not None]
        times = [u.diverged_at for u in updates if u.diverged_at is not None]
        return cls(
            upload=stacked([u.upload for u in updates]),
            private=stacked([u.private for u in updates]),
            losses=np.concatenate([u.losses for u in updates]),
            num_tokens=np.concatenate([u.num_tokens for u in updates]),
            server=weighted_sum((1.0, u.server) for u in updates),
            cut_bytes=np.concatenate(cuts, axis=1) if cuts else None,
            upload_bytes=np.concatenate(sizes) if sizes else None,
            diverged_at=np.concatenate(times) if times else None,
        )
