"""``fleetune submit``: a job file becomes a job of a cluster; its log and its exit status come back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
import uuid
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus

from fleetune.cli import job_server as jobs
from fleetune.errors import RunFailed
from support import commands, services, tiny

Access = dict[str, str]


# -- what is found out before anything is sent ---------------------------------------------------------------------------
def test_the_file_is_checked_here(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A misspelt field, and a job outside of the folder that is sent, need no cluster to be told."""
    there = ("--address", "http://127.0.0.1:1", "--json")
    monkeypatch.chdir(tmp_path)
    job = commands.job_file(tmp_path)
    out = commands.fleetune(capfd, monkeypatch, "submit", "job.yaml", *there, "--set", "rounds.num_round=3")
    assert (out.status, out.document["field"]) == (2, "rounds.num_round")
    (tmp_path / "sweep.yaml").write_text("base: job.yaml\ngrid: {local.steps: [1, 0]}\n")
    out = commands.fleetune(capfd, monkeypatch, "submit", "sweep.yaml", *there)
    assert (out.status, out.document["field"]) == (2, "local.steps")
    assert "trial 1: local.steps=0" in out.document["rule"]
    out = commands.fleetune(capfd, monkeypatch, "submit", job, *there, "--env", "NOT_SET_ANYWHERE")
    assert (out.status, out.document["field"], out.document["value"]) == (2, "--env", "NOT_SET_ANYWHERE")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = commands.fleetune(capfd, monkeypatch, "submit", job, *there)
    assert (out.status, out.document["field"]) == (2, "FILE")
    assert "the folder that is sent" in out.document["rule"]


