"""The command line: exit status, what goes to stdout and what to stderr, and the JSON document at the end."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import yaml

from fleetune.cli.catalogue import CATALOGUES
from fleetune.cli.entry import exit_status
from fleetune.cli.stopping import stop_once
from fleetune.engine.launch import backends
from fleetune.engine.pending_rounds import FinishedRound, PendingRounds
from fleetune.methods import METHODS
from fleetune.records.run_directory import RunDirectory
from support import commands, runs, tiny
from support.commands import Output

Command = Callable[..., Output]


@pytest.fixture
def fleetune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A command of this process: ``fleetune("run", job)``."""
    return lambda *arguments: commands.fleetune(capfd, monkeypatch, *arguments)


def records(run_path: Path) -> list[pd.DataFrame]:
    run_dir = RunDirectory.open(run_path)
    return [table.drop(columns=["run_id", "wall_seconds"]) for table in (run_dir.rounds(), run_dir.clients())]


def test_run_prints_one_json_document_and_tells_its_rounds_on_stderr(fleetune: Command, tmp_path: Path):
    out = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path / "ws", "--json")
    assert out.status == 0
    document = out.document
    assert list(document) == ["run_id", "run_dir", "status", "metrics", "totals"]
    assert document["status"] == "finished"
    assert Path(document["run_dir"]) == tmp_path / "ws" / "runs" / document["run_id"]
    assert document["metrics"]["eval_loss"] < document["metrics"]["baseline_eval_loss"]
    assert document["totals"]["num_rounds"] == 3
    lines = out.stderr.splitlines()
    assert lines[0].startswith("tiny: 3 rounds in this process on cpu, cohorts of 1, untrained loss 6.")
    assert [line.partition(" · ")[0] for line in lines[1:]] == ["round 1/3", "round 2/3", "round 3/3"]
    assert "loss 6." in lines[1]
    assert "sim " in lines[1]


def test_run_without_json_says_what_came_out_and_what_to_do_next(fleetune: Command, tmp_path: Path):
    out = fleetune("run", commands.job_file(tmp_path, {"evaluation.generate": True}), "-w", tmp_path)
    assert out.status == 0
    assert [line.split()[0] for line in out.stdout.splitlines()] == [
        "accuracy",
        "eval",
        "virtual",
        "links",
        "run",
        "next",
    ]
    (run_path,) = (tmp_path / "runs").iterdir()
    assert str(run_path) in out.stdout


def test_set_overrides_fields_and_another_method_starts_from_its_defaults(fleetune: Command, tmp_path: Path):
    job = commands.job_file(tmp_path, {"method.mu": 0.5}, method="fedprox")
    sets = ["--set", "rounds.num_rounds=1", "-s", "method.name=split-lora", "-s", "method.split_point=1"]
    out = fleetune("run", job, "-w", tmp_path, "--json", *sets)
    assert out.status == 0, out.stderr
    spec = yaml.safe_load((Path(out.document["run_dir"]) / "spec.yaml").read_text())
    own = {
        "server": "concatenated",
        "pipelined": False,
        "aggregate_every": 1,
        "cut_precision": "same",
        "head": "server",
    }
    assert spec["method"] == {"name": "split-lora", "split_point": 1, **own}
    assert spec["rounds"]["num_rounds"] == out.document["totals"]["num_rounds"] == 1


