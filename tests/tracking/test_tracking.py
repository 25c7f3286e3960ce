"""MLflow is fed from run directories: everything arrives, once, whatever happens to either side meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetune.engine.launch import run as launch
from fleetune.errors import UserError
from fleetune.records import RunDirectory, SweepDirectory
from fleetune.tracking.access import without_password
from fleetune.tracking.client import QUIET
from fleetune.tracking.metrics import RoundMetrics
from fleetune.tracking.store import default_uri
from fleetune.tracking.stream import RecordStream
from fleetune.tracking.sync import sync
from support.stored import expected_steps, steps
from support.synthetic_runs import make_run, make_spec, rounds_of


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One workspace, and so one SQLite store, for all tests here: making a store takes seconds."""
    return tmp_path_factory.mktemp("workspace")


def test_metrics_of_two_rounds():
    """Totals run on (10, then 10 + 5 bytes); a null, a NaN and a text are no metrics; depth is the method's
    own.
    """
    metrics = RoundMetrics()
    first = metrics.of({"round": 1, "uplink_bytes": 10, "train_loss": 2.0, "depth": 4, "note": "x", "eval_loss": None})
    assert first == {
        "train/loss": 2.0,
        "cost/uplink_bytes": 10.0,
        "method/depth": 4.0,
        "total/uplink_bytes": 10.0,
        "total/downlink_bytes": 0.0,
        "total/energy_joules": 0.0,
    }
    second = metrics.of({"round": 2, "uplink_bytes": 5, "train_loss": float("nan"), "num_oom": 3})
    assert second["total/uplink_bytes"] == 15.0
    assert second["clients/oom"] == 3.0
    assert "train/loss" not in second


def test_a_password_is_not_shown():
    assert without_password("http://me:secret@host:5000/x") == "http://host:5000/x"
    assert without_password("sqlite:////tmp/a@b/mlflow.db") == "sqlite:////tmp/a@b/mlflow.db"


