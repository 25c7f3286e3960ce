"""Runs a method's own `local_update` on fake tensors of the architecture to be costed: no formula stands in for it.

The architecture may be another one than that which is trained (`cost.model`): the method is made anew for its depth, and a
payload is laid out for its sizes, tensor by tensor.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fleetune import files
from fleetune.cost.polynomials import POINTS, Point
from fleetune.cost.trace import Recording, StepTrace, Unequal, at_depth
from fleetune.cost.tracer import PAYLOAD, WEIGHTS, Tracer
from fleetune.data.dataset import TokenizedDataset
from fleetune.methods.base import Method, Payload
from fleetune.models.config import LoRAConfig
from fleetune.models.meta import MetaNetwork
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.pricing.mapping import CostedModel
from fleetune.tensors import num_bytes, select
from fleetune.training.config import LocalConfig
from fleetune.training.plan import ClientTask, LocalPlan
from fleetune.training.worker import Worker

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).parent.parent
SHALLOW = 3  # blocks: the lowest, one between, and the highest
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
    """How a client's device carries out its work; what a client may change to fit. Its batch is that of its examples."""

    weights: Literal["fp32", "bf16", "int8", "nf4"] = "fp32"
    """Storage of the frozen linear layers."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic, and storage of all that is not quantised."""
    checkpointing: bool = False
    """Blocks are computed again in the backward pass instead of being kept."""


class Tracing:
    """Traces of one method, each made once and kept on disk."""

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
            self._traces[key] = self._cached(key, payload, shape)
        return self._traces[key]

    def link_bytes(self, payload: Payload) -> tuple[int, int]:
        """Bytes down and up of a client that gets this payload: those of the tensors, on the costed architecture."""
        with torch.device("meta"):
            costed = self.model.payload(payload, self.trained_method.submodel(payload).num_layers)
            plan, adapter = self.method.local_plan(costed), self.method.client_adapter(costed)
        return costed.num_bytes, num_bytes(select(adapter, plan.uploads))

    def _key(self, payload: Payload, shape: WorkShape) -> str:
        """All that a trace depends on: code, architecture, adapter, optimizer, plan, and the payload's tensors."""
        method, plan = self.trained_method, self.trained_method.local_plan(payload)
        local = self.local.model_dump(exclude={"steps", "epochs", "batch_size", "learning_rate", "min_learning_rate"})
        tensors = [
            (name, tuple(t.shape), str(t.dtype), plan.trainable(name), plan.uploads(name), plan.keeps(name))
            for part in (method.client_adapter(payload), payload.tensors, payload.server)
            for name, t in part.items()
            if name.startswith("layers.")
        ]
        facts = [
            code_version(), asdict(self.model.shape), self.model.trained.num_layers, self.lora.model_dump(), local,
            method.config.model_dump(), asdict(shape), plan.submodel.num_layers, plan.split, tensors, POINTS,
        ]  # fmt: skip
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()

    def _cached(self, key: str, payload: Payload, shape: WorkShape) -> StepTrace:
        if self.cache_dir is None:
            return self._traced(payload, shape)
        path = self.cache_dir / "traces" / f"{key}.json"
        try:
            content = files.read(path, holds="a cost trace", must_be_sealed=True)
            return StepTrace.from_json(json.loads(content)["trace"])
        except (OSError, ValueError, KeyError):  # none there, or one that was damaged
            pass
        trace = self._traced(payload, shape)
        try:
            files.write(path, json.dumps({"trace": trace.to_json(), "checksum": files.BLANK}).encode(), lasting=False)
        except OSError as error:
            log.warning("a cost trace is not cached: %s", error)
        return trace

    def _traced(self, payload: Payload, shape: WorkShape) -> StepTrace:
        state = torch.random.get_rng_state()
        try:
            return self._watched(payload, shape)
        finally:
            torch.random.set_rng_state(state)  # the run draws what it would have drawn

    def _watched(self, payload: Payload, shape: WorkShape) -> StepTrace:
        """From two shallow copies where all blocks are alike, else from the whole model."""
        plan = self.trained_method.local_plan(payload)
        trained, costed = plan.submodel.num_layers, self.model.layers(plan.submodel.num_layers)
        if costed > SHALLOW + 1 and plan.split is None and self._alike(payload, plan):
            parts = [self._recorded(self.model.at_depth(n, of=trained), payload, shape) for n in (SHALLOW, SHALLOW + 1)]
            try:
                return at_depth(parts[0], parts[1], costed - SHALLOW)
            except Unequal:
                pass  # the code treats some block as no other
        return self._recorded(self.model, payload, shape).trace()

    def _alike(self, payload: Payload, plan: LocalPlan) -> bool:
        """Whether every block has the same tensors, trained and sent alike."""
        of_block: dict[str, set[tuple]] = {}
        for part in (payload.tensors, self.trained_method.client_adapter(payload)):
            for name, tensor in part.items():
                _, block, rest = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
                facts = (rest, tuple(tensor.shape), plan.trainable(name), plan.uploads(name), plan.keeps(name))
                of_block.setdefault(block, set()).add(facts)
        of_block.pop("", None)
        return len({frozenset(facts) for facts in of_block.values()}) == 1 and len(of_block) == plan.submodel.num_layers

    def _recorded(self, model: CostedModel, payload: Payload, shape: WorkShape) -> Recording:
        return Recording.of(*zip(*self.watched(model, payload, shape), strict=True))

    def watched(self, model: CostedModel, payload: Payload, shape: WorkShape) -> list[tuple[Tracer, list[int]]]:
        """The work at the two points: who watched it, and a step's bytes over the cut each way."""
        with torch.device("meta"):
            worker = _MetaWorker(model, self.lora, self.local, shape)
            method = model.method(self.trained_method)
            costed = model.payload(payload, self.trained_method.submodel(payload).num_layers)
            network = worker.network(method.submodel(costed))  # assembled before anything is watched
        tensors = [*network.model.parameters(), *network.model.buffers()]
        return [record(method, worker, costed, point, tensors) for point in POINTS]


