"""What a round costs each of its clients: the question that the engine puts to the cost model.

With ``cost.model`` another architecture is costed than the one that is trained: its depth by fraction, its widths as they
are. A tensor ``layers.<n>.<linear>.lora_A`` of the trained model stands for the same tensor of the costed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from fleetune.cost.estimate import estimate
from fleetune.cost.overlap import overlapped
from fleetune.cost.shapes import ARCHITECTURES
from fleetune.cost.work import LocalWork, lora_targets
from fleetune.data.dataset import TokenizedDataset
from fleetune.engine.problem import Problem
from fleetune.engine.shares import Share
from fleetune.methods.base import Payload
from fleetune.models.base import BaseModel
from fleetune.models.config import ModelConfig
from fleetune.spec import RunSpec
from fleetune.tensors import Tensors
from fleetune.training.plan import LocalPlan


@dataclass(frozen=True)
class Load:
    """What each client of a group has to do, one entry per client."""

    num_steps: np.ndarray
    mean_tokens: np.ndarray
    """Tokens per example of its batches, padded to the batch's longest."""
    max_tokens: np.ndarray
    logit_fraction: float
    """Share of the positions at which the head runs."""

    def at(self, where: np.ndarray) -> Load:
        """The load of some of the clients."""
        return Load(self.num_steps[where], self.mean_tokens[where], self.max_tokens[where], self.logit_fraction)


