"""Launching: whose cluster is joined, what is left behind, and who may run a directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from fleetune.engine.checkpoint.checkpoint import saved_rounds
from fleetune.engine.launch import run as launch
from fleetune.engine.launch.cluster import connect, names_ray
from fleetune.errors import UserError
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec
from support import commands, tiny

PATIENCE_SECONDS = 60
"""For what takes a moment on a quiet machine. How long it takes on another is no test's claim."""


@pytest.mark.parametrize("address", ["127.0.0.1:x", "127.0.0.1:99999", "127.0.0.1:"])
def test_an_address_that_is_none_is_told_at_once(address: str):
    with pytest.raises(OSError, match="is no port"):
        connect(address)


@pytest.mark.parametrize(
    ("text", "assignments", "says_so"),
    [
        ("execution: {kind: ray}", [], True),
        ("execution: {kind: ray}", ["execution.kind=serial"], False),
        ("name: x", ["execution.kind=serial", "execution.kind=ray"], True),
        ("execution: auto", [], False),
        ("fleet: {kind: ray}", [], False),
        ("[[[[", [], False),
        (None, [], False),
    ],
)
def test_a_job_that_names_ray_is_known_before_it_is_loaded(
    tmp_path: Path, text: str | None, assignments: list[str], says_so: bool
):
    """Ray is begun for those, while the rest is imported; what is wrong with a job is not told here."""
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    assert names_ray(path, assignments) is says_so


