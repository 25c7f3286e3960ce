"""Work units and cohorts: what travels and trains together follows from the spec and the round, and sums do not depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fleetune.engine.checkpoint.client_store import MAX_UNITS, ClientStore
from fleetune.engine.execution.work_units import WorkUnit, make_work_units
from fleetune.engine.execution.worker_process import run_work_unit
from fleetune.errors import RunFailed
from fleetune.methods.traits import Traits
from fleetune.problem import Problem
from fleetune.seeds import seed_of
from fleetune.tensors import Packed, pack
from support import runs, tiny


def units_of(steps: Sequence[int], *, cohort_size: int, coupled: bool = False, **more: Any) -> list[WorkUnit]:
    """Clients 10, 11, … with so many steps each; example numbers are 100 k + step."""
    n = len(steps)
    columns: dict[str, Any] = {
        "weights": np.full(n, 1 / max(1, n)),
        "payloads": np.zeros(n, np.int64),
        "learning_rate": 0.1,
        "ranks": np.full(n, 2),
        "full_ranks": np.full(n, 2),
        "store": ClientStore("nowhere", ""),
        "slots": {},
        **more,
    }
    return make_work_units(
        round_idx=2,
        stage=0,
        run_seed=7,
        client_ids=np.arange(10, 10 + n),
        rows=[np.arange(s)[:, None] + 100 * k for k, s in enumerate(steps)],
        cohort_size=cohort_size,
        coupled=coupled,
        **columns,
    )


def cohorts_of(units: list[WorkUnit]) -> list[list[int]]:
    return [unit.client_ids[c.start : c.stop].tolist() for unit in units for c in unit.cohorts]


def test_clients_with_equally_many_steps_stand_together_longest_first():
    """Steps 1, 3, 2, 3, 1 in cohorts of two: {11, 13}, {12, 10}, {14}."""
    units = units_of([1, 3, 2, 3, 1], cohort_size=2)
    assert cohorts_of(units) == [[11, 13], [12, 10], [14]]
    assert [unit.index for unit in units] == [0, 1, 2]


def test_cohorts_are_of_nearly_equal_size():
    """Nine clients in cohorts of at most four: three threes, not 4 + 4 + 1."""
    assert [len(c) for c in cohorts_of(units_of([2] * 9, cohort_size=4))] == [3, 3, 3]


def test_clients_of_another_payload_are_another_cohort():
    units = units_of([2] * 4, cohort_size=4, payloads=np.array([0, 1, 0, 1]))
    assert cohorts_of(units) == [[10, 12], [11, 13]]
    assert [unit.cohorts[0].payload for unit in units] == [0, 1]


def test_a_shared_server_half_couples_the_whole_round():
    assert cohorts_of(units_of([2] * 9, cohort_size=2, coupled=True)) == [list(range(10, 19))]


@pytest.mark.parametrize(("num_clients", "cohort_size"), [(1, 1), (31, 1), (200, 3), (1000, 16)])
def test_every_client_is_in_one_unit_with_its_own_rows(num_clients: int, cohort_size: int):
    steps = np.random.default_rng(0).integers(1, 4, size=num_clients).tolist()
    units = units_of(steps, cohort_size=cohort_size)
    assert len(units) <= MAX_UNITS
    seen = []
    for unit in units:
        assert [(c.start, c.stop) for c in unit.cohorts] == sorted((c.start, c.stop) for c in unit.cohorts)
        assert unit.cohorts[-1].stop == len(unit.client_ids)
        for cohort in unit.cohorts:
            assert 1 <= cohort.stop - cohort.start <= cohort_size
            for task in unit.tasks(cohort):
                k = task.client_id - 10
                assert task.rows[:, 0].tolist() == [100 * k + s for s in range(steps[k])]
                assert task.seed == seed_of(7, "client", 2, task.client_id)
                assert task.weight == pytest.approx(1 / num_clients)
                seen.append(task.client_id)
    assert sorted(seen) == list(range(10, 10 + num_clients))


@pytest.mark.parametrize(("num_clients", "num_units"), [(1, 1), (2, 2), (100, 2), (1000, 4), (10_000, 8)])
def test_clients_that_do_not_train_travel_in_few_units(num_clients: int, num_units: int):
    """A call costs as much as many of them; two workers at least have something to do."""
    units = units_of([0] * num_clients, cohort_size=1)
    assert len(units) == num_units
    assert sorted(c for unit in units for c in unit.client_ids.tolist()) == list(range(10, 10 + num_clients))


@pytest.mark.parametrize("travels", [False, True])
def test_private_tensors_come_to_their_client(tmp_path: Path, travels: bool):
    """Client 11 kept two ones, of which it trains the first rank; they are read where the unit is, or come along."""
    store = ClientStore.open(tmp_path)
    store.write(3, {11: pack({"x.lora_B": torch.ones(4, 2)}), 99: pack({"x.lora_B": torch.zeros(4, 2)})})
    units = units_of([1, 1, 1], cohort_size=1, store=store, slots={11: 3, 99: 3}, ranks=np.ones(3, int))
    if travels:
        units = [unit.with_private() for unit in units]
        assert sum(len(unit.private) for unit in units) == 1
        (tmp_path / "round_000000_unit_03.safetensors").unlink()
    given = {
        t.client_id: t.private for unit in units for c in unit.cohorts for t in unit.tasks(c, unit.read_private(c))
    }
    assert given[10] is None
    assert given[12] is None
    assert given[11] is not None
    assert given[11]["x.lora_B"].tolist() == 4 * [[1.0]]


def test_no_clients_no_units():
    assert units_of([], cohort_size=2) == []


# -- carrying a unit out ---------------------------------------------------------------------------------------------------
def world(**overrides: Any) -> tuple[Problem, list[WorkUnit]]:
    """Six clients of the tiny world in two units of one cohort of three, two steps each."""
    problem = runs.problem(tiny.spec(overrides))
    units = make_work_units(
        round_idx=0,
        stage=0,
        run_seed=0,
        client_ids=np.arange(6),
        weights=np.array([0.1, 0.2, 0.3, 0.4, 0.0, 0.0]),
        payloads=np.zeros(6, np.int64),
        rows=list(np.arange(24).reshape(6, 2, 2)),
        learning_rate=0.01,
        cohort_size=3,
        coupled=False,
        ranks=np.full(6, problem.spec.model.lora.rank),
        full_ranks=np.full(6, problem.spec.model.lora.rank),
        store=ClientStore("nowhere", ""),
        slots={},
    )
    return problem, units


def sums_of(problem: Problem, units: list[WorkUnit]) -> list[dict[str, torch.Tensor]]:
    payload = problem.method.broadcast(problem.method.start(), 0, None)
    replies = [run_work_unit(runs.worker(problem), problem.method, {0: payload}, unit) for unit in units]
    parts: list[Packed | None] = [reply.partial_sums.get(0) for reply in replies]
    return [part.unpack() for part in parts if part is not None]


def test_a_units_sum_is_of_its_clients_that_count():
    """Clients 4 and 5 are late (weight 0): the second unit's sum is 0.4 times client 3's upload."""
    problem, units = world()
    method, payload = problem.method, problem.method.broadcast(problem.method.start(), 0, None)
    first, second = sums_of(problem, units)
    alone = method.local_update(runs.worker(problem), payload, units[1].tasks(units[1].cohorts[0])[:1]).upload
    assert alone is not None
    runs.close_tensors(second, {name: 0.4 * t for name, t in alone.client(0).items()}, rtol=1e-4, atol=1e-5)
    assert first.keys() == second.keys()


def test_late_clients_are_left_out_where_each_update_is_wanted():
    """Of the second unit's clients 3, 4 and 5 only 3 has a weight, so only its upload comes back."""
    problem, units = world()
    problem.method.traits = Traits(partial_sums=False)
    payload = problem.method.broadcast(problem.method.start(), 0, None)
    reply = run_work_unit(runs.worker(problem), problem.method, {0: payload}, units[1])
    assert sorted(reply.each) == [3]
    assert not reply.partial_sums
    assert reply.losses.all()


