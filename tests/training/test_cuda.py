"""The tiny world on a real GPU: what it learns, in one process and on Ray, and what it keeps in the GPU's memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fleetune.engine.execution.worker_process import placed_base
from fleetune.engine.launch import run as launch
from fleetune.methods import METHODS
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.records.run_directory import RunDirectory
from support import runs, tiny

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = {"execution.device": "cuda"}


def run(method: str = "fedit", **overrides: Any) -> runs.Finished:
    """SGD, because AdamW's first steps blow up differences of what is nearly zero."""
    return runs.run(tiny.spec({"local.optimizer": "sgd", "local.learning_rate": 1.0, **overrides}, method=method))


def distance(a: runs.Finished, b: runs.Finished) -> float:
    """Between the final adapters, relative to the second."""
    one, other = (torch.cat([t.flatten() for t in done.deployed.adapter.values()]) for done in (a, b))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_gpu_learns_what_the_cpu_learns(method: str, precision: str):
    changed = {"execution.precision": precision}
    assert distance(run(method, **CUDA, **changed), run(method, **changed)) < (1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_bases_learn_on_a_gpu(kind: str):
    changed = {"model.quantization": kind}
    assert distance(run(**CUDA, **changed), run(**changed)) < 2e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stacked_clients_learn_what_they_learn_one_by_one(precision: str):
    changed = {**CUDA, "execution.precision": precision}
    stacked, alone = (run(**changed, **{"execution.cohort": cohort}) for cohort in (3, 1))
    assert distance(stacked, alone) < (1e-4 if precision == "fp32" else 2**-8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_bits(precision: str):
    changed = {**CUDA, "execution.precision": precision}
    runs.same_runs(run(**changed), run(**changed))


@pytest.mark.ray
def test_two_workers_on_one_gpu_give_the_bits_of_a_serial_run(tmp_path: Path):
    changed = {**CUDA, "execution.workers": 2, "execution.workers_per_gpu": 2, "execution.cohort": 1}
    done = [
        launch.run(tiny.spec({**changed, "execution.kind": kind}), workspace=tmp_path / kind)
        for kind in ("serial", "ray")
    ]
    serial, ray = (RunDirectory.open(result.run_dir) for result in done)
    told = ["run_id", "wall_seconds"]
    assert serial.rounds().drop(columns=told).equals(ray.rounds().drop(columns=told))
    adapters = [result.run_dir / "adapter" / "adapter_model.safetensors" for result in done]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_networks_of_one_process_share_the_base_in_the_gpu_s_memory():
    """A second network over the same blocks adds nothing but its rotary table."""
    spec = tiny.spec(CUDA)
    base = placed_base(spec, runs.inputs(spec).base)
    num_bytes = sum(weight.nbytes for weight in base.weights.values())
    before = torch.cuda.memory_allocated()
    networks = [Network(base, submodel, spec.model.lora) for submodel in (Submodel.prefix(4), Submodel.prefix(2))]
    assert all(network.device.type == "cuda" for network in networks)
    assert torch.cuda.memory_allocated() - before < 0.05 * num_bytes


def test_bf16_halves_what_the_matrices_weigh():
    spec = tiny.spec(CUDA)
    base = runs.inputs(spec).base
    exact, rounded = (
        sum(weight.nbytes for weight in placed_base(tiny.spec({**CUDA, **changed}), base).weights.values())
        for changed in ({}, {"execution.precision": "bf16"})
    )
    assert rounded == pytest.approx(0.5 * exact, rel=0.01)
