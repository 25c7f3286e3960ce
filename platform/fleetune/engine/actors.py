"""Ray: host actors through which clients pass, the executor over them, and the coordinator as an actor.

The base model and the data are put into the object store once and mapped by every host of a node; a payload is put once per
round. Hosts outlive runs: a further run of the same process finds them warm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fleetune.engine.coordinator import Baselines, Coordinator, Event
from fleetune.engine.executor import WorkerSide
from fleetune.engine.lots import Lot, LotReply
from fleetune.engine.problem import (
    Inputs,
    base_from_arrays,
    base_to_arrays,
    build_problem,
    set_threads,
)
from fleetune.errors import RunFailed
from fleetune.methods.base import Context, GlobalModel, Method, Payload, Provision
from fleetune.models.submodel import Submodel
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec
from fleetune.tensors import Packed, pack
from fleetune.training.evaluate import EvalSums


@dataclass(frozen=True)
class SharedInputs:
    """Inputs in the object store: the base by itself, so that runs over other data share it."""

    base: Any
    rest: Any

    @classmethod
    def put(cls, inputs: Inputs, *, base: Any = None) -> SharedInputs:
        """Put inputs into the object store; ``base``: the reference of a base that is there already."""
        rest = replace(inputs, base=None)  # type: ignore[arg-type]
        return cls(base or ray.put(base_to_arrays(inputs.base)), ray.put(rest))


def _inputs(base: Mapping[str, Any], rest: Inputs) -> Inputs:
    return replace(rest, base=base_from_arrays(base))


@dataclass(frozen=True)
class PackedPayload:
    """A payload for the object store: its tensors as two buffers."""

    tensors: Packed
    server: Packed
    values: dict[str, Any]
    provision: Provision | None

    @classmethod
    def of(cls, payload: Payload) -> PackedPayload:
        """Pack a payload."""
        return cls(pack(payload.tensors), pack(payload.server), payload.values, payload.provision)

    def unpack(self) -> Payload:
        """The payload, its tensors views into the mapped buffers."""
        return Payload(self.tensors.unpack(), self.values, self.server.unpack(), self.provision)


@ray.remote(num_cpus=1, max_restarts=0)
class HostActor:
    """A worker process that becomes one cohort of clients after the other."""

    def __init__(self, threads: int):
        set_threads(threads)
        self.side: WorkerSide | None = None
        self.run_number = 0
        self._payloads: dict[Any, Payload] = {}
        self._round_idx = -1
        self._networks: dict[Any, Any] = {}

    def prepare(
        self,
        run_number: int,
        base_key: str,
        spec: RunSpec,
        method: type[Method],
        base: Mapping[str, Any],
        rest: Inputs,
    ) -> None:
        """Take up a run. Networks of a base model and adapter form that were assembled before are kept."""
        inputs = _inputs(base, rest)
        context = Context(inputs.base, spec.model.lora, inputs.sites, spec.rounds.num_rounds, spec.seed)
        self.side = WorkerSide(spec, inputs, method(spec.method, context))
        self.side.worker.adopt(self._networks.setdefault((base_key, spec.model.lora), {}))
        self._payloads = {}
        self.side.worker.network(Submodel.prefix(inputs.base.num_layers))
        self.run_number = run_number

    def run(self, run_number: int, lot: Lot, payload_refs: dict[int, Any], locate: bool) -> LotReply:
        """Carry out a lot; payloads are fetched once per round."""
        if (
            lot.round_idx != self._round_idx
        ):  # the payloads of rounds gone by would keep their place in the object store
            self._round_idx = lot.round_idx
            self._payloads = {}
        return self._side(run_number).run(
            lot, {key: self._payload(ref) for key, ref in payload_refs.items()}, locate=locate
        )

    def evaluate(self, run_number: int, model: dict[str, Any], rows: np.ndarray) -> EvalSums:
        """Evaluate on some held-out examples."""
        adapter = model["adapter"].unpack()
        return self._side(run_number).evaluate(GlobalModel(Submodel.from_values(model["submodel"]), adapter), rows)

    def _side(self, run_number: int) -> WorkerSide:
        """What the run works with; where it could not be taken up, the former run's must not do its work."""
        if self.side is None or self.run_number != run_number:
            raise RuntimeError(f"this host has not taken up run {run_number}")
        return self.side

    def _payload(self, ref: Any) -> Payload:
        if ref not in self._payloads:
            self._payloads[ref] = ray.get(ref).unpack()
        return self._payloads[ref]