def test_the_workspace_can_come_from_the_environment(
    fleetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FLEETUNE_WORKSPACE", str(tmp_path / "elsewhere"))
    out = fleetune("run", commands.job_file(tmp_path, {"rounds.num_rounds": 1}), "--json")
    assert Path(out.document["run_dir"]).parent == tmp_path / "elsewhere" / "runs"


def test_two_runs_of_a_job_have_directories_of_their_own(fleetune: Command, tmp_path: Path):
    job = commands.job_file(tmp_path, {"rounds.num_rounds": 1})
    both = [fleetune("run", job, "-w", tmp_path, "--json").document for _ in range(2)]
    assert both[0]["run_dir"] != both[1]["run_dir"]
    assert both[0]["metrics"] == both[1]["metrics"]


def test_resuming_a_finished_run_tells_its_result_and_changes_nothing(fleetune: Command, tmp_path: Path):
    first = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path, "--json").document
    files = {p: p.stat().st_mtime_ns for p in Path(first["run_dir"]).rglob("*") if p.is_file()}
    out = fleetune("resume", first["run_dir"], "--json")
    assert out.status == 0
    assert out.document == first
    assert {p: p.stat().st_mtime_ns for p in Path(first["run_dir"]).rglob("*") if p.is_file()} == files


def test_report_writes_a_page(fleetune: Command, tmp_path: Path):
    run_path = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path, "--json").document["run_dir"]
    out = fleetune("report", run_path, "--out", tmp_path / "report", "--json")
    assert out.status == 0, out.stderr
    page = Path(out.document["report"])
    assert page.is_relative_to(tmp_path / "report")
    assert "<html" in page.read_text().lower()


@pytest.mark.parametrize("kind", CATALOGUES)
def test_list_shows_every_kind(fleetune: Command, kind: str):
    rows = fleetune("list", kind, "--json").document
    table = fleetune("list", kind)
    assert table.status == 0
    assert len(rows) >= 1
    assert all(list(row) == list(rows[0]) for row in rows)
    for row in rows:
        assert row["name"] in table.stdout


def test_list_methods_names_them_all(fleetune: Command):
    assert [row["name"] for row in fleetune("list", "methods", "--json").document] == list(METHODS)


def test_the_schema_is_one_that_knows_every_field(fleetune: Command):
    schema = json.loads(fleetune("schema").stdout)
    assert set(schema["properties"]) == set(tiny.spec().to_dict())


def test_the_schema_of_sweep_files_knows_every_kind_of_claim(fleetune: Command):
    schema = json.loads(fleetune("schema", "--sweep").stdout)
    assert {"base", "grid", "seeds", "claims"} <= set(schema["properties"])
    kinds = {kind["$ref"].rpartition("/")[2] for kind in schema["properties"]["claims"]["items"]["anyOf"]}
    assert kinds == {"Better", "Falls", "Rises", "Peak", "Ratio"}
    assert {"better", "than", "in", "until", "for", "source"} == set(schema["$defs"]["Better"]["properties"])


@pytest.mark.parametrize(
    "arguments", [["runn", "job.yaml"], ["run"], ["run", "job.yaml", "--sett", "a=1"], ["resume"], ["run", "a", "b"]]
)
def test_a_command_that_does_not_parse_ends_with_status_2(fleetune: Command, arguments: list[str]):
    out = fleetune(*arguments)
    assert out.status == 2
    assert out.stdout == ""
    assert "Usage: " in out.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["list", "-h"]])
def test_help_is_no_error(fleetune: Command, arguments: list[str]):
    out = fleetune(*arguments)
    assert out.status == 0
    assert "Usage: " in out.stdout


def fail_in_round_2(monkeypatch: pytest.MonkeyPatch) -> int:
    """All examples of a client that works in round 2 but not in round 1 break its work; returns that client."""
    spec = tiny.spec(commands.QUICK)
    whole = runs.run(spec)
    first, second = (set(whole.clients["client_id"][whole.clients["round"] == r]) for r in (1, 2))
    victim = int(min(second - first))
    broken = commands.poisoned(whole.problem.inputs, whole.problem.partition.shard(victim))
    monkeypatch.setattr(backends, "load_inputs", lambda *args, **kwargs: broken)
    return victim


def test_a_failed_run_ends_with_status_1_and_says_where(
    fleetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    victim = fail_in_round_2(monkeypatch)
    out = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path, "--json")
    assert out.status == 1
    assert out.document["error"] == "failed"
    assert out.document["reason"].startswith(f"client {victim}, round 2, stage 0: IndexError")
    assert f"the run failed: client {victim}, round 2" in out.stderr
    assert "Traceback" not in out.stderr


