"""LoRA pairs in 4 bits on the wire: each row of ranks in NF4 (`models.nf4_rows`), under the pair's names with ``_nf4`` behind.

A (r, in) is coded as it lies, B (out, r) transposed, so that both are r rows: a client of a smaller rank gets the first of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fleetune.methods.base import is_lora_b
from fleetune.models.adapters import RANK
from fleetune.models.nf4_rows import from_nf4, to_nf4
from fleetune.scopes import SIMULATION, part
from fleetune.tensors import Stack, Tensors
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.trainer import train_cohort
from fleetune.training.worker import Worker

WIRE_AXES = {"lora_A_nf4": (RANK, "in_nf4"), "lora_B_nf4": (RANK, "out_nf4")}
Sites = Mapping[str, tuple[int, int]]


def to_wire(adapter: Tensors) -> Tensors:
    """fp32 tensors (…, r, in) and (…, out, r) -> uint8 (…, r, bytes)."""
    return {f"{name}_nf4": to_nf4(t.mT if is_lora_b(name) else t) for name, t in adapter.items()}


def from_wire(coded: Tensors, sites: Sites) -> Tensors:
    """The inverse. ``sites``: {site: (in, out)} of the full model, all of whose blocks have the same sizes."""
    sizes = {site.split(".", 2)[2]: size for site, size in sites.items()}
    out: Tensors = {}
    for wire_name, packed in coded.items():
        name = wire_name.removesuffix("_nf4")
        num_in, num_out = sizes[name.split(".", 2)[2].rpartition(".")[0]]
        rows = from_nf4(packed, num_out if is_lora_b(name) else num_in)
        out[name] = rows.mT.contiguous() if is_lora_b(name) else rows
    return out


def decoded_stack(received: Stack, sites: Sites) -> Stack:
    """What K clients sent, uint8 (K, P'), as fp32 (K, P) under the adapter's names."""
    return _stack(from_wire(received.views(), sites))


def coded_changes(worker: Worker, plan: LocalPlan, start: Tensors, tasks: Sequence[ClientTask]) -> CohortUpdate:
    """Train as the plan says, and send theta_k - theta in 4 bits.

    Codes hide what is not finite, so a client whose change is not finite gets a loss that is not.
    """
    update = train_cohort(worker.network(plan.model), plan, start, tasks, data=worker.data, local=worker.local)
    assert update.upload is not None
    change = update.upload.data - Stack.of([start]).data
    with part(SIMULATION):
        is_finite = np.isfinite(change.sum(dim=1).tolist())
    update.losses = np.where(is_finite, update.losses, np.nan)
    update.upload = _stack(to_wire(Stack(update.upload.shapes, change).views()))
    return update


def _stack(views: Tensors) -> Stack:
    """{name: (K, …)} as one stack."""
    flat: list[Tensor] = [view.flatten(1) for view in views.values()]
    return Stack({name: tuple(view.shape[1:]) for name, view in views.items()}, torch.cat(flat, dim=1))
