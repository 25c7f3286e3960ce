"""Runs a method's own `local_update` on tensors without content, of the architecture to be costed, and records what it does.

So no formula for a step's costs is written by hand, and a new method's costs follow from its code. The costed architecture may
be another than the trained one (`cost.model`): the method is made anew for its depth, and payloads are laid out for its sizes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fleetune import files
from fleetune.cost.polynomials import POINTS, Point
from fleetune.cost.recording import Recording, Unequal, at_depth
from fleetune.cost.trace import StepTrace
from fleetune.cost.tracer import PAYLOAD, WEIGHTS, Tracer
from fleetune.data.dataset import TokenizedDataset
from fleetune.methods.base import Method, Payload, ServerWork
from fleetune.methods.find import code_of
from fleetune.models.config import LoRAConfig
from fleetune.models.meta import MetaNetwork, meta_base
from fleetune.models.model import Model
from fleetune.models.network import Network
from fleetune.pricing.mapping import CostedModel
from fleetune.scopes import on_server
from fleetune.tensors import Tensors
from fleetune.training.config import LocalConfig
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan
from fleetune.training.worker import Worker

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).parent.parent
SHALLOW = 3  # blocks: the lowest, one between, and the highest
# Files and folders of the package whose code decides a trace: a change of them makes cached traces void (`code_version`).
TRACED_CODE = (
    "models",
    "training",
    "methods",
    "cost",
    "pricing/tracing.py",
    "pricing/mapping.py",
    "tensors.py",
    "scopes.py",
)


@dataclass(frozen=True)
class WorkShape:
    """How a client's device carries out its work, whatever the batch is: each gets a trace of its own."""

    weights: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"  # storage of the frozen linear layers
    precision: Literal["fp32", "bf16"] = "fp32"  # arithmetic, and storage of all that is not quantised
    checkpointing: bool = False  # blocks are computed again in the backward pass instead of being kept