def test_sync_sends_everything_once(workspace: Path):
    """12 rounds, evaluated every third, and the untrained model at 0. Sent twice, and then without our note of its id."""
    import mlflow

    untrained = {"eval_loss": 1.7, "eval_accuracy": 0.25}
    run = make_run(workspace, "sync", spec=make_spec(growth_rate=2), meta={"baseline": untrained})
    first = sync(run.path)
    assert (first.num_metrics > 0, first.num_params > 0, first.num_artifacts > 0) == (True, True, True)
    again = sync(run.path)
    assert (again.num_metrics, again.num_params, again.num_artifacts) == (0, 0, 0)
    (run.path / "checkpoint" / "mlflow.json").unlink()
    assert sync(run.path).mlflow_run_id == first.mlflow_run_id
    held = steps(first.uri, first.mlflow_run_id)
    assert held == expected_steps(run)
    assert held["eval/accuracy"] == held["eval/loss"] == [0, 3, 6, 9, 12]

    client = mlflow.MlflowClient(tracking_uri=default_uri(workspace))
    stored = client.get_run(first.mlflow_run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "devft · r8 · 20 clients · seed 0"
    assert stored.data.params["method.growth_rate"] == "2"
    assert stored.data.params["local.learning_rate"] == "0.001"
    assert stored.data.params["fleet.devices.jetson-nano"] == "0.5"
    assert stored.data.tags["method"] == "devft"
    assert stored.data.tags["git_commit"] == "0123abc"
    assert (stored.data.tags["trained_model"], stored.data.tags["costed_model"]) == ("micro-llama", "llama2-7b")
    assert stored.inputs.dataset_inputs[0].dataset.name == "micro-reasoning"
    assert client.get_experiment(first.experiment_id).name == "devft-quickstart"
    (model,) = client.search_logged_models([first.experiment_id])  # once, though it was sent twice
    assert (model.source_run_id, model.params["model.base"]) == (first.mlflow_run_id, "micro-llama")
    assert model.tags["files"] == f"runs:/{first.mlflow_run_id}/adapter"
    assert [out.model_id for out in stored.outputs.model_outputs] == [model.model_id]
    names = {a.path for a in client.list_artifacts(first.mlflow_run_id)}
    assert {"spec.yaml", "rounds.parquet", "clients.parquet", "result.json", "adapter", "figures"} <= names
    times = [m.timestamp for m in client.get_metric_history(first.mlflow_run_id, "train/loss")]
    assert times == [at for _, at in run.round_rows()]


def test_rounds_run_again_after_a_resume_are_not_sent_again(workspace: Path):
    """6 of 12 rounds are sent, the run is cut back to 4 and gone on with: every step is there once."""
    spec = make_spec(seed=5)
    run = RunDirectory.create(workspace, "resumed", spec)
    rounds = list(rounds_of(spec))
    for row, clients in rounds[:6]:
        run.append_round(row, clients)
    report = sync(run.path)
    run.truncate(4)
    for row, clients in rounds[4:]:
        run.append_round(row, clients)
    sync(run.path)
    assert steps(report.uri, report.mlflow_run_id) == expected_steps(run)


def test_trials_are_children_of_their_sweep(workspace: Path):
    import mlflow

    sweep = SweepDirectory.create(
        workspace, "growth", {"name": "growth", "grid": {"seed": [0, 1]}}, meta={"sweep": "growth"}
    )
    ids = []
    for seed in (0, 1):
        meta = {
            "parent_run_dir": "../growth",
            "sweep": "growth",
            "overrides": {"seed": seed, "method.growth_rate": 4},
            "text": "base: jobs/methods/devft.yaml",
        }
        trial = make_run(workspace, f"trial{seed}", spec=make_spec(seed=seed, num_rounds=3), meta=meta)
        (trial.path / "figures").mkdir()
        ids.append(sync(trial.path).mlflow_run_id)
    late = make_run(workspace, "late", spec=make_spec(seed=2, num_rounds=3), meta={**meta, "overrides": {"seed": 2}})
    (late.path / "figures").mkdir()
    sweep.write_trials([{"run_dir": late.path, "overrides": {"seed": 2}}])
    sweep.write_result({"status": "finished", "metrics": {"best_accuracy": 0.75}})
    parent = sync(sweep.path)  # and with it the trial that was not sent yet
    assert sync(late.path).num_metrics == 0
    assert parent.num_metrics == sum(len(steps) for steps in expected_steps(late).values())
    client = mlflow.MlflowClient(tracking_uri=default_uri(workspace))
    trials = [client.get_run(run_id) for run_id in ids]
    assert {t.data.tags["mlflow.parentRunId"] for t in trials} == {parent.mlflow_run_id}
    assert [t.info.run_name for t in trials] == [
        "devft · growth_rate 4 · seed 0",
        "devft · growth_rate 4 · seed 1",
    ]
    note = trials[0].data.tags["mlflow.note.content"]
    assert "Trial of **growth**: `seed=0`, `method.growth_rate=4`" in note
    assert "base: jobs/methods/devft.yaml" in note
    stored = client.get_run(parent.mlflow_run_id)
    assert (stored.info.run_name, stored.data.metrics) == ("growth", {"best_accuracy": 0.75})
    assert {t.info.experiment_id for t in trials} == {stored.info.experiment_id}


def test_no_link_is_followed_out_of_a_run(workspace: Path, tmp_path: Path):
    """A run from somebody else: links to a file, to a folder and to what is under one lead to our own files. Links within it, and
    a run directory that is itself a link, are as good as any; what a kill left half written is not sent.
    """
    import mlflow

    private = tmp_path / "private"
    private.mkdir()
    (private / "key.png").write_text("secret")
    run = make_run(workspace, "linked", spec=make_spec(num_rounds=1))
    figures, adapter = run.path / "figures", run.path / "adapter"
    figures.mkdir()
    (figures / "x.png").symlink_to(private / "key.png")
    (figures / "deep").symlink_to(private)
    (figures / "gone.png").symlink_to(private / "nowhere")
    (run.path / "trace.json").symlink_to(private / "key.png")
    (figures / "inside.png").symlink_to(adapter / "adapter_config.json")
    (adapter / ".adapter_config.json.77.tmp").write_text("half")
    moved = tmp_path / "elsewhere"
    run.path.rename(moved)
    run.path.symlink_to(moved)
    report = sync(run.path)
    client = mlflow.MlflowClient(tracking_uri=default_uri(workspace))
    sent = {
        a.path for folder in (None, "figures", "adapter") for a in client.list_artifacts(report.mlflow_run_id, folder)
    }
    assert sent == {
        *("spec.yaml", "result.json", "rounds.parquet", "clients.parquet"),
        *("figures", "adapter", "figures/inside.png", "adapter/adapter_config.json"),
    }
    assert sorted(report.left_out) == ["figures/deep", "figures/gone.png", "figures/x.png", "trace.json"]


def test_a_run_s_own_files_do_not_say_where_its_workspace_is(workspace: Path, tmp_path: Path):
    """Nor does it get a parent outside of it: neither a store nor a note comes to be elsewhere."""
    run = make_run(workspace, "redirected", spec=make_spec(num_rounds=1))
    (run.path / "figures").mkdir()
    stranger = SweepDirectory.create(tmp_path / "other", "s", {"name": "s"})
    run.update_meta(workspace=str(tmp_path), parent_run_dir=str(stranger.path))
    assert sync(run.path).uri == default_uri(workspace)
    assert not (tmp_path / "mlflow.db").exists()
    assert not (stranger.path / "checkpoint" / "mlflow.json").exists()


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", None], ids=["empty", "cut", "one byte"])
def test_a_damaged_table_is_not_a_server_that_is_down(content: bytes | None, workspace: Path):
    """The run is named, and how to go on; nothing is said of servers."""
    run = make_run(workspace, f"damaged-{'flipped' if content is None else len(content)}", spec=make_spec(num_rounds=1))
    path = run.path / "rounds.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-6] + b"\xff" + whole[-5:] if content is None else content)
    with pytest.raises(UserError, match=r"rounds\.parquet|cannot be read|damaged") as caught:
        sync(run.path)
    assert str(run.path) in str(caught.value)
    assert "server" not in str(caught.value)


@pytest.mark.parametrize("is_there", [True, False])
def test_records_that_do_not_arrive_in_time_are_told(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A server that hangs: it is said that something is waited for, then that not all is there and how to send it."""

    class Feeder:
        def finished(self, path: Path, *, timeout_seconds: float) -> bool:
            time.sleep(0 if is_there else 0.05)
            return is_there

    said: list[str] = []
    monkeypatch.setattr(launch, "record_stream", lambda warn: Feeder())
    monkeypatch.setattr(launch, "QUIET_SECONDS", 0.01)
    assert launch.in_mlflow([tmp_path / "runs" / "a"], said.append) is is_there
    document = launch.Result("a", tmp_path, "finished", synced=is_there).to_dict()
    assert document.get("synced", True) is is_there
    assert ("synced" in document) is not is_there
    assert [text.split(",")[0] for text in said] == (
        []
        if is_there
        else [
            "waiting for MLflow to take the last records",
            f"MLflow does not hold all records yet; send the rest with: fleetune sync {tmp_path}/runs/a",
        ]
    )


@pytest.mark.slow
def test_follower_streams_while_the_run_goes_on(workspace: Path):
    """The first rounds are in the store before the run is over; a run that ends without a result is marked
    killed.
    """
    import mlflow

    spec = make_spec(seed=7)
    spec["tracking"]["system_metrics"] = True
    run, orphan = (RunDirectory.create(workspace, name, spec) for name in ("streamed", "orphan"))
    rounds = list(rounds_of(spec))
    follower = RecordStream.start(warn=lambda line: pytest.fail(line))
    follower.watch(run.path)
    follower.watch(orphan.path)
    for row, clients in rounds[:4]:
        run.append_round(row, clients)
        orphan.append_round(row, clients)
    client = mlflow.MlflowClient(tracking_uri=default_uri(workspace))
    stored = wait_for(lambda: find(client, run, "metrics.`train/loss` > 0"))
    assert stored.info.status == "RUNNING"
    for row, clients in rounds[4:]:
        run.append_round(row, clients)
    run.consolidate()
    run.write_result({"status": "finished"})
    assert follower.finished(run.path, timeout_seconds=60)
    held = steps(default_uri(workspace), stored.info.run_id)
    measured = {key: held.pop(key) for key in list(held) if key.startswith("system/")}
    assert held == expected_steps(run)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(measured)
    assert all(len(found) == len(set(found)) for found in measured.values())
    follower.close()
    assert client.get_run(stored.info.run_id).info.status == "FINISHED"
    killed = find(client, orphan, "")
    assert (killed.info.status, killed.data.tags["status"]) == ("KILLED", "interrupted")


@pytest.mark.slow
def test_a_store_that_is_away_breaks_nothing(tmp_path: Path):
    """Nothing listens on the port: one warning that names the way out, and an error from sync that names the
    field.
    """
    spec = make_spec(num_rounds=3)
    spec["tracking"]["uri"] = f"http://127.0.0.1:{free_port()}"
    run = make_run(tmp_path, "a", spec=spec)
    warnings: list[str] = []
    follower = RecordStream.start(warn=warnings.append)
    follower.watch(run.path)
    wait_for(lambda: warnings)
    assert not follower.finished(run.path, timeout_seconds=0.5)
    follower.close(timeout_seconds=0.5)
    assert len(warnings) == 1
    assert "is unreachable; the run goes on; later: fleetune sync" in warnings[0]
    with pytest.raises(UserError, match="MLflow cannot be reached") as caught:
        sync(run.path)
    assert caught.value.field == "tracking.uri"


@pytest.mark.slow
def test_server_killed_in_the_middle_of_a_run(tmp_path: Path):
    """A real MLflow server dies after some rounds and comes back: afterwards each (metric, step) is there
    once.
    """
    port = free_port()
    spec = make_spec(seed=3, num_rounds=9)
    spec["tracking"]["uri"] = f"http://127.0.0.1:{port}"
    rounds = list(rounds_of(spec))
    run = RunDirectory.create(tmp_path, "a", spec)
    warnings: list[str] = []
    follower = RecordStream.start(warn=warnings.append)
    with server(tmp_path, port):
        follower.watch(run.path)
        for row, clients in rounds[:4]:
            run.append_round(row, clients)
        wait_for(lambda: (run.path / "checkpoint" / "mlflow.json").exists())
        time.sleep(2.0)
    for row, clients in rounds[4:7]:
        run.append_round(row, clients)
    wait_for(lambda: warnings)
    with server(tmp_path, port):
        for row, clients in rounds[7:]:
            run.append_round(row, clients)
        run.consolidate()
        run.write_result({"status": "finished"})
        assert follower.finished(run.path, timeout_seconds=90)
        follower.close()
        report = sync(run.path)
        assert (report.num_metrics, report.num_artifacts) == (0, 0)
        assert steps(spec["tracking"]["uri"], report.mlflow_run_id) == expected_steps(run)
    assert len(warnings) == 1


@contextlib.contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server on an SQLite store in ``folder``; killed, not stopped, at the end."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
    ]
    command += ["--artifacts-destination", f"{folder}/artifacts", "--port", str(port), "--workers", "1"]
    env = {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=env, start_new_session=True, **quiet)
    try:
        wait_for(lambda: is_up(port), timeout_seconds=120)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_up(port: int) -> bool:
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def find(client, run: RunDirectory, more: str):
    """The stored run, or None; ``more`` is a further condition."""
    experiment = client.get_experiment_by_name(run.spec["name"])
    query = " and ".join(filter(None, [f"tags.fleetune_run_id = '{run.run_id}'", more]))
    found = client.search_runs([experiment.experiment_id], filter_string=query) if experiment else []
    return found[0] if found else None


def wait_for(condition, *, timeout_seconds: float = 150.0):
    """What ``condition`` gives once it is true."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return value
