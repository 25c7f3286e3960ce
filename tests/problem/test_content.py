"""A run is its spec and all that it reads: a file that changes makes another run, on resume and in MLflow's data set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fleetune.engine.launch import backends
from fleetune.engine.launch import run as launch
from fleetune.engine.launch.directories import run_meta
from fleetune.errors import UserError
from fleetune.methods import METHODS
from fleetune.problem.content import Contents, identity
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec, from_dict
from support import runs, tiny
from support.changed_files import a_blank_more, a_faster_link, flipped, other_answers


@dataclass(frozen=True)
class World:
    """A run that was stopped after its first round, and the files that it read, which are its own."""

    folder: Path
    run_dir: RunDirectory

    @property
    def spec(self) -> RunSpec:
        return from_dict(self.run_dir.spec)


def files_in(folder: Path) -> dict[str, Any]:
    """Copies of all that a run can read, and the fields that name them."""
    shutil.copytree(tiny.model_folder(), folder / "model")
    shutil.copy(tiny.data_file(), folder / "train.jsonl")
    shutil.copy(tiny.data_file(30), folder / "test.jsonl")
    rows = [f"{client},0,1e9" for client in range(6)]
    (folder / "trace.csv").write_text("\n".join(["client_id,start_seconds,end_seconds", *rows]))
    (folder / "model" / "chat_template.jinja").write_text("{{ messages }}")
    link = "{down: 10 Mbit/s, up: 5 Mbit/s, latency: 10 ms, source: a test}"
    (folder / "links.yaml").write_text(f"networks: {{my-link: {link}}}\n")
    return {
        "model.base": str(folder / "model"),
        "data.dataset": str(folder / "train.jsonl"),
        "data.eval_dataset": str(folder / "test.jsonl"),
        "fleet.availability": {"kind": "trace", "path": str(folder / "trace.csv")},
        "fleet.device_files": [str(folder / "links.yaml")],
        "fleet.network": "my-link",
        "evaluation.generate": False,
    }


def stopped_run(folder: Path, overrides: dict[str, Any]) -> RunDirectory:
    """A run that Ctrl-C ends when its first round is on record."""

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.run(tiny.spec(overrides), workspace=folder, debug=True, report=report)
    (path,) = (folder / "runs").iterdir()
    return RunDirectory.open(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("identity")
    return World(folder, stopped_run(folder, files_in(folder)))


def made(path: Path) -> None:
    path.write_text("{}")


CHANGES: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "training data": ("train.jsonl", other_answers, "data.dataset", "has changed"),
    "evaluation data": ("test.jsonl", other_answers, "data.eval_dataset", "has changed"),
    "weights": ("model/model.safetensors", flipped, "model.base", "its model.safetensors has changed"),
    "tokenizer": ("model/tokenizer.json", a_blank_more, "model.base", "its tokenizer.json has changed"),
    "configuration": ("model/config.json", a_blank_more, "model.base", "its config.json has changed"),
    "template": ("model/chat_template.jinja", a_blank_more, "model.base", "its chat_template.jinja has changed"),
    "new file": ("model/special_tokens_map.json", made, "model.base", "its special_tokens_map.json is new"),
    "missing": ("model/chat_template.jinja", Path.unlink, "model.base", "its chat_template.jinja is gone"),
    "devices": ("links.yaml", a_faster_link, "fleet.device_files", "links.yaml has changed"),
    "trace": ("trace.csv", a_blank_more, "fleet.availability.path", "its content has changed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_changed_is_named_on_resume(world: World, what: str):
    """Same name, other content: the run would go on with numbers that are no run's. Times do not count, content does."""
    name, change, field, told = CHANGES[what]
    path = world.folder / name
    before, status = (path.read_bytes(), path.stat()) if path.exists() else (None, None)
    change(path)
    if status is not None and path.exists():
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    try:
        with pytest.raises(UserError, match=told) as error:
            launch.resume(world.run_dir.path, debug=True)
    finally:
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
    assert error.value.field == field
    assert "links.yaml" in str(error.value) or str(error.value.value) in str(path)
    assert "restore it and resume again" in str(error.value.hint)
    assert world.run_dir.result() is None


def test_what_was_restored_goes_on(world: World, tmp_path: Path):
    """The files were written again, with other times; moved along with the run's records, it would go on too."""
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(world.run_dir.path, copy)
    assert launch.resume(copy, debug=True).status == "finished"


def test_a_run_that_did_not_note_what_it_read_is_refused(world: World, tmp_path: Path):
    """As those of earlier versions; a finished one shows its result."""
    old, over = RunDirectory(tmp_path / "old"), RunDirectory(tmp_path / "over")
    for run in (old, over):
        shutil.copytree(world.run_dir.path, run.path)
    result = launch.resume(over.path, debug=True)
    for run in (old, over):
        meta = {key: value for key, value in run.meta.items() if key not in ("content", "identity")}
        run._write_json("checkpoint/meta.json", {**meta, "spec_hash": "0123456789abcdef"})
    with pytest.raises(UserError, match=r"earlier version .* did not note what it read.*start a new run"):
        launch.resume(old.path, debug=True)
    assert launch.resume(over.path, debug=True).metrics == result.metrics


