"""A worker as a Ray actor, and the values that reach it through the object store.

The base model and the data are put into the object store once and mapped by every worker of a node; a payload is put once per
round. Workers outlive runs: a further run of the same process finds them warm.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import ray

from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.engine.execution.worker_process import WorkerProcess, placed_base
from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.methods.base import GlobalModel, Method, Payload, ServerWork
from fleetune.methods.find import code_of, code_path_elsewhere, find_method, look_in
from fleetune.models.base import BaseModel
from fleetune.models.config import LoRAConfig
from fleetune.models.model import Model
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.problem import Inputs, base_from_arrays, base_to_arrays, context_of, set_threads
from fleetune.spec import RunSpec
from fleetune.tensors import Packed, pack
from fleetune.training.evaluate import EvalSums


@dataclass(frozen=True)
class SharedInputs:
    """Inputs in the object store: the base by itself, so that runs over other data share it."""

    base: Any
    """Reference of the base model's arrays."""
    rest: Any
    """Reference of the inputs without it."""

    @classmethod
    def put(cls, inputs: Inputs, *, base: Any = None) -> SharedInputs:
        """Put inputs into the object store; ``base``: the reference of a base that is there already."""
        rest = replace(inputs, base=None)  # type: ignore[arg-type]
        return cls(base or ray.put(base_to_arrays(inputs.base)), ray.put(rest))

    def get(self) -> Inputs:
        """The inputs; their arrays are views into the object store."""
        return _inputs(ray.get(self.base), ray.get(self.rest))


def _inputs(base: Mapping[str, Any], rest: Inputs) -> Inputs:
    return replace(rest, base=base_from_arrays(base))


@dataclass(frozen=True)
class PackedJob:
    """A job and the class of its method, for another process.

    They are unpacked only when that process knows where the module of a method from outside lies: Ray would unpack the
    arguments of a call before any code of ours runs there.
    """

    name: str
    """The method's name in the job file."""
    folders: tuple[str, ...]
    """Where this process looks for modules; relative ones are meant from the other process's current folder."""
    code: dict[str, str]
    """Digests of the files that the method is written in."""
    data: bytes

    @classmethod
    def of(cls, spec: RunSpec, method: type[Method]) -> PackedJob:
        """Pack a job. A class of a module that no other process can import, as a test's, travels with it."""
        return cls(spec.method.name, code_path_elsewhere(), code_of(method), ray.cloudpickle.dumps((spec, method)))

    def unpack(self) -> tuple[RunSpec, type[Method]]:
        """The job and its method. Raises UserError if this process cannot import the method, or imports other code of it."""
        for folder in reversed(self.folders):
            look_in(folder)
        if self.name not in METHODS:
            found = code_of(find_method(self.name))
            changed = sorted(file for file in {*found, *self.code} if found.get(file) != self.code.get(file))
            if changed:
                raise UserError(
                    f"its {changed[0]} on node {socket.gethostname()} is not the one that the run was started with",
                    field="method.name",
                    value=self.name,
                    hint="install the same version on every node, or send the folder with fleetune submit",
                )
        return pickle.loads(self.data)


@dataclass(frozen=True)
class PackedPayload:
    """A payload for the object store: its tensors as buffers. The provision stays behind: it is charged, not used."""

    tensors: Packed
    server: Packed
    held: Packed
    values: dict[str, Any]

    @classmethod
    def of(cls, payload: Payload) -> PackedPayload:
        """Pack a payload."""
        return cls(pack(payload.tensors), pack(payload.server), pack(payload.held), payload.values)

    def unpack(self) -> Payload:
        """The payload, its tensors views into the mapped buffers."""
        return Payload(self.tensors.unpack(), self.values, self.server.unpack(), self.held.unpack())