@pytest.mark.parametrize(
    ("address", "rule"),
    [
        ("ray://127.0.0.1:10001", "must be the URL of the cluster's job server"),
        ("127.0.0.1:8265", "must be the URL of the cluster's job server"),
        ("http://127.0.0.1:1", "no job server answers"),
        ("http://127.0.0.1:99999", "no job server answers"),
    ],
)
def test_an_address_without_a_job_server(
    address: str, rule: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    job = commands.job_file(tmp_path)
    out = commands.fleetune(capfd, monkeypatch, "submit", job, "--address", address, "--json")
    assert (out.status, out.document["field"]) == (2, "--address")
    assert rule in out.document["rule"]
    assert "http://" in out.document["hint"]


class SomethingElse(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_: object):
        pass


def test_a_server_that_is_none_of_ray_s(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A wrong port, on which another web server answers 404; RAY_ADDRESS, which Ray would prefer, does not count."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    job = commands.job_file(tmp_path)
    with HTTPServer(("127.0.0.1", 0), SomethingElse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        out = commands.fleetune(capfd, monkeypatch, "submit", job, "--address", address, "--json")
        server.shutdown()
    assert (out.status, out.document["value"]) == (2, address)
    assert "the job server does not take it: " in out.document["rule"]
    assert "404" in out.document["rule"]
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:2"


# -- a cluster with a job server -----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Access, Path]]:
    """A head that wants a token: its job server's URL, what lets one in, and the folder in which its jobs write. Its sockets
    lie in a folder whose path is short, as theirs may have 107 characters."""
    port, jobs_port = services.free_port(), services.free_port()
    workspace, sockets = tmp_path_factory.mktemp("workspace"), tempfile.mkdtemp(prefix="ray-")
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    head += [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--object-store-memory={200 * 2**20}"]
    head += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs_port}"]
    head += [f"--dashboard-agent-listen-port={services.free_port()}", f"--temp-dir={sockets}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in a shell where the environment is active
    env = {**os.environ, **access, "FLEETUNE_WORKSPACE": str(workspace), "PATH": path, "PYTHONPATH": ""}
    with services.process(head, is_up=lambda: services.answers(jobs_port), env=env):
        yield f"http://127.0.0.1:{jobs_port}", access, workspace
    shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working tree: a job whose data lies beside it, and results that should stay at home."""
    shutil.copy(tiny.data_file(), tmp_path / "sums.jsonl")
    job = commands.job_file(tmp_path, {"rounds.num_rounds": 2})
    values = yaml.safe_load(job.read_text())
    values["data"]["dataset"] = "sums.jsonl"
    job.write_text(yaml.safe_dump(values))
    (tmp_path / "sweep.yaml").write_text("base: job.yaml\nseeds: [0, 1]\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "large").write_bytes(os.urandom(2**20))
    return tmp_path


def submit(
    project: Path, address: str, access: Access, *arguments: str, file: str = "job.yaml", **variables: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fleetune", "submit", file, "--address", address, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    env = {**os.environ, **access, **variables}
    if not access:
        env.pop("RAY_AUTH_TOKEN", None)  # that of a Ray that this process started for another test
    return subprocess.Popen(command, cwd=project, env=env, text=True, start_new_session=True, **pipes)


@pytest.mark.ray
@pytest.mark.nodes
def test_a_sweep_runs_on_the_cluster_and_its_end_is_ours(cluster: tuple[str, Access, Path], project: Path):
    """Status 0 with the sweep's own document, and 2 for a mistake that only the cluster sees."""
    address, access, workspace = cluster
    well = submit(project, address, access, "--json", file="sweep.yaml")
    mistaken = submit(project, address, access, "--set", "model.base=./nowhere")
    out = commands.finish(well)
    assert out.status == 0, out.stderr
    document = out.document
    assert (document["status"], document["exit_status"], document["result"]["status"]) == ("succeeded", 0, "finished")
    assert Path(document["result"]["sweep_dir"]).parent == workspace / "sweeps"
    assert len(list(workspace.glob("runs/*/result.json"))) == 2
    out = commands.finish(mistaken)
    assert out.status == 2, out.stderr
    assert "model.base='./nowhere'" in out.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running(cluster: tuple[str, Access, Path], project: Path):
    """Ctrl-C ends the following, not the job. Meanwhile two submissions are not let in."""
    address, access, _ = cluster
    left = submit(project, address, access, "--set", "rounds.num_rounds=5000", "--set", "execution.workers=1", "--json")
    strangers = [
        submit(project, address, {}, "--json", HOME=str(project)),
        submit(project, address, {**access, "RAY_AUTH_TOKEN": uuid.uuid4().hex}, "--json", HOME=str(project)),
    ]
    rules = []
    for stranger in strangers:
        out = commands.finish(stranger)
        assert (out.status, out.document["field"]) == (2, "--address")
        assert "RAY_AUTH_TOKEN" in out.document["hint"]
        rules.append(out.document["rule"])
    assert rules == ["the cluster wants a token", "the cluster refuses this token"]

    assert left.stderr is not None
    while not (line := left.stderr.readline()).startswith("round 2/"):
        assert line, "it ended before its second round"
    left.send_signal(signal.SIGINT)
    out = commands.finish(left)
    assert (out.status, out.document["status"]) == (130, "detached")
    job_id = out.document["job_id"]
    assert f"ray job stop --address {address} {job_id}" in out.stderr
    assert ask(address, access, "GET", f"/api/jobs/{job_id}")["status"] == "RUNNING"
    ask(address, access, "POST", f"/api/jobs/{job_id}/stop")


def ask(address: str, access: Access, method: str, path: str) -> Any:
    """Ray's job server, without Ray."""
    headers = {"Authorization": f"Bearer {access['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers, method=method)) as answer:
        return json.load(answer)


# -- following ------------------------------------------------------------------------------------------------------------
class FlakyServer:
    """A job server whose connection breaks after the first line; the job ends as it is told."""

    def __init__(self, status: JobStatus, exit_code: int | None):
        self.over = JobDetails(
            type="SUBMISSION", entrypoint="", status=status, driver_exit_code=exit_code, message="so it is"
        )
        self.running = JobDetails(type="SUBMISSION", entrypoint="", status=JobStatus.RUNNING)
        self.tails = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.tails += 1
        yield "one\n"
        if self.tails == 1:
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "two\nthr"
        yield "ee\n"

    def get_job_info(self, job_id: str) -> JobDetails:
        return self.running if self.tails == 1 else self.over


@pytest.mark.parametrize(("status", "exit_code"), [("SUCCEEDED", 0), ("FAILED", 1), ("FAILED", 2)])
def test_what_the_job_prints_is_told_once_and_its_status_is_passed_on(
    status: str, exit_code: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    told: list[str] = []
    job = jobs.Submitted("j", "http://head:8265", FlakyServer(JobStatus(status), exit_code))
    assert jobs.follow(job, told.append) == exit_code
    assert "".join(told) == "one\ntwo\nthree\n"


@pytest.mark.parametrize(("status", "exit_code"), [("FAILED", None), ("STOPPED", 143)])
def test_a_job_that_was_ended_has_failed(status: str, exit_code: int | None, monkeypatch: pytest.MonkeyPatch):
    """Its environment could not be made, or somebody stopped it: there is no exit status of its own."""
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    job = jobs.Submitted("j", "http://head:8265", FlakyServer(JobStatus(status), exit_code))
    with pytest.raises(RunFailed, match="job j: so it is"):
        jobs.follow(job, lambda text: None)


def test_a_head_that_is_gone_is_told_with_the_way_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "LOST_SECONDS", 0.0)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    job = jobs.Submitted("j", "http://head:8265", client=None)
    with pytest.raises(RunFailed, match="has gone; follow it: ray job logs --follow --address http://head:8265 j"):
        jobs.follow(job, lambda text: None)