class Tracing:
    """The traces of one method, each made once and stored in ``cache_dir`` (None: only in this object)."""

    def __init__(
        self, model: CostedModel, method: Method, lora: LoRAConfig, local: LocalConfig, cache_dir: Path | None
    ):
        self.model, self.lora, self.local, self.cache_dir = model, lora, local, cache_dir
        self.trained_method, self.method = method, model.method(method)
        self._traces: dict[str, StepTrace] = {}

    def trace(self, payload: Payload, shape: WorkShape) -> StepTrace:
        """The step of a client that gets this payload of the trained model."""
        key = self._key(payload, shape)
        if key not in self._traces:
            self._traces[key] = self._cached(key, lambda: self._made(payload, shape))
        return self._traces[key]

    def server_trace(self, work: ServerWork, shape: WorkShape) -> StepTrace:
        """The step of a piece of the server's own work on the trained model; all of it is on the server's side."""
        payload = work.payload
        tensors = [(n, tuple(t.shape), str(t.dtype)) for part in _parts(payload) for n, t in part.items()]
        key = self._hash(shape, ["server", tensors, sorted(payload.values.items())])
        if key not in self._traces:
            self._traces[key] = self._cached(key, lambda: self._made_of_server(payload, shape))
        return self._traces[key]

    def num_bytes(self, payload: Payload, tensors: Tensors) -> int:
        """Bytes of tensors that are about a payload's blocks, on the costed architecture."""
        return self.model.num_bytes(tensors, self.trained_method.submodel(payload).num_layers)

    def _key(self, payload: Payload, shape: WorkShape) -> str:
        """A hash of all that a trace depends on: code, architecture, adapter, optimizer, plan, and the payload's tensors.

        Number and length of steps and learning rates are left out: a trace prices any of them.
        """
        method, plan = self.trained_method, self.trained_method.local_plan(payload)
        adapter = method.client_adapter(payload)
        roles = [(name, plan.trainable(name), plan.uploads(name), plan.keeps(name)) for name in adapter]
        tensors = [
            [(name, tuple(t.shape), str(t.dtype)) for name, t in part.items()] for part in (adapter, *_parts(payload))
        ]
        return self._hash(shape, [plan.submodel.num_layers, plan.split, roles, tensors])

    def _hash(self, shape: WorkShape, facts: list[Any]) -> str:
        """A hash of what all traces of this method depend on, and of further facts."""
        method = self.trained_method
        local = self.local.model_dump(exclude={"steps", "epochs", "batch_size", "learning_rate", "min_learning_rate"})
        common = [
            code_version(), asdict(self.model.shape), self.model.trained.num_layers, self.lora.model_dump(), local,
            method.config.model_dump(), asdict(shape), POINTS,
            code_of(type(method)),  # `code_version` has that of all others
        ]  # fmt: skip
        return hashlib.blake2b(json.dumps([*common, *facts]).encode(), digest_size=16).hexdigest()

    def _cached(self, key: str, make: Callable[[], StepTrace]) -> StepTrace:
        """The trace from the cache folder; if it is not there, or is damaged, it is made and written."""
        if self.cache_dir is None:
            return self._traced(make)
        path = self.cache_dir / "traces" / f"{key}.json"
        try:
            content = files.read(path, holds="a cost trace", must_be_sealed=True)
            return StepTrace.from_json(json.loads(content)["trace"])
        except (OSError, ValueError, KeyError):  # not there, or damaged
            pass
        trace = self._traced(make)
        try:
            files.write(path, json.dumps({"trace": trace.to_json(), "checksum": files.BLANK}).encode(), lasting=False)
        except OSError as error:
            log.warning("a cost trace is not cached: %s", error)
        return trace

    def _traced(self, make: Callable[[], StepTrace]) -> StepTrace:
        """A new trace. The work draws random numbers (dropout), which must not change those that the run draws later."""
        state = torch.random.get_rng_state()
        try:
            return make()
        finally:
            torch.random.set_rng_state(state)

    def _made(self, payload: Payload, shape: WorkShape) -> StepTrace:
        """The trace from two shallow models, if all blocks have the same tensors, else from the full one.

        A step of LLaMA2-7B runs through 32 equal blocks, so that three and four blocks tell as much in a fraction of the time.
        At a split, client and server have blocks of different costs.
        """
        plan = self.trained_method.local_plan(payload)
        trained, costed = plan.submodel.num_layers, self.model.layers(plan.submodel.num_layers)
        if costed > SHALLOW + 1 and plan.split is None and self._is_uniform(payload, plan):
            parts = [self._recorded(self.model.at_depth(n, of=trained), payload, shape) for n in (SHALLOW, SHALLOW + 1)]
            try:
                return at_depth(parts[0], parts[1], costed - SHALLOW)
            except Unequal:
                pass  # the method's code treats some block as no other, although its tensors are the same
        return self._recorded(self.model, payload, shape).trace()

    def _made_of_server(self, payload: Payload, shape: WorkShape) -> StepTrace:
        """The trace of the server's own work, from two steps at both `POINTS`, of which the first is counted."""
        tracers = []
        with torch.device("meta"):
            worker = _MetaWorker(self.model, self.lora, self.local, shape)
            method = self.model.method(self.trained_method)
            costed = self.model.payload(payload, self.trained_method.submodel(payload).num_layers)
        for point in POINTS:
            worker.data = _examples(point)
            tracer = Tracer(worker.base.shape.vocab_size)
            tracer.given([t for part in _parts(costed) for t in part.values()], PAYLOAD)
            with on_server(), tracer.running():
                method.serve(worker, ServerWork(costed, _rows(point, tracer, num_steps=2)))
            tracers.append(tracer)
        return Recording.of(tracers, [[], []], [[0, 0], [0, 0]]).trace()

    def _is_uniform(self, payload: Payload, plan: LocalPlan) -> bool:
        """True if all blocks have tensors of the same names and sizes, and the plan trains, sends and keeps the same of each.

        So it is, too, if no block has a tensor of its own. Tensors that are held may be named after what they are a part of
        first (``pool.0.layers.3.…``).
        """
        of_block: dict[str, set[tuple]] = {}
        for part in (payload.tensors, self.trained_method.client_adapter(payload), payload.held):
            for name, tensor in part.items():
                before, layers, after = name.partition("layers.")
                block, _, rest = after.partition(".") if layers else ("", "", name)
                facts = (before + rest, tuple(tensor.shape), plan.trainable(name), plan.uploads(name), plan.keeps(name))
                of_block.setdefault(block, set()).add(facts)
        of_block.pop("", None)
        is_same = len({frozenset(facts) for facts in of_block.values()}) == 1
        return not of_block or (is_same and len(of_block) == plan.submodel.num_layers)

    def _recorded(self, model: CostedModel, payload: Payload, shape: WorkShape) -> Recording:
        return Recording.of(*zip(*self.record(model, payload, shape), strict=True))

    def record(
        self, model: CostedModel, payload: Payload, shape: WorkShape
    ) -> list[tuple[Tracer, list[list[int]], list[int]]]:
        """Trace a step at both `POINTS`. Per point: the tracer, a step's bytes at the cut each way and path by path, and the
        upload's bytes."""
        with torch.device("meta"):  # whatever the worker and the method create has no content
            worker = _MetaWorker(model, self.lora, self.local, shape)
            method = model.method(self.trained_method)
            costed = model.payload(payload, self.trained_method.submodel(payload).num_layers)
            network = worker.network(method.model(costed))  # assembled beforehand: a client does not pay for it
        tensors = [*network.model.parameters(), *network.model.buffers(), *costed.held.values()]
        return [record(method, worker, costed, point, tensors) for point in POINTS]