class RayExecutor:
    """A pool of hosts. Lots are dealt longest first to whoever is free; replies are used in the order of the lots."""

    queued_per_host = 2  # one running, one waiting, so that a host never idles between lots
    max_deaths = 3  # assumed: a call whose host dies so often is to blame itself (memory, a crash in native code)

    def __init__(self, num_hosts: int, threads: int):
        self.num_hosts, self.threads = num_hosts, threads
        self.hosts = [self._new_host() for _ in range(num_hosts)]
        self._setup: tuple[Any, ...] | None = None
        self._prepared: list[Any] = []
        self._run_number = 0

    def _new_host(self) -> Any:
        return HostActor.options(num_cpus=self.threads).remote(self.threads)  # type: ignore[attr-defined]

    def prepare(self, base_key: str, spec: RunSpec, method: type[Method], shared: SharedInputs) -> None:
        """Hand a run to all hosts, without waiting for them."""
        self._run_number += 1
        self._setup = (self._run_number, base_key, spec, method, shared.base, shared.rest)
        self._prepared = [host.prepare.remote(*self._setup) for host in self.hosts]

    def run(self, lots: Sequence[Lot], payloads: Mapping[int, Payload]) -> Iterator[LotReply]:
        """Carry out the lots. A host that dies is replaced and its lots run again; an error is tried once more."""
        refs = {key: ray.put(PackedPayload.of(payload)) for key, payload in payloads.items()}

        def submit(host: Any, index: int, attempt: int) -> Any:
            needed = {cohort.payload: refs[cohort.payload] for cohort in lots[index].cohorts}
            return host.run.remote(self._run_number, lots[index], needed, attempt > 0)

        def failed(index: int, error: Exception) -> RunFailed:
            lot = lots[index]
            who = lot.client_ids.tolist()
            return RunFailed(_told(error), round_idx=lot.round_idx, stage=lot.stage, client_ids=who)

        yield from self._dispatch(len(lots), submit, failed)

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> list[EvalSums]:
        """Evaluate the chunks on all hosts."""
        ref = ray.put({"adapter": pack(model.adapter), "submodel": model.submodel.to_values()})

        def submit(host: Any, index: int, attempt: int) -> Any:
            return host.evaluate.remote(self._run_number, ref, chunks[index])

        def failed(index: int, error: Exception) -> RunFailed:
            return RunFailed(f"evaluation: {_told(error)}")

        return list(self._dispatch(len(chunks), submit, failed))

    def _dispatch(self, num_jobs: int, submit: Any, failed: Any) -> Iterator[Any]:
        """Results of jobs 0 … n-1 in order, at most a few of them in the object store at a time."""
        running: dict[Any, tuple[int, int, int]] = {}  # reference -> (job, host, attempt)
        done: dict[int, Any] = {}
        waiting = list(range(num_jobs))[::-1]
        load = [0] * self.num_hosts
        deaths = [0] * num_jobs
        for wanted in range(num_jobs):
            while wanted not in done:
                while waiting and min(load) < self.queued_per_host and len(done) < 2 * self.num_hosts:
                    self._start(waiting.pop(), 0, submit, running, load)
                (ref,), _ = ray.wait(list(running), num_returns=1, fetch_local=True)
                index, host, attempt = running.pop(ref)
                load[host] -= 1
                try:
                    done[index] = ray.get(ref)
                except RayActorError as error:
                    first = self._replace(host, running, load, submit, index)
                    deaths[first] += 1
                    if deaths[first] >= self.max_deaths:
                        raise failed(first, error) from error
                except RayTaskError as error:
                    if attempt > 0:
                        cause = self._cause(error, host)
                        raise cause if isinstance(cause, RunFailed) else failed(index, cause) from error
                    self._start(index, attempt + 1, submit, running, load)
                except RayError as error:
                    raise failed(index, error) from error
            yield done.pop(wanted)

    def _start(self, index: int, attempt: int, submit: Any, running: dict, load: list[int]) -> None:
        host = load.index(min(load))
        running[submit(self.hosts[host], index, attempt)] = (index, host, attempt)
        load[host] += 1

    def _cause(self, error: RayTaskError, host: int) -> Exception:
        """What was raised on the host. One that could not take up the run fails in every call for that reason."""
        try:
            ray.get(self._prepared[host])
        except RayTaskError as earlier:
            error = earlier
        except RayActorError:  # it has died meanwhile
            pass
        return error.cause if isinstance(error.cause, Exception) else error

    def _replace(self, host: int, running: dict, load: list[int], submit: Any, index: int) -> int:
        """A fresh host takes the dead one's place and its lots: calls are stateless, so the result is the same.

        Returns the lot that the host was at when it died: it works in their order.
        """
        lost = sorted([index, *(job for job, where, _ in running.values() if where == host)])
        for ref in [ref for ref, (_, where, _) in running.items() if where == host]:
            del running[ref]
        self.hosts[host] = self._new_host()
        load[host] = 0
        if self._setup is not None:
            self._prepared[host] = self.hosts[host].prepare.remote(*self._setup)
        for job in lost:
            running[submit(self.hosts[host], job, 0)] = (job, host, 0)
            load[host] += 1
        return lost[0]


def _told(error: Exception) -> str:
    """An error in one line: its kind and what it says."""
    name = "the host process died" if isinstance(error, RayActorError) else type(error).__name__
    return f"{name}: {' '.join(str(error).split())}"


@ray.remote(num_cpus=0, max_restarts=0)
class CoordinatorActor:
    """The coordinator of runs on this cluster, with its hosts; it stays for further runs."""

    def __init__(self, num_hosts: int, threads: int):
        set_threads(threads)
        self.executor = RayExecutor(num_hosts, threads)
        self.baselines: Baselines = {}

    def hosts(self) -> list[Any]:
        """Handles of the host actors."""
        return self.executor.hosts

    def run(self, base_key: str, spec: RunSpec, shared: SharedInputs, run_path: str) -> Iterator[Event]:
        """Run (or go on with) a run directory; yields the coordinator's events."""
        problem = build_problem(spec, _inputs(ray.get(shared.base), ray.get(shared.rest)))
        self.executor.prepare(base_key, spec, type(problem.method), shared)
        run_dir = RunDirectory.open(run_path)
        yield from Coordinator(problem, self.executor, run_dir, baselines=self.baselines).run()