@dataclass(frozen=True)
class PackedModel:
    """A model to be evaluated, for the object store."""

    adapter: Packed
    held: Packed
    submodel: list
    quantization: Literal["nf4", "int8"] | None

    @classmethod
    def of(cls, model: GlobalModel) -> PackedModel:
        """Pack a model."""
        held = model.model
        return cls(pack(model.adapter), pack(held.held), held.submodel.to_values(), held.quantization)

    def unpack(self) -> GlobalModel:
        """The model, its tensors views into the mapped buffers."""
        model = Model(Submodel.from_values(self.submodel), self.held.unpack(), self.quantization)
        return GlobalModel(model, self.adapter.unpack())


@ray.remote(num_cpus=1, max_restarts=0)
class RayWorker:
    """A worker process that becomes one cohort of clients after the other.

    Ray does not restart it (``max_restarts=0``): a restarted actor would begin without the run, so the pool makes a fresh one and
    prepares it.
    """

    def __init__(self, threads: int):
        set_threads(threads)
        self.process: WorkerProcess | None = None
        self.run_number = 0
        self._payloads: dict[Any, Payload] = {}  # reference -> payload, of the round below
        self._round_idx = -1
        self._base: tuple[Any, BaseModel] | None = None  # its key, and the base model as it was placed last
        self._networks: dict[LoRAConfig, dict[Hashable, Network]] = {}  # over that base model

    def prepare(
        self,
        run_number: int,
        base_key: str,
        job: PackedJob,
        base: Mapping[str, Any],
        rest: Inputs,
    ) -> None:
        """Take up a run. The placed base model and the networks over it stay for the next run.

        ``base`` and ``rest`` were passed as references, which Ray has fetched: their arrays are views into the object store.
        """
        spec, method = job.unpack()
        inputs = _inputs(base, rest)
        key = (base_key, spec.execution.device, spec.execution.precision)
        if self._base is None or self._base[0] != key:
            self._base, self._networks = (key, placed_base(spec, inputs.base)), {}
        context = context_of(spec, inputs)
        self.process = WorkerProcess(spec, inputs, method(spec.method, context), base=self._base[1])
        self.process.worker.adopt(self._networks.setdefault(spec.model.lora, {}))
        self._payloads = {}
        self.process.worker.network(context.whole_model)  # built now, while the coordinator prepares a round
        # Last: if anything above failed, `_process` refuses the run's calls instead of doing them with half of it.
        self.run_number = run_number

    def run(self, run_number: int, unit: WorkUnit, payload_refs: dict[int, Any], locate: bool) -> WorkUnitReply:
        """Carry out a unit; payloads are fetched once per round."""
        if unit.round_idx != self._round_idx:
            # Payloads are views into the object store, which can free an earlier round's memory only when nobody has any.
            self._round_idx = unit.round_idx
            self._payloads = {}
        payloads = {key: self._payload(ref) for key, ref in payload_refs.items()}
        return self._process(run_number).run(unit, payloads, locate=locate)

    def serve(self, run_number: int, payload: PackedPayload, rows: np.ndarray) -> Packed:
        """Carry out a piece of the server's own work. ``rows``: as `ServerWork.rows`."""
        return pack(self._process(run_number).serve(ServerWork(payload.unpack(), rows)))

    def evaluate(self, run_number: int, model: PackedModel, rows: np.ndarray) -> EvalSums:
        """Evaluate on held-out examples. ``rows``: their numbers, (n,) int."""
        return self._process(run_number).evaluate(model.unpack(), rows)

    def evaluate_clients(self, run_number: int, rows: np.ndarray, *models: PackedModel) -> list[EvalSums]:
        """Evaluate K clients on training examples that they hold out, ``rows`` (K, b); fields as of `OwnChunk`."""
        return self._process(run_number).evaluate_clients([model.unpack() for model in models], rows)

    def _process(self, run_number: int) -> WorkerProcess:
        """The worker process of a run. If the run could not be taken up, the former run's must not do its work."""
        if self.process is None or self.run_number != run_number:
            raise RuntimeError(f"this worker has not taken up run {run_number}")
        return self.process

    def _payload(self, ref: Any) -> Payload:
        if ref not in self._payloads:
            self._payloads[ref] = ray.get(ref).unpack()
        return self._payloads[ref]