def record(
    method: Method, worker: _MetaWorker, payload: Payload, point: Point, weights: list[torch.Tensor]
) -> tuple[Tracer, list[list[int]], list[int]]:
    """Record two steps of one client, the second of which finds the optimizer's state.

    Also a step's bytes at the cut each way, for each path that examples take, and the upload's bytes: those of any number of
    steps, and those of each step.
    """
    worker.data = _examples(point)
    tracer = Tracer(worker.base.shape.vocab_size)
    tracer.given(weights, WEIGHTS)
    tracer.given([*payload.tensors.values(), *payload.server.values()], PAYLOAD)
    update = _update(method, worker, payload, point, tracer, num_steps=2)
    if not tracer.ops:
        tracer.only_held()  # a client that computes nothing needs the memory of its model all the same
    whole = [] if update.cut_bytes is None else [update.cut_bytes]
    cut = [[int(n) // 2 for n in path[:, 0]] for path in update.cut_paths or whole]
    return tracer, cut, _upload_bytes(method, worker, payload, point, update)


def _update(
    method: Method, worker: _MetaWorker, payload: Payload, point: Point, tracer: Tracer, *, num_steps: int
) -> CohortUpdate:
    rows = _rows(point, tracer, num_steps=num_steps)
    with tracer.running():
        return method.local_update(worker, payload, [ClientTask(0, 1.0, rows, worker.local.learning_rate, (0, 0))])


def _parts(payload: Payload) -> tuple[Tensors, ...]:
    """All tensors of a payload."""
    return payload.tensors, payload.server, payload.held


def _rows(point: Point, tracer: Tracer, *, num_steps: int) -> _Rows:
    """Steps of the same examples, which tell the tracer when each begins."""
    rows = np.tile(np.arange(point.batch_size), (num_steps, 1)).view(_Rows)
    rows.tracer = tracer
    return rows


def _upload_bytes(
    method: Method, worker: _MetaWorker, payload: Payload, point: Point, update: CohortUpdate
) -> list[int]:
    """The bytes of a client's upload that it sends after any number of steps, and those that it sends for each step.

    What goes up is mostly part of the adapter, however many steps there were. Otherwise a call of one step tells.
    """
    if update.upload is None:
        return [0, 0]
    adapter, size = method.client_adapter(payload), update.upload.data[0].nbytes
    if all(name in adapter and tuple(adapter[name].shape) == shape for name, shape in update.upload.shapes.items()):
        return [size, 0]
    tracer = Tracer(worker.base.shape.vocab_size)
    shorter = _update(method, worker, payload, point, tracer, num_steps=1)
    assert shorter.upload is not None
    per_step = size - shorter.upload.data[0].nbytes
    return [size - 2 * per_step, per_step]


class _Rows(np.ndarray):
    """The examples of each step, (steps, B): taking those of a step tells the tracer that it begins."""

    tracer: Tracer

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            self.tracer.begin_step(key)
        return np.asarray(self)[key]


class _MetaWorker(Worker):
    """A worker of the costed architecture: its weights and its examples have no content."""

    def __init__(self, model: CostedModel, lora: LoRAConfig, local: LocalConfig, shape: WorkShape):
        local = local.model_copy(update={"checkpointing": shape.checkpointing})
        base = meta_base(model.shape, weights=shape.weights, precision=shape.precision)
        super().__init__(base=base, lora=lora, local=local, data=_examples(POINTS[0]), precision=shape.precision)
        self._made: dict[tuple[int, str | None], Network] = {}

    def network(self, model: Model) -> Network:
        """A network of as many blocks: which blocks of the base they are made of changes no cost."""
        depth, quantization = model.submodel.num_layers, model.quantization
        if (depth, quantization) not in self._made:
            base = self.base
            # No device pays for assembling it, also if that is asked for while a tracer runs.
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                if quantization is not None:
                    base = meta_base(base.shape, weights=quantization, precision=self.precision)
                self._made[depth, quantization] = MetaNetwork(base, depth, self.lora, precision=self.precision)
        network = self._made[depth, quantization]
        network.hold(model.held)
        return network


def _examples(point: Point) -> TokenizedDataset:
    """B examples of S tokens, and of R on the reference path, with M positions where the loss looks on either.

    It never looks at the first token, which nothing predicts.
    """
    reference = _path(point, point.num_reference) if point.num_reference else None
    return replace(_path(point, point.num_tokens), reference=reference)


def _path(point: Point, num_tokens: int) -> TokenizedDataset:
    """One path of the B examples, ``num_tokens`` each."""
    share, rest = divmod(point.num_logits, point.batch_size)
    learnt = np.full(point.batch_size, share) + (np.arange(point.batch_size) < rest)
    return TokenizedDataset(
        tokens=np.zeros(point.batch_size * num_tokens, np.int32),
        offsets=np.arange(point.batch_size + 1) * num_tokens,
        prompt_lengths=(num_tokens - learnt).astype(np.int32),
        rows=np.arange(point.batch_size),
        overlaps=np.zeros(point.batch_size, np.int32),
        categories=np.zeros(point.batch_size, np.int64),
        loss_on="response",
        pad_token_id=0,
        num_truncated=0,
    )


@cache
def code_version() -> str:
    """A hash of all code that a trace runs, and torch's version."""
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=16)
    for part in TRACED_CODE:
        path = PACKAGE / part
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
