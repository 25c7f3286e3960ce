"""Runs on a real Ray cluster of this machine: the same bits as serially, on any number of workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from fleetune.engine.execution.work_units import WorkUnit, WorkUnitReply
from fleetune.engine.launch import backends
from fleetune.engine.launch.cluster import Cluster
from fleetune.errors import UserError
from fleetune.methods import find
from fleetune.methods.base import Payload
from support import REPOSITORY, ray_runs, runs, tiny
from support.ray_runs import (
    CASES,
    GPU_FRACTION,
    NUM_WORKERS,
    Borrowed,
    on,
    same_adapters,
    serially,
    spec_of,
    started_workers,
)

pytestmark = ray_runs.MARKS

NUM_CORES = NUM_WORKERS + 2


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_runs.cluster(__name__, num_cores=NUM_CORES):
        yield


@pytest.fixture(scope="module")
def workers() -> Iterator[list[Any]]:
    with started_workers() as handles:
        yield handles


# Methods differ in what they send, not in how it is dealt out: a few show that the number of workers changes nothing.
WITH_ANY_NUMBER = ("fedit", "devft+fedsa-lora", "split-lora per_client", "ranks adapt, clients come and go")
PAIRS = [(case, n) for case in CASES for n in ((1, 2, 3) if case in WITH_ANY_NUMBER else (2,))]


@pytest.mark.parametrize(("case", "num_workers"), PAIRS)
def test_any_number_of_workers_gives_the_bits_of_a_serial_run(workers: list[Any], case: str, num_workers: int):
    run = runs.run(spec_of(case), on(Borrowed(workers, num_workers)))
    runs.same_runs(run, serially(case))
    same_adapters(run, serially(case))


def test_a_method_from_outside_is_found_by_workers_in_the_folder_of_its_job(
    workers: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The workers were started before anybody knew of the folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(find, "_folders", [])
    (tmp_path / "of_a_user.py").write_text((REPOSITORY / "tests" / "support" / "server_rate.py").read_text())
    find.look_in(tmp_path)
    spec = spec_of("fedit", method={"name": "of_a_user:ServerRate", "server_rate": 0.5})
    runs.same_runs(runs.run(spec, on(Borrowed(workers, 2))), runs.run(spec))


class Apart(Borrowed):
    """Workers on a machine that does not have the run's folder."""

    def run(self, units: Sequence[WorkUnit], payloads: Mapping[int, Payload]) -> Iterator[WorkUnitReply]:
        return super().run([replace(unit, store=replace(unit.store, token="elsewhere")) for unit in units], payloads)


def test_what_clients_keep_travels_where_it_cannot_be_shared(workers: list[Any]):
    run = runs.run(spec_of("fedsa-lora"), on(Apart(workers, 2)))
    runs.same_runs(run, serially("fedsa-lora"))


def test_workers_share_the_gpu_that_ray_gives_them(workers: list[Any]):
    """Three workers with a quarter each: all see GPU 0 and no other, and a quarter of it is left."""

    def sees(_: Any) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert ray.get([worker.__ray_call__.remote(sees) for worker in workers]) == ["0", "0", "0"]
    assert ray.available_resources()["GPU"] == pytest.approx(1 - NUM_WORKERS * GPU_FRACTION)


def test_a_cluster_s_gpus_are_found(monkeypatch: pytest.MonkeyPatch):
    """One node of five cores with one GPU, as Ray counts them, whatever this machine has."""
    monkeypatch.setattr(Cluster, "_connect", lambda joining: joining._ready.set())
    engine = backends.RayBackend("auto")

    def chosen(**execution: Any) -> Any:
        return engine.resolve(tiny.spec({"execution": execution})).execution

    alone = chosen()
    assert (alone.device, alone.workers, alone.threads) == ("cuda", 1, NUM_CORES)
    shared = chosen(workers_per_gpu=2)
    assert (shared.device, shared.workers, shared.threads) == ("cuda", 2, 2)
    with pytest.raises(UserError, match="3 workers need more than the 1 GPU"):
        chosen(device="cuda", workers=3, workers_per_gpu=2)
