"""Every job file that ships loads, names only what there is, and builds: fleet, partition and method."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fleetune.methods import METHODS
from fleetune.methods.base import GlobalModel
from fleetune.methods.reuse import Reuse
from fleetune.models.load import load_base
from fleetune.models.lora import init_lora
from fleetune.models.model import Model
from fleetune.models.network import linear_sites
from fleetune.models.peft_format import save_adapter
from fleetune.models.submodel import Submodel
from fleetune.plan.walk import outline
from fleetune.problem import build_problem, load_inputs
from fleetune.spec import RunSpec, from_dict, load, read_yaml
from fleetune.sweep.config import load as load_sweep
from fleetune.sweep.expansion import trials_of
from support import is_sweep, tiny

JOBS = Path(__file__).parent.parent / "jobs"
SWEEPS = sorted(path for path in JOBS.rglob("*.yaml") if is_sweep(path))
FILES = sorted(set(JOBS.rglob("*.yaml")) - set(SWEEPS))

every_job = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(JOBS)))


def test_every_method_has_its_job():
    assert {path.stem for path in JOBS.glob("methods/*.yaml")} == set(METHODS)
    assert all(load(path).method.name == path.stem for path in JOBS.glob("methods/*.yaml"))


@every_job
def test_a_job_loads(path: Path):
    """It opens with how to run it, and runs of different jobs do not share an experiment by mistake."""
    spec = load(path)
    verb = "plan" if path.parent.name == "paper" else "run"
    assert f"fleetune {verb} jobs/{path.relative_to(JOBS)}" in path.read_text(encoding="utf-8")
    assert spec.name == path.stem
    assert set(read_yaml(path)) <= set(RunSpec.model_fields)


def test_the_methods_jobs_differ_in_the_method_alone():
    """So that their runs can be compared. FwdLLM has a protocol of its own, as it has no gradients; those that compose
    adapters are on a task of two skills."""
    paths = [path for path in JOBS.glob("methods/*.yaml") if path.stem != "fwdllm"]
    composing = [path for path in paths if issubclass(METHODS[path.stem], Reuse)]
    for group in (composing, [path for path in paths if path not in composing]):
        assert len({load(path, {"method": {"name": "fedit"}}).spec_hash for path in group}) == 1


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name == "paper"], ids=lambda path: path.stem)
def test_a_paper_s_job_can_be_planned(path: Path):
    """On an architecture without weights, which a run would have to fetch."""
    problem, _ = outline(load(path))
    assert problem.inputs.base.is_outline
    assert problem.fleet.num_clients == len(problem.eligible)


def fresh_adapter(spec: RunSpec, folder: Path) -> Path:
    """An untrained adapter of the job's base and targets, in PEFT's format."""
    base = load_base(spec.model)
    fresh = init_lora(linear_sites(base, spec.model.lora), spec.model.lora, run_seed=0)
    whole = Model(Submodel.prefix(base.num_layers))
    save_adapter(folder, GlobalModel(whole, fresh), base, spec.model.lora)
    return folder


def with_fresh_adapters(spec: RunSpec, folder: Path) -> RunSpec:
    """The job with untrained adapters in the place of those that it composes."""
    names = [Path(name).name for name in getattr(spec.method, "adapters", ())]
    made = [folder / name if (folder / name).exists() else fresh_adapter(spec, folder / name) for name in names]
    return from_dict(spec.to_dict(), {"method.adapters": [str(path) for path in made]}) if made else spec


@pytest.mark.parametrize("path", [path for path in FILES if path.parent.name != "paper"], ids=lambda path: path.stem)
def test_a_job_builds(path: Path, tmp_path: Path):
    """On the built-in model; data that one has to fetch, and adapters that one has to train, are stood in for by small files."""
    spec = load(path)
    small = {"data.num_examples": 400, "data.num_eval_examples": 8}
    if getattr(spec.method, "adapters", ()):
        spec = with_fresh_adapters(load(path, small), tmp_path)
    elif spec.data.dataset.endswith(".jsonl"):
        columns = {"prompt": "prompt", "response": "response"}
        stand_in = {
            "data.dataset": tiny.data_file(),
            "data.eval_dataset": None,
            "data.columns": columns,
            "data.partition": {"kind": "iid"},
        }
        spec = load(path, {**stand_in, "data.template": "{prompt}"})
    else:
        spec = load(path, small)
    problem = build_problem(spec, load_inputs(spec))
    assert problem.fleet.num_clients == problem.spec.fleet.num_clients  # of a pooled method one: the server
    assert len(problem.eligible) >= problem.spec.rounds.clients_per_round
    dealt = np.sort(problem.partition.indices)
    assert np.array_equal(dealt, np.arange(len(problem.inputs.train)))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_s_trials_build(path: Path, tmp_path: Path):
    """It opens with how to run it; every trial is one that the built-in model and data allow, with untrained adapters.

    A comparison or a paper's study has at least five seeds, so that something can be decided; a sweep that shows how it is done
    has three.
    """
    sweep = load_sweep(path)
    assert f"fleetune sweep jobs/{path.relative_to(JOBS)}" in path.read_text(encoding="utf-8")
    assert sweep.name == path.stem
    trials = trials_of(sweep)
    seeds = {trial.spec.seed for trial in trials}
    assert seeds == set(range(len(seeds)))
    assert len(seeds) == 3 if path.parent.name == "sweeps" else len(seeds) >= 5
    inputs = load_inputs(trials[0].spec)
    for trial in trials[:: len(seeds)]:
        build_problem(with_fresh_adapters(trial.spec, tmp_path), inputs)


def test_no_two_sweeps_share_a_name():
    """Nor, by mistake, an MLflow experiment."""
    names = [path.stem for path in SWEEPS + FILES]
    assert len(set(names)) == len(names)
