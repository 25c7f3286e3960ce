"""The pool of workers on Ray: an executor that deals out calls, tries failed ones again, and replaces workers that die."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import numpy as np
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from fleetune.engine.execution.calls import Call, one_line
from fleetune.engine.execution.executor import OwnChunk, Sums
from fleetune.engine.execution.ray_worker import PackedJob, PackedModel, PackedPayload, RayWorker, SharedInputs
from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.errors import RunFailed
from fleetune.files import WriteFailed
from fleetune.methods.base import GlobalModel, Method, Payload, ServerWork
from fleetune.spec import RunSpec
from fleetune.tensors import Tensors
from fleetune.training.evaluate import EvalSums


class RayExecutor:
    """A pool of workers. Work units are dealt longest first to whoever is free; replies are used in the order of the units.

    What can go wrong: a worker dies with calls under way (`_replace`), a call fails (`_settle`), replies pile up (`_fill`). All
    three are met inside `step`, in the coordinator's own thread, so nothing changes behind anybody's back.
    Evaluations go to workers that units leave idle: at the end of a round, and while the coordinator prepares the next one.
    """

    queued_per_worker = 2  # one running, one waiting, so that a worker never idles between units
    max_deaths = 3  # assumed: a call whose worker dies so often is to blame itself (memory, a crash in native code)

    def __init__(self, num_workers: int, threads: int, gpus_per_worker: float = 0.0):
        self.num_workers, self.threads, self.gpus_per_worker = num_workers, threads, gpus_per_worker
        self.workers = [self._new_worker() for _ in range(num_workers)]
        # What `RayWorker.prepare` was called with, for the successors of workers that die.
        self._setup: tuple[Any, ...] | None = None
        # Reference of each worker's `prepare`: its error explains those of the worker's later calls.
        self._prepared: list[Any] = []
        self._run_number = 0
        self._forget()

    def _new_worker(self) -> Any:
        # Ray starts it on a node on which so much is free; until there is one, its calls wait. `resolve_execution` has counted
        # node by node that all workers fit: two nodes with one free core each have no room for a worker of two threads.
        needs = {"num_cpus": self.threads, "num_gpus": self.gpus_per_worker}
        return RayWorker.options(**needs).remote(self.threads)  # type: ignore[attr-defined]

    def _forget(self) -> None:
        """Begin with no calls. Those of a run that was broken off may still end on the workers, but nobody looks at them."""
        self._units: deque[Call] = deque()  # not dealt out yet
        self._evaluations: deque[Call] = deque()  # likewise
        self._running: dict[Any, tuple[Call, int]] = {}  # reference -> its call and worker, in the order of submission
        self._load = [0] * self.num_workers  # calls that each worker has, running or waiting on it
        # Workers whose last reply said that they reach the run's private store; private tensors are not sent to them.
        self._has_store = [False] * self.num_workers
        self._num_unread = 0  # replies of units that lie in memory until the coordinator takes them

    def prepare(self, base_key: str, spec: RunSpec, method: type[Method], shared: SharedInputs) -> None:
        """Hand a run to all workers, without waiting for them: an actor carries out its calls in the order in which they came."""
        # Calls of a run that was broken off may still stand before this one. The number keeps the runs apart on the worker.
        self._run_number += 1
        self._forget()
        self._setup = (self._run_number, base_key, PackedJob.of(spec, method), shared.base, shared.rest)
        self._prepared = [worker.prepare.remote(*self._setup) for worker in self.workers]

    def run(self, units: Sequence[WorkUnit], payloads: Mapping[int, Payload]) -> Iterator[WorkUnitReply]:
        """Begin the units. A worker that dies is replaced and its units run again; an error is tried once more."""
        # Put once per round, not sent with each call: all workers of a node map the same copy, whatever the number of units.
        refs = {key: ray.put(PackedPayload.of(payload)) for key, payload in payloads.items()}

        def call(unit: WorkUnit) -> Call:
            # Ray would fetch an argument that is a reference before every call. Inside a dict it stays a reference, so that
            # the worker fetches and unpacks a payload for its first unit and has it for the others of the round.
            needed = {cohort.payload: refs[cohort.payload] for cohort in unit.cohorts}

            def submit(worker: int, is_retry: bool) -> Any:
                # Decided for every attempt: after a death, the unit may go to another machine than before.
                sent = unit if self._has_store[worker] else unit.with_private()
                return self.workers[worker].run.remote(self._run_number, sent, needed, is_retry)

            def failed(error: Exception) -> RunFailed:
                who = unit.client_ids.tolist()
                return RunFailed(one_line(error), round_idx=unit.round_idx, stage=unit.stage, client_ids=who)

            return Call(submit, failed, is_work_unit=True)

        calls = [call(unit) for unit in units]
        self._units.extend(calls)
        self._fill()
        return self._replies(calls)  # a generator of its own, so that the units begin now and not with the first `next`

    def serve(self, work: ServerWork) -> Tensors:
        """Carry out a piece of the server's own work on a worker, before evaluations that wait for one."""
        packed = PackedPayload.of(work.payload)

        def submit(worker: int, is_retry: bool) -> Any:
            return self.workers[worker].serve.remote(self._run_number, packed, work.rows)

        call = Call(submit, lambda error: RunFailed(f"the server's own work: {one_line(error)}"), is_work_unit=False)
        self._evaluations.appendleft(call)
        while not call.is_done:
            self.step(evaluations_first=True)
        return call.take().unpack()

    def evaluate(self, model: GlobalModel, chunks: Sequence[np.ndarray]) -> RayEvaluation[EvalSums]:
        """Begin an evaluation on the workers that are idle."""
        ref = ray.put(PackedModel.of(model))

        def submit(rows: np.ndarray, worker: int) -> Any:
            return self.workers[worker].evaluate.remote(self._run_number, ref, rows)

        return self._begin_evaluation([partial(submit, rows) for rows in chunks])

    def evaluate_clients(self, chunks: Sequence[OwnChunk]) -> RayEvaluation[list[EvalSums]]:
        """Begin an evaluation of clients' own models on the workers that are idle."""
        # By adapter: a model that clients share is put once, however many chunks it stands in.
        distinct = {id(model.adapter): model for chunk in chunks for model in chunk.models}
        refs = {key: ray.put(PackedModel.of(model)) for key, model in distinct.items()}

        def submit(chunk: OwnChunk, worker: int) -> Any:
            models = [refs[id(model.adapter)] for model in chunk.models]
            return self.workers[worker].evaluate_clients.remote(self._run_number, chunk.rows, *models)

        return self._begin_evaluation([partial(submit, chunk) for chunk in chunks])

    def _begin_evaluation(self, submits: Sequence[Callable[[int], Any]]) -> RayEvaluation[Any]:
        """Queue one call for each of ``submits``: index of a worker -> reference of the result."""

        def failed(error: Exception) -> RunFailed:
            return RunFailed(f"evaluation: {one_line(error)}")

        def call(submit: Callable[[int], Any]) -> Call:
            return Call(lambda worker, is_retry: submit(worker), failed, is_work_unit=False)

        calls = [call(submit) for submit in submits]
        self._evaluations.extend(calls)
        self._fill()
        return RayEvaluation(self, calls)

    def step(self, *, timeout_seconds: float | None = None, evaluations_first: bool = False) -> bool:
        """Wait for one call to end and deal out what waits; False if none ended in time, or none is under way."""
        self._fill(evaluations_first)
        # One at a time: settling a call whose worker died takes all other calls of that worker out of those that run.
        ended, _ = ray.wait(list(self._running), num_returns=1, timeout=timeout_seconds) if self._running else ([], [])
        for ref in ended:
            self._settle(ref)
        self._fill(evaluations_first)
        return bool(ended)

    def _replies(self, calls: Sequence[Call]) -> Iterator[WorkUnitReply]:
        # Sums of floats depend on their order. Replies come back in any order; used in that of the units, they give the same
        # bits on any number of workers, however fast each is.
        for call in calls:
            # This ends: every call before the first that fails has begun, and what has begun is done or fails. At the one that
            # fails, `take` raises, and nobody waits for those behind it, which `_fail` has dropped.
            while not call.is_done:
                self.step()
            self._num_unread -= 1
            yield call.take()

    def _fill(self, evaluations_first: bool = False) -> None:
        """Deal out calls. An evaluation takes an idle worker, or any worker if somebody waits for it (``evaluations_first``)."""
        if evaluations_first:
            self._begin_evaluations(self.queued_per_worker)
        # Replies hold tensors. Behind a slow unit, those of a full round would pile up in memory, so only few may wait. The bound
        # stops nothing for good: units begin in their order, so if the one whose reply is used next had not begun, neither had
        # any after it, and no reply would be unread.
        while self._units and self._num_unread < 2 * self.num_workers and self._has_room(self.queued_per_worker):
            self._start(self._units.popleft())
        self._begin_evaluations(queued_per_worker=1)

    def _begin_evaluations(self, queued_per_worker: int) -> None:
        while self._evaluations and self._has_room(queued_per_worker):
            self._start(self._evaluations.popleft())

    def _has_room(self, queued_per_worker: int) -> bool:
        return min(self._load) < queued_per_worker

    def _start(self, call: Call, worker: int | None = None) -> None:
        """Submit a call to a worker (None: the one with the fewest). If it has just died, the call ends as those under way do."""
        if worker is None:
            worker = self._load.index(min(self._load))
        self._running[call.submit(worker, call.is_retry)] = (call, worker)
        self._load[worker] += 1

    def _settle(self, ref: Any) -> None:
        """A call has ended: take its result, try it once more, or note why it failed."""
        call, worker = self._running[ref]
        try:
            result = ray.get(ref)
        except RayActorError as error:
            self._replace(worker, error)
            return
        except RayTaskError as error:
            self._end(ref)
            if not call.is_retry:
                call.is_retry = True  # for a unit also: find out whose work fails, so that the error names the clients
                self._start(call)
                return
            cause = self._cause(error, worker)
            self._fail(call, cause if isinstance(cause, RunFailed | WriteFailed) else call.failed(cause))
            return
        except (
            RayError
        ) as error:  # not the call's own error, nor a death: a reply that was lost from the object store, say
            self._end(ref)
            self._fail(call, call.failed(error))
            return
        self._end(ref)
        if call.is_work_unit:
            self._has_store[worker] = result.has_store
        call.result, call.is_done = result, True
        self._num_unread += call.is_work_unit

    def _end(self, ref: Any) -> None:
        _, worker = self._running.pop(ref)
        self._load[worker] -= 1

    def _fail(self, call: Call, error: RunFailed | WriteFailed) -> None:
        """Note the error for whoever takes the call's result. Units that are not begun yet are dropped: the run is over."""
        call.error, call.is_done = error, True
        if call.is_work_unit:
            self._num_unread += 1
            self._units.clear()

    def _cause(self, error: RayTaskError, worker: int) -> Exception:
        """The exception raised on the worker, or the one that kept it from taking up the run: then every call fails."""
        try:
            ray.get(self._prepared[worker])
        except RayTaskError as earlier:
            error = earlier
        except RayActorError:  # it has died meanwhile, and `prepare` is not what failed first
            pass
        return error.cause if isinstance(error.cause, Exception) else error

    def _replace(self, worker: int, error: RayActorError) -> None:
        """A fresh worker takes the dead one's index and all its calls.

        A call's result does not depend on what its worker did before, so it is the same when the call is made again. A worker
        runs its calls one after the other: the first of them is the one it was at when it died, and may be what killed it.
        """
        # All its calls are taken out at once. Else each would end with the same error, and the fresh worker be replaced as well.
        refs = [ref for ref, (_, index) in self._running.items() if index == worker]
        lost = [self._running.pop(ref)[0] for ref in refs]
        # Should the fresh worker die between here and its first call, that call ends like this one, and we are here again: each
        # death counts against the first call, so it cannot go on for ever.
        self.workers[worker] = self._new_worker()
        self._load[worker], self._has_store[worker] = 0, False
        if self._setup is not None:
            self._prepared[worker] = self.workers[worker].prepare.remote(*self._setup)
        lost[0].num_deaths += 1
        if lost[0].num_deaths >= self.max_deaths:
            self._fail(lost[0], lost[0].failed(error))
            del lost[0]
        for call in lost:
            call.is_retry = False  # the death was the worker's: an error of the call itself is still tried once more
            self._start(call, worker)


@dataclass(frozen=True)
class RayEvaluation(Generic[Sums]):
    """An evaluation on workers."""

    executor: RayExecutor
    calls: list[Call]
    """One per chunk, in order."""

    def is_done(self) -> bool:
        """True if all chunks have come back."""
        # Calls that have ended are settled here, as nobody else may be waiting for the workers. `step` is False when none has.
        while not all(call.is_done for call in self.calls) and self.executor.step(timeout_seconds=0):
            pass
        return all(call.is_done for call in self.calls)

    def sums(self) -> list[Sums]:
        """The sums over each chunk, in order; waits for them."""
        while not all(call.is_done for call in self.calls):
            self.executor.step(evaluations_first=True)
        return [call.take() for call in self.calls]
