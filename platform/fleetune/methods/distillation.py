"""What FedSODA's server does with a full model and a sub-model of it, step by step over batches: look, align, compare.

Zhu et al. 2025, "FedSODA", arXiv 2508.12727, gives none of the equations; all below is a reconstruction. The alignment is the
layer-wise distillation of FedPFT (Peng et al. 2024, arXiv 2404.11536) and offsite-tuning (Xiao et al. 2023, arXiv 2302.04870),
applied to a sub-model of some of the model's blocks, with the softened logits of Hinton et al. 2015 (arXiv 1503.02531).

Shape legend: b examples, S tokens, T = all their tokens without padding, D hidden size, V vocabulary, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from fleetune.data.batches import NO_EXAMPLE, collate, num_tokens
from fleetune.data.dataset import TokenizedDataset
from fleetune.models.model import Model
from fleetune.models.network import Network
from fleetune.tensors import Stack, Tensors
from fleetune.training.device import on_device
from fleetune.training.loss import cohort_loss
from fleetune.training.optimizer import clip_rows, make_optimizer
from fleetune.training.plan import LocalPlan
from fleetune.training.trainer import StackedAdapters
from fleetune.training.worker import Worker


@dataclass(frozen=True)
class Alignment:
    """The loss of an alignment, a T^2 KL(z_F || z_S) + b MSE, and its steps."""

    logits_weight: float
    """a, of the divergence of softened logits."""
    hidden_weight: float
    """b, of the difference of hidden states."""
    temperature: float
    learning_rate: float


@dataclass(frozen=True)
class Batch:
    """One step's examples on the network's device."""

    ids: Tensor
    """(b, S)"""
    labels: Tensor
    """(b, S), -100 where nothing is learnt"""
    mask: Tensor
    """(b, S) bool: where there is no padding"""
    places: Tensor
    """(T,): the same places in the flattened batch"""


def batches(data: TokenizedDataset, rows: np.ndarray, device: torch.device) -> Iterator[Batch]:
    """The batches of all steps. ``rows``: as `ServerWork.rows`."""
    for step in range(len(rows)):
        examples = rows[step]
        examples = examples[examples != NO_EXAMPLE]
        ids, labels = collate(data, examples)
        mask = np.arange(ids.shape[1]) < num_tokens(data, examples)[:, None]
        arrays = (ids, labels, mask, np.flatnonzero(mask))
        yield Batch(*(on_device(array, device) for array in arrays))


@torch.no_grad()
def layer_statistics(worker: Worker, model: Model, rows: np.ndarray) -> Tensors:
    """How alike the model's hidden states are: ``cosine`` (L + 1, L + 1) and ``cka`` (L, L), in fp64.

    ``cosine``: mean over tokens of cos(H_i, H_j), the embedding first. ``cka``: linear CKA of the blocks' outputs (Kornblith et
    al. 2019, arXiv 1905.00414) with each example's tokens as a minibatch, whose HSICs are summed (Nguyen et al. 2021, arXiv
    2010.15327); the kernels of a whole text would not fit into memory.
    """
    network = worker.network(model)
    network.set_adapter(None)
    size = network.num_layers + 1
    cosine, hsic = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size - 1, size - 1, dtype=torch.float64)
    total = 0
    for batch in batches(worker.data, rows, network.device):
        h = network.embed(batch.ids)
        states = [h]
        for n in range(network.num_layers):
            h = network.blocks(h, n, n + 1)
            states.append(h)
        mask = batch.mask[:, :, None].to(h.dtype)  # padding becomes 0 and adds nothing to any sum
        units = torch.stack([(normalize(x, dim=-1) * mask).flatten() for x in states])
        cosine = cosine + (units @ units.T).double().cpu()
        kernels = torch.stack([_centred_kernel(x, mask) for x in states[1:]])
        hsic = hsic + (kernels @ kernels.T).double().cpu()
        total += len(batch.places)
    norms = hsic.diagonal().sqrt().clamp_min(1e-12)
    return {"cosine": cosine / total, "cka": hsic / norms[:, None] / norms[None, :]}


def _centred_kernel(x: Tensor, mask: Tensor) -> Tensor:
    """The linear kernels between the tokens of each example, centred, all in one row (b S S,). x (b, S, D), mask (b, S, 1)."""
    mean = (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    centred = (x - mean) * mask
    return (centred @ centred.mT).flatten()


def align(
    worker: Worker,
    full: tuple[Model, Tensors],
    sub: tuple[Model, Tensors],
    ends: Sequence[int],
    rows: np.ndarray,
    how: Alignment,
) -> Tensors:
    """Train the sub-model's adapter until the sub-model does what the full model does; ``full`` and ``sub``: model and adapter.

    Block n of the sub-model has to give what the full model gives after its block ``ends[n]``, the last of the group that n
    stands for, and the sub-model's logits have to be the full model's. Returns the adapter, and ``loss``, those of the first and
    the last step.
    """
    teacher, student = worker.network(full[0]), worker.network(sub[0])
    given = Stack.of([full[1]]).to(teacher.device).views() if full[1] else None
    adapters = StackedAdapters([sub[1]], LocalPlan(sub[0]), student.device)
    rates = torch.tensor([[how.learning_rate]]).to(student.device)
    optimizer = make_optimizer(worker.local, adapters.trained.data, rates)
    losses = []
    for batch in batches(worker.data, rows, student.device):
        teacher.set_adapter(given)
        with torch.no_grad():
            wanted = _outputs(teacher, batch, ends)
        leaves = adapters.parameters(1)
        student.set_adapter(adapters.all_tensors(leaves, 1))
        loss = alignment_loss(wanted, _outputs(student, batch, range(student.num_layers)), how)
        loss.backward()
        grads = adapters.gather_gradients(leaves, 1)
        if worker.local.max_grad_norm is not None:
            clip_rows(grads, worker.local.max_grad_norm)
        optimizer.step(grads)
        losses.append(loss.detach())
    student.set_adapter(None)
    teacher.set_adapter(None)
    ends_of_loss = torch.stack([losses[0], losses[-1]]).double().cpu()
    return {**adapters.merged().to("cpu").client(0), "loss": ends_of_loss}


def _outputs(network: Network, batch: Batch, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits (T, V), and the hidden states (T, D) after each of ``blocks``, ascending; the last of them is the model's last."""
    h, states, done = network.embed(batch.ids), [], 0
    for block in blocks:
        h = network.blocks(h, done, block + 1)
        done = block + 1
        states.append(h.reshape(-1, h.shape[-1]).index_select(0, batch.places))
    return network.logits(states[-1]), states


