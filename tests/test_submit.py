"""``fleetune submit``: a job file becomes a job of a cluster; its log and its exit status come back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import commands
import services
import tiny

Access = dict[str, str]


# -- what is found out before anything is sent ---------------------------------------------------------------------------
def test_the_file_is_checked_here(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A misspelt field, and a job outside of the folder that is sent, need no cluster to be told."""
    there = ("--address", "http://127.0.0.1:1", "--json")
    monkeypatch.chdir(tmp_path)
    job = commands.job_file(tmp_path)
    out = commands.fleetune(capfd, monkeypatch, "submit", "job.yaml", *there, "--set", "rounds.num_round=3")
    assert (out.status, out.document["field"]) == (2, "rounds.num_round")
    out = commands.fleetune(capfd, monkeypatch, "submit", job, *there, "--env", "NOT_SET_ANYWHERE")
    assert (out.status, out.document["field"], out.document["value"]) == (2, "--env", "NOT_SET_ANYWHERE")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = commands.fleetune(capfd, monkeypatch, "submit", job, *there)
    assert (out.status, out.document["field"]) == (2, "FILE")
    assert "is what is sent" in out.document["rule"]


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
    """A head that wants a token: its job server's URL, what lets one in, and the folder in which its jobs write."""
    port, jobs_port = services.free_port(), services.free_port()
    workspace = tmp_path_factory.mktemp("workspace")
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    head += [f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--object-store-memory={200 * 2**20}"]
    head += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs_port}"]
    head += [f"--dashboard-agent-listen-port={services.free_port()}", f"--temp-dir={tmp_path_factory.mktemp('r')}"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as in a shell where the environment is active
    env = {**os.environ, **access, "FLEETUNE_WORKSPACE": str(workspace), "PATH": path, "PYTHONPATH": ""}
    with services.process(head, is_up=lambda: services.answers(jobs_port), env=env):
        yield f"http://127.0.0.1:{jobs_port}", access, workspace


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A working tree: a job whose data lies beside it, and results that should stay at home."""
    shutil.copy(tiny.data_file(), tmp_path / "sums.jsonl")
    job = commands.job_file(tmp_path, {"rounds.num_rounds": 2})
    values = yaml.safe_load(job.read_text())
    values["data"]["dataset"] = "sums.jsonl"
    job.write_text(yaml.safe_dump(values))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "large").write_bytes(os.urandom(2**20))
    return tmp_path


def submit(project: Path, address: str, access: Access, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fleetune", "submit", "job.yaml", "--address", address, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    env = {**os.environ, **access, **variables}
    return subprocess.Popen(command, cwd=project, env=env, text=True, start_new_session=True, **pipes)


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_on_the_cluster_and_its_end_is_ours(cluster: tuple[str, Access, Path], project: Path):
    """Status 0 with the run's own document, 2 for a mistake that only the cluster sees, 1 for a run that fails there."""
    address, access, workspace = cluster
    well = submit(project, address, access, "--json")
    mistaken = submit(project, address, access, "--set", "model.base=./nowhere")
    out = commands.finish(well)
    assert out.status == 0, out.stderr
    assert "round 2/2" in out.stderr
    document = out.document
    assert (document["status"], document["exit_status"], document["result"]["status"]) == ("succeeded", 0, "finished")
    assert Path(document["result"]["run_dir"]).parent == workspace / "runs"
    out = commands.finish(mistaken)
    assert out.status == 2, out.stderr
    assert "model.base='./nowhere'" in out.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_job_that_is_left_goes_on_until_it_is_stopped(cluster: tuple[str, Access, Path], project: Path):
    """Ctrl-C leaves the job running; one that somebody stops has failed. Two submissions that are not let in, meanwhile."""
    address, access, _ = cluster
    endless = ("--set", "rounds.num_rounds=5000", "--set", "execution.hosts=1", "--json")
    left = submit(project, address, access, *endless)
    followed = submit(project, address, access, *endless)
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

    for process in (left, followed):
        assert process.stderr is not None
        while not (line := process.stderr.readline()).startswith("round 2/"):
            assert line, "it ended before its second round"
    left.send_signal(signal.SIGINT)
    out = commands.finish(left)
    assert (out.status, out.document["status"]) == (130, "detached")
    assert f"ray job stop --address {address} {out.document['job_id']}" in out.stderr
    running = {job["submission_id"]: job["status"] for job in ask(address, access, "GET", "/api/jobs/")}
    assert running[out.document["job_id"]] == "RUNNING"

    ask(address, access, "POST", f"/api/jobs/{out.document['job_id']}/stop")
    (other,) = (name for name, status in running.items() if status == "RUNNING" and name != out.document["job_id"])
    ask(address, access, "POST", f"/api/jobs/{other}/stop")
    out = commands.finish(followed)
    assert out.status == 1
    assert other in out.document["reason"]


def ask(address: str, access: Access, method: str, path: str) -> Any:
    """Ray's job server, without Ray."""
    headers = {"Authorization": f"Bearer {access['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers, method=method)) as answer:
        return json.load(answer)
