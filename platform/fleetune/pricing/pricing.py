"""Prices a round: what it costs each of its clients.

The step is traced from the method's own code on the costed architecture (`pricing.tracing`); bytes are those of the tensors
that travel. With ``cost.model`` another architecture is costed than the one that is trained (`pricing.mapping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fleetune.cost.estimate import Load, Traffic, estimate, overlapped, per_device, seconds_of
from fleetune.cost.polynomials import evaluate, monomials
from fleetune.data.batches import NO_EXAMPLE
from fleetune.data.dataset import TokenizedDataset
from fleetune.files import default_cache_dir
from fleetune.methods.base import Payload, ServerWork
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
        costed = architecture(spec.cost.model) if spec.cost.model else None
        self.model = CostedModel(problem.inputs.base, costed, axes=problem.method.axes)
        self.tracing = Tracing(self.model, problem.method, spec.model.lora, spec.local, default_cache_dir())
        self._provisions: dict[tuple[str, str | None], int] = {}

    def provision_bytes(self, payload: Payload, last: str | None) -> int:
        """Bytes that a client lacks of what this payload needs, whose last provision had the key ``last``."""
        provision = payload.provision
        if provision is None or last == provision.key:
            return 0
        if (provision.key, last) not in self._provisions:
            forms = provision.missing(last)
            self._provisions[provision.key, last] = min(self.tracing.num_bytes(payload, form) for form in forms)
        return self._provisions[provision.key, last]

    def server_work(self, work: ServerWork) -> tuple[float, float]:
        """Virtual seconds and FLOPs of a piece of the server's own work, on ``fleet.server``."""
        shape = replace(self.shape, checkpointing=False)
        side = self.tracing.server_trace(work, shape).server
        load = batch_load(self.problem.inputs.train, [work.rows])
        server = (self.problem.fleet.server,)
        seconds = load.num_steps * seconds_of(side, load.mean, shape.precision, server, np.zeros(1, int))
        return float(seconds[0]), float((load.num_steps * evaluate(side.flops, load.mean))[0])

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
        server_load: Load | None = None,
    ) -> dict[str, np.ndarray]:
        """The cost table's columns (n,) and the bytes of both links, for the clients ``client_ids (n,)``.

        ``group_of (n,)`` is the place of each client's payload in ``payloads``, and ``provision_bytes (n,)`` what it is sent
        beside it. ``checkpointing``, bool (n,), says which clients compute their blocks again; by default the job does.
        ``server_load``: what the server's half works on for them, by default their own ``load``.
        """
        again = np.full(len(client_ids), self.shape.checkpointing) if checkpointing is None else checkpointing
        kinds = 2 * group_of + again  # (n,): clients of one kind have the same trace, and are priced together
        out: dict[str, np.ndarray] = {}
        for kind in np.unique(kinds).tolist() or [0]:
            where = np.flatnonzero(kinds == kind)
            shape = replace(self.shape, checkpointing=bool(kind % 2))
            part = self._uniform(
                round_idx,
                client_ids[where],
                payloads[kind // 2],
                load.at(where),
                provision_bytes[where],
                shape,
                server_load=None if server_load is None else server_load.at(where),
            )
            for name, column in part.items():
                out.setdefault(name, np.zeros(len(client_ids), dtype=column.dtype))[where] = column
        return out

    def _uniform(
        self,
        round_idx: int,
        client_ids: np.ndarray,
        payload: Payload,
        load: Load,
        provision_bytes: np.ndarray,
        shape: WorkShape,
        *,
        server_load: Load | None,
    ) -> dict[str, np.ndarray]:
        """The columns (n,) of clients that receive the same payload and work in the same way."""
        spec, fleet = self.problem.spec, self.problem.fleet
        trace = self.tracing.trace(payload, shape)
        down_bytes = self.tracing.num_bytes(payload, payload.tensors)
        # Bytes of all steps at the cut, (n,) each way: rounded once, as a mean step need not have whole bytes.
        cut_up, cut_down = (load.num_steps * evaluate(way, load.mean) for way in trace.cut)
        down = np.rint(down_bytes + provision_bytes + cut_down)
        up = np.rint(trace.upload[0] + load.num_steps * trace.upload[1] + cut_up)
        down_bps, up_bps, latency = fleet.draw_rates(spec.seed, round_idx, client_ids)
        # The payload, and one a step where the model is cut.
        num_messages = 1 + load.num_steps * trace.cut.any()
        table = estimate(
            trace,
            load,
            Traffic(down, up, down_bps, up_bps, latency, num_messages, fleet.radio(client_ids)),
            precision=shape.precision,
            devices=fleet.devices,
            device_index=fleet.device_index[client_ids],
            server=fleet.server,
            server_load=server_load,
        )
        costs = {**table.columns(), "downlink_bytes": down, "uplink_bytes": up}
        if not self.problem.method.local_plan(payload).pipelined:
            return costs
        return overlapped(
            costs,
            # Nothing at all takes no time (`Traffic.seconds`): to a client that does not learn nothing comes down.
            adapter_down_seconds=np.where(down > 0, latency + 8 * (down - cut_down) / down_bps, 0.0),
            adapter_up_seconds=np.where(up > 0, latency + 8 * (up - cut_up) / up_bps, 0.0),
            idle_watts=per_device("idle_watts", fleet.devices, fleet.device_index[client_ids]),
        )


def work_shape(spec: RunSpec) -> WorkShape:
    """How the job's clients carry out their work."""
    weights, quantization = spec.cost.weights, spec.model.quantization
    if weights == "model":
        weights = "fp32" if quantization == "none" else quantization
    return WorkShape(weights, spec.cost.precision, spec.local.checkpointing)


def batch_load(data: TokenizedDataset, rows: Sequence[np.ndarray]) -> Load:
    """The load of n clients from their batches, examples (steps, batch) each; a device pads a batch to its longest example.

    So it does with the reference paths, if there are any. A short batch counts as the examples that it has: `NO_EXAMPLE`, which
    fills it up, costs nothing. The loss looks at no first token, because nothing predicts it.
    """
    if not any(len(batches) for batches in rows):
        return Load.equal(np.zeros(len(rows), int), 0, 0, 0)
    owner = np.repeat(np.arange(len(rows)), [len(batches) for batches in rows])  # (t,): whose each of all t steps is
    sizes = np.concatenate([(batches != NO_EXAMPLE).sum(axis=1) for batches in rows])
    flat = np.concatenate([batches[batches != NO_EXAMPLE] for batches in rows])
    lengths = data.offsets[flat + 1] - data.offsets[flat]
    paths = np.zeros_like(lengths) if data.reference is None else data.reference.lengths[flat]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])  # (t,): where each step's examples begin in ``flat``
    unlearnt = 1 if data.loss_on == "all" else np.maximum(data.prompt_lengths[flat], 1)
    logits = np.add.reduceat(np.maximum(lengths - unlearnt, 0), starts)
    longest, longest_reference = (np.maximum.reduceat(each, starts) for each in (lengths, paths))
    return Load.of_steps(owner, monomials(sizes, longest, logits, longest_reference), len(rows))