def alignment_loss(wanted: tuple[Tensor, list[Tensor]], found: tuple[Tensor, list[Tensor]], how: Alignment) -> Tensor:
    """a T^2 KL(softmax(z_F / T) || softmax(z_S / T)) + b mean_n mean(((H_F,n - H_S,n) / rms(H_F,n))^2), means over tokens.

    The root mean square is each token's own, over D.
    """
    t = how.temperature
    full, sub = (log_softmax(logits / t, dim=-1) for logits in (wanted[0], found[0]))
    logits = t * t * kl_div(sub, full, log_target=True, reduction="none").sum(-1).mean()
    hidden = []
    for h_full, h_sub in zip(wanted[1], found[1], strict=True):
        square = h_full.square().mean(-1, keepdim=True).clamp_min(1e-12)
        hidden.append(((h_full - h_sub).square() / square).mean())
    return how.logits_weight * logits + how.hidden_weight * torch.stack(hidden).mean()


def gradient_divergence(
    worker: Worker, full: tuple[Model, Tensors], sub: tuple[Model, Tensors], rows: np.ndarray
) -> Tensors:
    """||g_S - g_F|| / ||g_F|| of the loss with respect to the same adapter in the sub-model and in the full model.

    The two adapters hold the same tensors in the same order under other names. Gradients are means over the steps of ``rows``.
    """
    of_full, of_sub = (_gradient(worker, *model, rows) for model in (full, sub))
    return {"divergence": (of_sub - of_full).norm() / of_full.norm().clamp_min(1e-300)}


def _gradient(worker: Worker, model: Model, adapter: Tensors, rows: np.ndarray) -> Tensor:
    """The mean gradient of the steps' losses, all of the adapter's tensors in one row, fp64."""
    network = worker.network(model)
    leaves = {name: t.to(network.device)[None].clone().requires_grad_() for name, t in adapter.items()}
    network.set_adapter(leaves)
    for batch in batches(worker.data, rows, network.device):
        loss, _ = cohort_loss(network, network.blocks(network.embed(batch.ids)), batch.labels, 1)
        (loss.sum() / len(rows)).backward()
    network.set_adapter(None)
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves.values()]
    return torch.cat([grad.flatten() for grad in grads]).double().cpu()