def record(
    method: Method, worker: _MetaWorker, payload: Payload, point: Point, weights: list[torch.Tensor]
) -> tuple[Tracer, list[int]]:
    """Two steps of one client, watched: the second finds the optimizer's state there. Also a step's bytes over the cut."""
    worker.data = _examples(point)
    tracer = Tracer(worker.base.shape.vocab_size)
    tracer.given(weights, WEIGHTS)
    tracer.given([*payload.tensors.values(), *payload.server.values()], PAYLOAD)
    rows = np.tile(np.arange(point.batch_size), (2, 1)).view(_Rows)
    rows.tracer = tracer
    task = ClientTask(0, 1.0, rows, worker.local.learning_rate, (0, 0))
    with tracer.running():
        update = method.local_update(worker, payload, [task])
    cut = [0, 0] if update.cut_bytes is None else [int(n) // 2 for n in update.cut_bytes[:, 0]]
    return tracer, cut


class _Rows(np.ndarray):
    """The examples of each step; asking for a step's tells the tracer that it begins."""

    tracer: Tracer

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            self.tracer.begin_step(key)
        return np.asarray(self)[key]


class _MetaWorker(Worker):
    """A worker of the costed architecture: networks without weights, examples without content."""

    def __init__(self, model: CostedModel, lora: LoRAConfig, local: LocalConfig, shape: WorkShape):
        local = local.model_copy(update={"checkpointing": shape.checkpointing})
        super().__init__(base=model.base, lora=lora, local=local, data=_examples(POINTS[0]))
        self.shape, self.work = model.shape, shape
        self._by_depth: dict[int, Network] = {}

    def network(self, submodel: Submodel) -> Network:
        """A network of as many blocks."""
        depth, work = submodel.num_layers, self.work
        if depth not in self._by_depth:
            self._by_depth[depth] = MetaNetwork(
                self.shape, depth, self.lora, weights=work.weights, precision=work.precision
            )
        return self._by_depth[depth]


def _examples(point: Point) -> TokenizedDataset:
    """B examples of S tokens, of which M are to be learnt (never the first, which nothing predicts)."""
    share, rest = divmod(point.num_logits, point.batch_size)
    learnt = np.full(point.batch_size, share) + (np.arange(point.batch_size) < rest)
    return TokenizedDataset(
        tokens=np.zeros(point.batch_size * point.num_tokens, np.int32),
        offsets=np.arange(point.batch_size + 1) * point.num_tokens,
        prompt_lengths=(point.num_tokens - learnt).astype(np.int32),
        rows=np.arange(point.batch_size),
        overlaps=np.zeros(point.batch_size, np.int32),
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