def test_debug_gives_the_same_results_in_this_thread_and_lets_exceptions_through(
    fleetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The job says ray; with --debug it runs here, in one thread, and an error arrives where a debugger sees it."""
    job = commands.job_file(tmp_path)
    plain = fleetune("run", job, "-w", tmp_path, "--json").document
    seen: list[Any] = []
    run_work_unit = backends.SerialExecutor._run_one

    def spy(*args: Any) -> Any:
        seen.append((threading.current_thread() is threading.main_thread(), ray.is_initialized()))
        return run_work_unit(*args)

    with monkeypatch.context() as patch:
        patch.setattr(backends.SerialExecutor, "_run_one", spy)
        out = fleetune("run", job, "-w", tmp_path, "--debug", "--json", "--set", "execution.kind=ray")
    assert out.status == 0
    assert seen == [(True, False)] * 9
    for mine, theirs in zip(records(Path(out.document["run_dir"])), records(Path(plain["run_dir"])), strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)

    fail_in_round_2(monkeypatch)
    with pytest.raises(IndexError, match="index out of range"):
        fleetune("run", job, "-w", tmp_path, "--debug")


def test_ctrl_c_leaves_a_run_that_can_be_gone_on_with(
    fleetune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = commands.job_file(tmp_path)
    whole = fleetune("run", job, "-w", tmp_path / "whole", "--json").document
    with monkeypatch.context() as patch:
        patch.setattr(PendingRounds, "add", interrupted_in_round(2, PendingRounds.add))
        out = fleetune("run", job, "-w", tmp_path, "--json")
    assert out.status == 130
    assert out.document == {"error": "stopped"}
    (run_path,) = (tmp_path / "runs").iterdir()
    assert fleetune("resume", run_path, "--json").document["metrics"] == whole["metrics"]
    for mine, theirs in zip(records(run_path), records(Path(whole["run_dir"])), strict=True):
        pd.testing.assert_frame_equal(mine, theirs, check_exact=True)


def interrupted_in_round(number: int, add: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C after the round's work, before anything of it is recorded."""

    def interrupt(ledger: PendingRounds, finished: FinishedRound) -> None:
        if finished.row["round"] == number:
            raise KeyboardInterrupt
        add(ledger, finished)

    return interrupt


@pytest.mark.slow
def test_a_process_of_its_own_feeds_mlflow_and_prints_nothing_but_the_document(tmp_path: Path):
    job = commands.job_file(tmp_path, {"tracking.enabled": True})
    run = commands.finish(commands.start("run", job, "-w", tmp_path, "--json"))
    assert run.status == 0, run.stderr
    assert run.document["status"] == "finished"
    assert [line[:9] for line in run.stderr.splitlines() if line.startswith("round ")] == [
        "round 1/3",
        "round 2/3",
        "round 3/3",
    ]
    sent = commands.finish(commands.start("sync", run.document["run_dir"], "--json"))
    assert sent.status == 0, sent.stderr
    assert sent.document["uri"] == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert (sent.document["num_metrics"], sent.document["num_params"]) == (0, 0)  # all of it had arrived already


def test_sigterm_is_ctrl_c_and_what_comes_after_the_first_is_ignored():
    """Otherwise a second one would break off the ending, and leave Ray's processes behind."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt), stop_once():
            signal.raise_signal(signal.SIGTERM)
        for number in before:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_command_that_is_not_stopped_leaves_signals_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with stop_once():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_nothing_is_one_sentence_whoever_writes(number: int, capfd: pytest.CaptureFixture[str]):
    def command() -> None:
        raise OSError(number, os.strerror(number), "/x/report.html")

    assert exit_status(command) == 1
    assert capfd.readouterr().err == f"fleetune: /x/report.html cannot be written: {os.strerror(number)}\n"