class Costing:
    """The spec's costed architecture, and how the trained model maps onto it."""

    def __init__(self, spec: RunSpec, base: BaseModel):
        self.spec = spec
        self.trained = base.shape
        self.shape = ARCHITECTURES[spec.cost.model] if spec.cost.model else self.trained
        self.depth_ratio = self.shape.num_layers / self.trained.num_layers

    def layers(self, num_layers: int) -> int:
        """Blocks of the costed architecture that stand for ``num_layers`` of the trained one."""
        return max(1, round(num_layers * self.depth_ratio))

    def num_bytes(self, tensors: Mapping[str, Tensor]) -> float:
        """What tensors of the trained model would weigh on a link with the costed architecture."""
        if self.shape is self.trained:
            return float(sum(t.nbytes for t in tensors.values()))
        return sum(self._elements(name, tensor) * tensor.element_size() for name, tensor in tensors.items())

    def cut_bytes(self, padded_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Uplink (activations and int32 labels) and downlink (gradients) over the cut for so many tokens."""
        element = 4 if self.spec.cost.precision == "fp32" else 2
        down = padded_tokens * self.shape.hidden_size * element
        return down + 4 * padded_tokens, down

    def work(self, plan: LocalPlan, adapter: Tensors, share: Share) -> LocalWork:
        """A client's share of the work under a plan, from the adapter tensors that it really holds."""
        ratio = self.depth_ratio
        num_layers = self.layers(plan.submodel.num_layers)
        trained = {_layer(name) for name in adapter if plan.trainable(name)}
        layers = tuple(n for n in range(num_layers) if min(int(n / ratio), plan.submodel.num_layers - 1) in trained)
        lora = self.spec.model.lora
        kept = {name: t for name, t in adapter.items() if plan.trainable(name)}
        adapter_elements = round(sum(self._elements(name, t) for name, t in adapter.items()))
        return LocalWork(
            shape=self.shape,
            num_layers=num_layers,
            trainable_layers=layers,
            adapter_elements=adapter_elements,
            trainable_elements=min(adapter_elements, round(sum(self._elements(name, t) for name, t in kept.items()))),
            lora_targets=lora_targets(self.shape, lora.target_names, rank=share.rank, layers=layers),
            batch_size=share.batch_size,
            optimizer=self.spec.local.optimizer,
            weight_dtype=_weights(self.spec.cost.weights, self.spec.model),
            adapter_dtype="fp32",
            precision=self.spec.cost.precision,
            split=None if plan.split is None else min(self.layers(plan.split), num_layers - 1),
            checkpointing=share.checkpointing,
        )

    def _elements(self, name: str, tensor: Tensor) -> float:
        """Elements that a trained tensor stands for in the costed architecture, its share of the depth included."""
        parts = name.split(".")
        if self.shape is self.trained or parts[0] != "layers" or not parts[-1].startswith("lora_"):
            return tensor.numel()
        num_in, num_out = self.shape.linears[parts[-2]]
        rank = tensor.shape[0] if parts[-1] == "lora_A" else tensor.shape[1]
        return rank * (num_in if parts[-1] == "lora_A" else num_out) * self.depth_ratio


class Pricing:
    """Prices a round's clients, group by group, from the plans and batches that will really be carried out."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.costing = Costing(problem.spec, problem.inputs.base)

    def columns(
        self,
        round_idx: int,
        client_ids: np.ndarray,
        payloads: Sequence[Payload],
        group_of: np.ndarray,
        load: Load,
        provision_bytes: np.ndarray,
        *,
        shares: Sequence[Share],
        checkpointing: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The cost table's columns and the bytes of both links, one entry per client.

        ``shares``: how much of the work the clients of each payload do. ``checkpointing``: which clients, bool (n,).
        """
        out: dict[str, np.ndarray] = {}
        for key, payload in enumerate(payloads):
            for recomputes in (False, True):
                where = np.flatnonzero((group_of == key) & (checkpointing == recomputes))
                if not len(where) and (out or recomputes):
                    continue
                share = replace(shares[key], checkpointing=recomputes)
                part = self._group(round_idx, client_ids[where], payload, share, load.at(where), provision_bytes[where])
                for name, column in part.items():
                    out.setdefault(name, np.zeros(len(client_ids), dtype=column.dtype))[where] = column
        return out

    def _group(
        self,
        round_idx: int,
        client_ids: np.ndarray,
        payload: Payload,
        share: Share,
        load: Load,
        provision_bytes: np.ndarray,
    ) -> dict[str, np.ndarray]:
        method, spec, fleet = self.problem.method, self.problem.spec, self.problem.fleet
        plan = method.plan(payload)
        adapter = method.client_adapter(payload)
        down = self.costing.num_bytes(payload.tensors) + provision_bytes
        up = np.full(len(client_ids), self.costing.num_bytes({n: t for n, t in adapter.items() if plan.uploads(n)}))
        messages = np.ones(len(client_ids))
        cut_up = cut_down = np.zeros(len(client_ids))
        if plan.split is not None:
            cut_up, cut_down = self.costing.cut_bytes(np.rint(load.mean_tokens * share.batch_size * load.num_steps))
            up, down, messages = up + cut_up, down + cut_down, messages + load.num_steps
        down_bps, up_bps, latency = fleet.draw_rates(spec.seed, round_idx, client_ids)
        table = estimate(
            self.costing.work(plan, adapter, share),
            devices=fleet.devices,
            device_index=fleet.device_index[client_ids],
            num_steps=load.num_steps,
            mean_tokens=load.mean_tokens,
            max_tokens=load.max_tokens,
            downlink_bytes=down,
            uplink_bytes=up,
            down_bps=down_bps,
            up_bps=up_bps,
            latency_seconds=latency,
            num_messages=messages,
            logit_fraction=load.logit_fraction,
            radio=fleet.radio(client_ids),
            server=fleet.server,
        )
        costs = {**table.columns(), "downlink_bytes": down, "uplink_bytes": up}
        if not plan.pipelined:
            return costs
        idle_watts = np.array([profile.idle_watts for profile in fleet.devices])[fleet.device_index[client_ids]]
        return overlapped(
            costs,
            adapter_down_seconds=latency + 8 * (down - cut_down) / down_bps,
            adapter_up_seconds=latency + 8 * (up - cut_up) / up_bps,
            idle_watts=idle_watts,
        )


def batch_load(data: TokenizedDataset, rows: Sequence[np.ndarray]) -> Load:
    """Steps and padded lengths of everybody's batches; a device pads each batch to its own longest example."""
    steps = np.array([len(r) for r in rows])
    if not steps.any():
        zero = np.zeros(len(rows))
        return Load(steps, zero, zero, 1.0)
    longest, summed = np.zeros(len(rows)), np.zeros(len(rows))
    num_tokens = num_prompt_tokens = 0
    widths = np.array([r.shape[1] for r in rows])
    for width in np.unique(widths):  # clients whose batches are as large as each other's
        mine = np.flatnonzero(widths == width)
        flat = np.concatenate([rows[i] for i in mine.tolist()])
        lengths = data.offsets[flat + 1] - data.offsets[flat]
        owner = np.repeat(mine, steps[mine])
        padded = lengths.max(axis=1)
        np.maximum.at(longest, owner, padded)
        summed += np.bincount(owner, padded, len(rows))
        num_tokens += int(lengths.sum())
        num_prompt_tokens += int(data.prompt_lengths[flat].sum())
    return Load(
        num_steps=steps,
        mean_tokens=summed / np.maximum(steps, 1),
        max_tokens=longest,
        logit_fraction=1.0 if data.loss_on == "all" else 1.0 - num_prompt_tokens / max(1, num_tokens),
    )


def _layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else 0


def _weights(choice: Any, model: ModelConfig) -> Any:
    if choice != "model":
        return choice
    return "fp32" if model.quantization == "none" else model.quantization