def test_a_unit_is_the_same_bits_on_any_worker_after_any_other():
    """A worker that has carried out another unit before gives what a fresh one gives."""
    problem, units = world()
    payload = {0: problem.method.broadcast(problem.method.start(), 0, None)}
    used = runs.worker(problem)
    run_work_unit(used, problem.method, payload, units[0])
    after, fresh = (run_work_unit(w, problem.method, payload, units[1]) for w in (used, runs.worker(problem)))
    assert after.partial_sums
    assert fresh.partial_sums
    runs.same_tensors(after.partial_sums[0].unpack(), fresh.partial_sums[0].unpack())
    assert after.losses.tolist() == fresh.losses.tolist()


def test_with_dropout_cohorts_work_one_by_one():
    """Each client draws at its own address, so its loss does not depend on who is in its cohort."""
    problem, units = world(**{"model.lora.dropout": 0.3})
    start = problem.method.start().tensors
    payload = {0: problem.method.broadcast(problem.method.start(), 0, None)}
    payload[0].tensors.update({n: t + 0.1 for n, t in start.items()})
    together = run_work_unit(runs.worker(problem), problem.method, payload, units[0])
    tasks = units[0].tasks(units[0].cohorts[0])
    alone = [problem.method.local_update(runs.worker(problem), payload[0], [t]).losses[0] for t in tasks]
    assert together.losses.tolist() == alone


def test_an_error_is_traced_to_its_client():
    """Client 1's examples lie outside of the dataset: the error names it, the round and the stage, and nobody else."""
    problem, units = world()
    units[0].rows[2:4] = 10**6
    payload = {0: problem.method.broadcast(problem.method.start(), 0, None)}
    with pytest.raises(IndexError):
        run_work_unit(runs.worker(problem), problem.method, payload, units[0])
    with pytest.raises(RunFailed, match="client 1, round 1, stage 0: IndexError") as raised:
        run_work_unit(runs.worker(problem), problem.method, payload, units[0], locate=True)
    assert raised.value.client_ids == (1,)
