"""MLflow as a team installs it, for real: basic authentication, PostgreSQL, artifacts in an S3 store."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fleetune.records import RunDirectory
from fleetune.records.naming import filled_fields
from support import commands, services
from support.stored import expected_steps, steps

lacking = services.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        lacking is not None and not os.environ.get("FLEETUNE_REQUIRE_SERVICES"), reason=f"needs {lacking}"
    ),
]
NUM_ROUNDS = 30


@pytest.fixture(scope="module")
def server() -> Iterator[services.MLflowServer]:
    """One for all tests here: making its tables takes seconds."""
    assert lacking is None, f"FLEETUNE_REQUIRE_SERVICES is set, but what is missing is {lacking}"
    with services.mlflow_on_postgres() as installed:
        yield installed


def test_a_user_who_is_not_let_in_is_told_before_any_work(
    server: services.MLflowServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """No password, a wrong one, none for an old run that is sent or resumed: exit 2, and no run directory."""
    job = commands.job_file(tmp_path, {"tracking.enabled": True, "tracking.uri": server.uri, "rounds.num_rounds": 1})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in server.env:
        monkeypatch.delenv(name, raising=False)
    out = commands.fleetune(capfd, monkeypatch, "run", job, "-w", tmp_path, "--json")
    assert (out.status, out.document["field"]) == (2, "tracking.uri")
    assert out.document["rule"] == "the MLflow server wants a user and password"
    assert "export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in out.stderr

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    out = commands.fleetune(capfd, monkeypatch, "run", job, "-w", tmp_path, "--json")
    assert (out.status, out.document["rule"]) == (2, "the MLflow server refuses this user or password")
    assert not (tmp_path / "runs").exists()

    quiet = ("--set", "tracking.enabled=false", "--json")
    run_dir = commands.fleetune(capfd, monkeypatch, "run", job, "-w", tmp_path, *quiet).document["run_dir"]
    out = commands.fleetune(capfd, monkeypatch, "sync", run_dir, "--json")
    assert (out.status, out.document["rule"]) == (2, "the MLflow server refuses this user or password")

    (tmp_path / ".mlflow").mkdir()  # the third place where MLflow's client looks
    lines = [f"{name.lower()} = {value}" for name, value in server.env.items()]
    (tmp_path / ".mlflow" / "credentials").write_text("\n".join(["[mlflow]", *lines]))
    for name in server.env:
        monkeypatch.delenv(name)
    out = commands.fleetune(capfd, monkeypatch, "sync", run_dir, "--json")
    assert (out.status, out.document["num_artifacts"] > 0) == (0, True)


@pytest.mark.nodes
def test_a_server_killed_in_mid_run_holds_everything_once_when_it_is_back(
    server: services.MLflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It dies after the first rounds and comes back after the last; the command waits, and ends well.

    Then the store holds all params, every (metric, step) once, and the run's files as they are on disk.
    """
    settings = {"tracking.enabled": True, "tracking.uri": server.uri, "rounds.num_rounds": NUM_ROUNDS}
    job = commands.job_file(tmp_path, settings)
    process = commands.start("run", job, "-w", tmp_path, "--json", **server.env)
    try:
        run_dir = wait_for(lambda: next((path.parent for path in tmp_path.glob("runs/*/spec.yaml")), None))
        run = RunDirectory.open(run_dir)
        wait_for(lambda: list(run.round_rows()))
        process.send_signal(signal.SIGSTOP)  # so that rounds are left for later; another process feeds MLflow
        wait_for(lambda: (run_dir / "checkpoint" / "mlflow.json").exists())
        mlflow_id = json.loads((run_dir / "checkpoint" / "mlflow.json").read_text())["run_id"]
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        sent_before = len(wait_for(lambda: steps(server.uri, mlflow_id).get("train/loss")))
        server.kill()
        process.send_signal(signal.SIGCONT)
        wait_for(lambda: (run_dir / "result.json").exists())
        assert process.poll() is None
        server.start()
        out = commands.finish(process)
    finally:
        process.kill()
    assert (out.status, out.document["status"]) == (0, "finished"), out.stderr
    assert 0 < sent_before < NUM_ROUNDS
    assert steps(server.uri, mlflow_id) == expected_steps(run)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=server.uri)
    stored = client.get_run(mlflow_id)
    assert stored.info.status == "FINISHED"
    assert set(stored.data.params) == {key for key in filled_fields(run.spec) if not key.startswith("tracking.")}
    assert stored.data.params["rounds.num_rounds"] == str(NUM_ROUNDS)
    copy = Path(client.download_artifacts(mlflow_id, "", str(tmp_path)))
    for name in ("spec.yaml", "result.json", "rounds.parquet", "clients.parquet", "adapter/adapter_model.safetensors"):
        assert (copy / name).read_bytes() == (run_dir / name).read_bytes(), name
    assert stored.info.artifact_uri.startswith("mlflow-artifacts:")


def wait_for(condition: Callable[[], object], *, timeout_seconds: float = 90):
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return value