# -- who may run a directory ----------------------------------------------------------------------------------------------
def test_a_run_that_goes_on_elsewhere_is_not_resumed(tmp_path: Path):
    spec = tiny.spec({**commands.QUICK, "rounds.num_rounds": 1})
    result = launch.run(spec, workspace=tmp_path)
    (result.run_dir / "result.json").unlink()
    with (result.run_dir / "checkpoint" / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is running it"):
            launch.resume(result.run_dir)
    assert launch.resume(result.run_dir).metrics == result.metrics


def test_the_hash_is_that_of_what_decides_results():
    spec = tiny.spec()
    same = {"name": "other", "tracking.enabled": True, "execution.kind": "ray", "execution.workers": 1}
    same |= {"execution.workers_per_gpu": 2}
    other = {"seed": 1, "execution.cohort": 1, "execution.threads": 2, "rounds.num_rounds": 4, "local.steps": 1}
    other |= {"execution.device": "cuda", "execution.precision": "bf16"}
    assert all(tiny.spec({path: value}).spec_hash == spec.spec_hash for path, value in same.items())
    assert len({tiny.spec({path: value}).spec_hash for path, value in other.items()} | {spec.spec_hash}) == 8


# -- clusters ---------------------------------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def cluster(folder: Path, variables: dict[str, str]) -> Iterator[str]:
    """A cluster of somebody else on this machine: two cores, no dashboard. Yields its address."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"),
            *(f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", f"--object-store-memory={200 * 2**20}"),
        ],
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert process.poll() is None, "ray start ended"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)  # what Ctrl-C in its terminal does: it ends its own processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


TOKENS_SHOWN = """
import os
from ray._raylet import AuthenticationTokenLoader, Config
from fleetune.engine.launch import cluster
Config.initialize("")
shown = AuthenticationTokenLoader.instance().get_token_for_http_header
before = shown()["authorization"]
del os.environ["RAY_AUTH_TOKEN"]
with cluster._on_loopback():
    after = shown()["authorization"]
assert after == "Bearer " + os.environ["RAY_AUTH_TOKEN"] != before
"""


def test_a_process_that_has_used_another_cluster_shows_its_own_one_s_token():
    """Ray keeps the token that a process read first, and its own cluster would not let it in."""
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    done = subprocess.run(
        [sys.executable, "-c", TOKENS_SHOWN], env={**os.environ, **access}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def same_records(one: Path, other: Path) -> None:
    a, b = (RunDirectory.open(path) for path in (one, other))
    for rows, other_rows in ((a.rounds(), b.rounds()), (a.clients(), b.clients())):
        differing = ["run_id", "wall_seconds"]
        pd.testing.assert_frame_equal(
            rows.drop(columns=differing), other_rows.drop(columns=differing), check_exact=True
        )


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_joins_a_cluster_only_where_it_is_told_to(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path):
    """The same job on a running cluster, at the same time on a Ray of its own, and serially: three times the same records.

    Its own Ray listens on this machine alone, and asks for a token that no file holds.
    """
    job = commands.job_file(tmp_path, {"execution.workers": 1, "execution.kind": "ray"})
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}  # its own, whatever this machine has
    with cluster(tmp_path_factory.mktemp("r"), access) as address:
        joining = commands.start("run", job, "-w", tmp_path / "joined", "--json", "--address", address, **access)
        # Without --address, Ray would join the cluster that runs here, whoever's it is.
        home = tmp_path / "home"
        home.mkdir()
        process = commands.start("run", job, "-w", tmp_path, "--json", HOME=str(home))
        seen: set[tuple[str, str]] = set()
        modes: set[tuple[str | None, int]] = set()
        while process.poll() is None:
            for one in in_session(process.pid):
                with contextlib.suppress(psutil.Error):
                    seen |= {
                        (one.name(), c.laddr.ip) for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN
                    }
                    if one.name() == "gcs_server":
                        modes.add((one.environ().get("RAY_AUTH_MODE"), len(one.environ().get("RAY_AUTH_TOKEN", ""))))
            time.sleep(0.3)  # looking at every process of the machine takes time from those that are looked at
        joined = commands.finish(joining)
        assert joined.status == 0, joined.stderr
        assert joined.document["status"] == "finished"
        beside = commands.finish(process)
        assert beside.status == 0, beside.stderr
        assert {"gcs_server", "raylet"} <= {name for name, _ in seen}
        assert {ip for _, ip in seen} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        assert modes == {("token", 64)}
        assert not (home / ".ray" / "auth_token").exists()
    serial = launch.run(quiet(job), workspace=tmp_path)
    for document in (joined.document, beside.document):
        same_records(Path(document["run_dir"]), serial.run_dir)


def quiet(job: Path) -> RunSpec:
    from fleetune.spec import load

    return load(job, {"execution.kind": "serial"})


@pytest.mark.ray
@pytest.mark.slow
def test_a_mistake_that_shows_while_ray_starts_leaves_no_process_behind(tmp_path: Path):
    """The model is looked for while Ray starts beside it."""
    job = commands.job_file(tmp_path, {"execution.kind": "ray"})
    process = commands.start("run", job, "-w", tmp_path, "--json", "--set", "model.base=./nowhere")
    out = commands.finish(process)
    assert (out.status, out.document["field"]) == (2, "model.base")
    assert not (tmp_path / "runs").exists()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := in_session(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, [one.cmdline() for one in left]


@pytest.mark.ray
@pytest.mark.slow
def test_three_signals_end_a_run_on_ray_in_one_sentence_and_leave_no_process(tmp_path: Path):
    """SIGTERM, then Ctrl-C twice, within 0.3 s: what was done is on record, and how to go on is said once."""
    overrides = {"rounds.num_rounds": 3000, "evaluation.every": 3000, "execution.kind": "ray", "execution.workers": 1}
    process = commands.start("run", commands.job_file(tmp_path, overrides, method="fedsa-lora"), "-w", tmp_path)
    deadline = time.monotonic() + 150
    while len(list(tmp_path.glob("runs/*/checkpoint/records/round_*.arrow"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        process.send_signal(number)
        time.sleep(0.1)
    out = commands.finish(process)
    left = max(0.0, began + PATIENCE_SECONDS - time.monotonic())
    assert not psutil.wait_procs(family, timeout=left)[1]
    (run_path,) = (tmp_path / "runs").iterdir()
    assert out.status == 130
    assert out.stderr.splitlines()[-1] == f"fleetune: stopped; go on with fleetune resume {run_path}"
    told = max(int(line.split("/")[0].removeprefix("round ")) for line in out.stderr.splitlines() if "/3000 ·" in line)
    assert saved_rounds(run_path / "checkpoint") >= told


def in_session(session_id: int) -> list[psutil.Process]:
    """Processes that a command started, whatever group they are in: all are in its session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


# -- what is costed -----------------------------------------------------------------------------------------------------
def test_both_models_are_on_record_and_what_stands_for_a_missing_rate_is_said(tmp_path: Path):
    """The tiny model is trained, llama2-7b costed: 32 blocks, rank 2 on all linears, 32 x 2 x (8 x 4096 + 3 x (4096 + 11008))
    elements, 5,029,888 in fp32 each way."""
    said: list[str] = []
    spec = tiny.spec(
        {"cost.model": "llama2-7b", "cost.precision": "bf16", "fleet.devices": {"server-a100": 0.5, "jetson-nano": 0.5}}
    )
    done = launch.run(spec, workspace=tmp_path, debug=True, warn=said.append)
    run_dir = RunDirectory.open(done.run_dir)
    assert run_dir.meta["model"] == {"trained": spec.model.base, "costed": "llama2-7b"}
    assert run_dir.spec["model"]["base"] == spec.model.base
    assert run_dir.spec["cost"]["model"] == "llama2-7b"
    clients = run_dir.clients()
    assert set(clients.loc[clients["status"] == "ok", "uplink_bytes"]) == {4 * 32 * 2 * (8 * 4096 + 3 * (4096 + 11008))}
    assert said == ["no bf16 on jetson-nano: the fp16 rate stands for it"]