def test_content_is_part_of_the_identity_and_of_the_name(world: World, tmp_path: Path):
    """Two runs of one job file over other answers: one spec hash, two identities, and other last digits of the folders."""
    data = tmp_path / "train.jsonl"
    shutil.copy(tiny.data_file(), data)
    spec = tiny.spec({"data.dataset": str(data), "rounds.num_rounds": 1, "evaluation.generate": False})
    one = RunDirectory.open(launch.run(spec, workspace=tmp_path, debug=True).run_dir)
    other_answers(data)
    other = RunDirectory.open(launch.run(spec, workspace=tmp_path, debug=True).run_dir)
    assert one.meta["spec_hash"] == other.meta["spec_hash"] == spec.spec_hash
    assert one.meta["identity"] != other.meta["identity"]
    assert [run.run_id[-6:] for run in (one, other)] == [run.meta["identity"][:6] for run in (one, other)]
    assert one.meta["dataset"]["digest"] != other.meta["dataset"]["digest"]
    assert world.run_dir.meta["content"].keys() >= {
        "data.dataset",
        "data.eval_dataset",
        "fleet.availability.path",
        "model.base/model.safetensors",
        "model.base/tokenizer.json",
    }


def test_what_a_run_notes_is_what_can_be_asked_of_the_disk(world: World):
    """A sweep asks before it reads, a run notes what it has read; both mean the same."""
    from fleetune.problem.content import Contents

    assert Contents().of(world.spec) == world.run_dir.meta["content"]


def test_generated_data_are_known_by_what_the_generator_gives():
    from fleetune.problem.content import Contents

    asked = {"data": {"num_examples": 20, "num_eval_examples": 5}}
    one, same, other = (
        Contents().of(from_dict({**asked, "seed": seed}, more))["data.dataset"]
        for seed, more in ((0, {}), (1, {}), (0, {"data.num_examples": 21}))
    )
    assert one == same != other


def test_weights_are_copied_when_they_are_read(tmp_path: Path):
    """Who writes into a checkpoint changes no run that goes on with it."""
    from fleetune.models.config import ModelConfig
    from fleetune.models.load import load_base

    folder = tmp_path / "model"
    shutil.copytree(tiny.model_folder(), folder)
    base = load_base(ModelConfig(base=str(folder)))
    before = {name: weight.clone() for name, weight in base.weights.items()}
    file = folder / "model.safetensors"
    with file.open("r+b") as writer:
        writer.seek(file.stat().st_size // 2)
        writer.write(b"\x01" * (file.stat().st_size // 2))
    assert all(weight.equal(before[name]) for name, weight in base.weights.items())


def test_a_model_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its digest would be that of neither."""
    from fleetune.models import load
    from fleetune.models.config import ModelConfig

    folder = tmp_path / "model"
    shutil.copytree(tiny.model_folder(), folder)
    read = load.read_weights

    def slowly(*arguments: Any) -> Any:
        weights = read(*arguments)
        flipped(folder / "model.safetensors")
        return weights

    monkeypatch.setattr(load, "read_weights", slowly)
    with pytest.raises(UserError, match=r"model\.safetensors was changed while the model was read"):
        load.load_base(ModelConfig(base=str(folder)))


def test_the_untrained_model_s_quality_is_shared_by_runs_that_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not by those with other kernels, or with other answers in the same file."""
    import contextlib

    from fleetune.engine.coordinator import Coordinator
    from fleetune.engine.execution.executor import SerialExecutor
    from support import runs

    data = tmp_path / "train.jsonl"
    shutil.copy(tiny.data_file(), data)
    shared: dict[str, Any] = {}

    def start(number: int, overrides: dict[str, Any]) -> int:
        """How many untrained models are known once this run has begun."""
        made = runs.problem(tiny.spec({"data.dataset": str(data), "evaluation.generate": False, **overrides}))
        run_dir = RunDirectory.create(tmp_path, f"run-{number}", made.spec.to_dict())
        events = Coordinator(made, SerialExecutor(made), run_dir, baselines=shared).run()
        with contextlib.closing(events) as stream:
            next(stream)
        return len(shared)

    assert start(0, {}) == 1
    assert start(1, {"local.steps": 1, "execution.cohort": 1}) == 1
    monkeypatch.setattr(
        "fleetune.engine.execution.worker_process.set_up", lambda device, kernels: None
    )  # no compiler is needed here
    assert start(2, {"execution.kernels": "compiled"}) == 2
    other_answers(data)
    assert start(3, {}) == 3


def test_a_base_model_that_was_kept_is_read_again_once_its_files_change(tmp_path: Path):
    """A process keeps what it has put into the object store for the next run, as long as the files are as they were."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.model_folder(), folder)
    spec = tiny.spec({"model.base": str(folder)})
    engine = backends.RayBackend.__new__(backends.RayBackend)
    engine._coordinators, engine._bases = {(1, 1, 0.0): None}, {}
    first = engine.inputs(spec).base
    engine._bases[backends.base_key(spec)] = (first, None)
    assert engine.inputs(spec).base is first
    flipped(folder / "model.safetensors")
    second = engine.inputs(spec)
    assert second.base is not first
    assert second.base.key != first.key
    assert second.content["model.base/model.safetensors"] != first.content["model.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_known_by_its_job(method: str):
    """What a run notes is what `resume` and a sweep that is launched again will look for, though it may be worked otherwise:
    centralised training of 6 clients is carried out as that of the server alone."""
    spec = tiny.spec({"evaluation.generate": False}, method=method)
    noted = run_meta(runs.problem(spec))
    assert noted["spec_hash"] == spec.spec_hash
    assert noted["identity"] == identity(spec, Contents().of(spec))


def test_a_run_that_is_carried_out_as_another_job_is_resumed(tmp_path: Path):
    run_dir = stopped_run(tmp_path, {"evaluation.generate": False, "method": {"name": "centralized"}})
    assert run_dir.spec["fleet"]["num_clients"] == 6
    assert launch.resume(run_dir.path).status == "finished"
