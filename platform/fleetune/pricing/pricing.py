"""What a round costs each of its clients: the question that the engine puts to the cost model.

The step is traced from the method's own code on the costed architecture (`pricing.tracing`); bytes are those of the tensors
that travel. With ``cost.model`` another architecture is costed than the one that is trained (`pricing.mapping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fleetune.cost.estimate import Load, estimate
from fleetune.cost.overlap import overlapped
from fleetune.cost.polynomials import evaluate, monomials
from fleetune.data.batches import NO_EXAMPLE
from fleetune.data.dataset import TokenizedDataset
from fleetune.files import default_cache_dir
from fleetune.methods.base import Payload
from fleetune.models.architectures import architecture
from fleetune.pricing.mapping import CostedModel
from fleetune.pricing.tracing import Tracing, WorkShape
from fleetune.problem import Problem
from fleetune.spec import RunSpec


class Pricing:
    """Prices a round's clients, group by group, from the plans and batches that will really be carried out."""

    def __init__(self, problem: Problem):
        self.problem, spec = problem, problem.spec
        self.shape = work_shape(spec)
        self.model = CostedModel(problem.inputs.base, architecture(spec.cost.model) if spec.cost.model else None)
        self.tracing = Tracing(self.model, problem.method, spec.model.lora, spec.local, default_cache_dir())

    def columns(
        self,
        round_idx: int,
        client_ids: np.ndarray,
        payloads: Sequence[Payload],
        group_of: np.ndarray,
        load: Load,
        provision_bytes: np.ndarray,
        *,
        checkpointing: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """The cost table's columns and the bytes of both links, one entry per client.

        ``load``: what everybody works on, batch sizes included. ``checkpointing``: which clients compute their blocks again,
        bool (n,); as the job says where it is not given.
        """
        again = np.full(len(client_ids), self.shape.checkpointing) if checkpointing is None else checkpointing
        kinds = 2 * group_of + again
        out: dict[str, np.ndarray] = {}
        for kind in np.unique(kinds).tolist() or [0]:
            where = np.flatnonzero(kinds == kind)
            shape = replace(self.shape, checkpointing=bool(kind % 2))
            part = self._alike(
                round_idx, client_ids[where], payloads[kind // 2], load.at(where), provision_bytes[where], shape
            )
            for name, column in part.items():
                out.setdefault(name, np.zeros(len(client_ids), dtype=column.dtype))[where] = column
        return out

    def _alike(
        self,
        round_idx: int,
        client_ids: np.ndarray,
        payload: Payload,
        load: Load,
        provision_bytes: np.ndarray,
        shape: WorkShape,
    ) -> dict[str, np.ndarray]:
        """Clients of one payload that work in one way."""
        spec, fleet = self.problem.spec, self.problem.fleet
        trace = self.tracing.trace(payload, shape)
        down_bytes, up_bytes = self.tracing.link_bytes(payload)
        cut_up, cut_down = (load.num_steps * evaluate(way, load.mean) for way in trace.cut)
        down = np.rint(down_bytes + provision_bytes + cut_down)
        up = np.rint(up_bytes + cut_up)
        down_bps, up_bps, latency = fleet.draw_rates(spec.seed, round_idx, client_ids)
        table = estimate(
            trace,
            load,
            precision=shape.precision,
            devices=fleet.devices,
            device_index=fleet.device_index[client_ids],
            downlink_bytes=down,
            uplink_bytes=up,
            down_bps=down_bps,
            up_bps=up_bps,
            latency_seconds=latency,
            num_messages=1 + load.num_steps * trace.cut.any(),
            radio=fleet.radio(client_ids),
            server=fleet.server,
        )
        costs = {**table.columns(), "downlink_bytes": down, "uplink_bytes": up}
        if not self.problem.method.local_plan(payload).pipelined:
            return costs
        idle_watts = np.array([profile.idle_watts for profile in fleet.devices])[fleet.device_index[client_ids]]
        return overlapped(
            costs,
            adapter_down_seconds=latency + 8 * (down - cut_down) / down_bps,
            adapter_up_seconds=latency + 8 * (up - cut_up) / up_bps,
            idle_watts=idle_watts,
        )


def work_shape(spec: RunSpec) -> WorkShape:
    """How the job's clients work."""
    weights, quantization = spec.cost.weights, spec.model.quantization
    if weights == "model":
        weights = "fp32" if quantization == "none" else quantization
    return WorkShape(weights, spec.cost.precision, spec.local.checkpointing)


def batch_load(data: TokenizedDataset, rows: Sequence[np.ndarray]) -> Load:
    """What everybody's batches, (steps, batch) each, are to the cost model; a device pads each to its own longest example.

    A short batch has the examples that it has: what fills its place up costs nothing.

    The loss looks at no first token, because nothing predicts it.
    """
    if not any(len(batches) for batches in rows):
        return Load.equal(np.zeros(len(rows), int), 0, 0, 0)
    owner = np.repeat(np.arange(len(rows)), [len(batches) for batches in rows])
    sizes = np.concatenate([(batches != NO_EXAMPLE).sum(axis=1) for batches in rows])
    flat = np.concatenate([batches[batches != NO_EXAMPLE] for batches in rows])
    lengths = data.offsets[flat + 1] - data.offsets[flat]
    unlearnt = 1 if data.loss_on == "all" else np.maximum(data.prompt_lengths[flat], 1)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    logits = np.add.reduceat(np.maximum(lengths - unlearnt, 0), starts)
    return Load.of_steps(owner, monomials(sizes, np.maximum.reduceat(lengths, starts), logits), len(rows))
