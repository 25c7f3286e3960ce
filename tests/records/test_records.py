"""The run directory: what is appended is read back, after any crash, and costs little."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fleetune import columns as schema
from fleetune.errors import UserError
from fleetune.records import RunDirectory, SweepDirectory, find_runs
from fleetune.records.naming import filled_fields, group_labels, run_name, varied_fields
from fleetune.records.run_directory import FORMAT
from fleetune.records.timeline import write_timeline
from fleetune.sweep.existing_runs import _finished_runs as finished_runs
from support import REPOSITORY
from support.synthetic_runs import make_run, make_spec, rounds_of


def test_two_clients_two_rounds(tmp_path: Path):
    """Client 1 needs 5 bytes of its 4 and is refused, so round 1's largest peak is client 0's 3."""
    run = RunDirectory.create(tmp_path, "a", {"seed": 0})
    peaks = {"client_id": [0, 1], "status": ["ok", "oom"], "peak_memory_bytes": [3, 5], "budget_bytes": 4}
    run.append_round({"round": 1, "train_loss": 0.1 + 0.2, "depth": np.int64(4)}, peaks)
    run.append_round({"round": 2, "train_loss": None, "depth": 8}, {"client_id": np.array([1]), "status": "oom"})
    rounds, clients = run.rounds(), run.clients()
    assert rounds["round"].tolist() == [1, 2]
    assert rounds["train_loss"][0] == 0.1 + 0.2
    assert math.isnan(rounds["train_loss"][1])
    assert rounds["peak_memory_bytes_max"][0] == 3
    assert math.isnan(rounds["peak_memory_bytes_max"][1])
    assert rounds["depth"].tolist() == [4, 8]
    assert clients["client_id"].tolist() == [0, 1, 1]
    assert clients["round"].tolist() == [1, 1, 2]
    assert clients["budget_bytes"][:2].tolist() == [4, 4]
    assert clients["run_id"].unique().tolist() == ["a"]
    assert clients["uplink_bytes"].isna().all()
    assert list(clients.columns) == [c.name for c in schema.CLIENT_COLUMNS]


def test_counts_that_came_as_floats_stay_whole(tmp_path: Path):
    """3.2 bytes of memory are 3, NaN is "none", and a peak beyond 2^31 keeps every digit."""
    run = RunDirectory.create(tmp_path, "a", {})
    columns = {"peak_memory_bytes": np.array([3.2, np.nan]), "activation_bytes": [2**40 + 1, 0]}
    columns |= {"flops": [1e17, None]}
    run.append_round({"round": 1}, columns)
    clients = run.clients()
    assert clients["peak_memory_bytes"][0] == 3.0
    assert math.isnan(clients["peak_memory_bytes"][1])
    assert clients["activation_bytes"].tolist() == [2**40 + 1, 0]
    assert math.isnan(clients["flops"][1])


def test_consolidate_changes_nothing_that_is_read(tmp_path: Path):
    run = make_run(tmp_path, "a", finish=False)
    rounds, clients, rows = run.rounds(), run.clients(), run.round_rows()
    run.consolidate()
    pd.testing.assert_frame_equal(run.rounds(), rounds)
    pd.testing.assert_frame_equal(run.clients(), clients)
    assert [at for _, at in run.round_rows()] == [at for _, at in rows]
    assert not list((run.path / "checkpoint" / "records").iterdir())
    assert pd.read_parquet(run.path / "clients.parquet").shape == clients.shape
    assert [row["round"] for row, _ in run.round_rows(first_round=11)] == [11, 12]


def test_truncate_and_go_on_equals_uninterrupted(tmp_path: Path):
    """12 rounds at once, or 9 of which 4 are in Parquet, cut back to 3 and 7, and gone on with: the same
    records.
    """
    spec = make_spec()
    whole = make_run(tmp_path, "whole", spec=spec, finish=False)
    cut = RunDirectory.create(tmp_path, "cut", spec)
    rounds = list(rounds_of(spec))
    for row, clients in rounds[:4]:
        cut.append_round(row, clients)
    cut.consolidate()
    for row, clients in rounds[4:9]:
        cut.append_round(row, clients)
    cut.write_result({"status": "failed"})
    for num_kept, first, last in ((7, 7, 9), (3, 3, 12)):
        cut.truncate(num_kept)
        assert cut.rounds()["round"].tolist() == list(range(1, num_kept + 1))
        assert cut.result() is None
        for row, clients in rounds[first:last]:
            cut.append_round(row, clients)
    for mine, expected in ((cut.rounds(), whole.rounds()), (cut.clients(), whole.clients())):
        pd.testing.assert_frame_equal(mine.drop(columns="run_id"), expected.drop(columns="run_id"))


def test_a_round_that_is_in_both_places_counts_once(tmp_path: Path):
    """Killed in the middle of consolidate: the Parquet file is written, the parts are still there."""
    run = make_run(tmp_path, "a", finish=False)
    rounds, clients = run.rounds(), run.clients()
    parts = {path: path.read_bytes() for path in (run.path / "checkpoint" / "records").iterdir()}
    run.consolidate()
    for path, content in parts.items():
        path.write_bytes(content)
    pd.testing.assert_frame_equal(run.rounds(), rounds)
    pd.testing.assert_frame_equal(run.clients(), clients)
    (run.path / "rounds.parquet").unlink()  # ... or only clients.parquet had been written
    pd.testing.assert_frame_equal(run.rounds(), rounds)


WRITER = """
import sys
from fleetune.records import RunDirectory
run = RunDirectory.open(sys.argv[1])
for number in range(1, 100_000):
    run.append_round({"round": number}, {"client_id": list(range(50)), "flops": [float(number)] * 50})
    if number % 7 == 0:
        run.consolidate()
"""


def test_killed_at_any_moment_leaves_whole_rounds(tmp_path: Path):
    """kill -9 while a process appends and consolidates: rounds that are there are whole, none is missing."""
    for i, delay in enumerate((0.05, 0.2, 0.33)):
        run = RunDirectory.create(tmp_path, f"run{i}", {})
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(run.path)])
        started = time.monotonic()
        while len(run.rounds()) < 3:
            assert time.monotonic() - started < 60
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        rounds, clients = run.rounds()["round"], run.clients()
        assert rounds.tolist() == list(range(1, len(rounds) + 1))
        assert clients.groupby("round").size().tolist() == [50] * len(rounds)
        assert (clients["flops"] == clients["round"]).all()
        run.truncate(len(rounds))
        assert not list(run.path.rglob("records/*.tmp"))


def test_append_costs_little(tmp_path: Path):
    """1,000 clients are written as columns: nowhere near a hundred times as long as 10 (measured: 2.7 ms on one core)."""

    def seconds(num_clients: int) -> float:
        spec = make_spec(num_clients=num_clients, num_rounds=20)
        run = RunDirectory.create(tmp_path, f"of{num_clients}", spec)
        taken = []
        for row, clients in rounds_of(spec):
            started = time.process_time()
            run.append_round(row, clients)
            taken.append(time.process_time() - started)
        return min(taken)

    assert seconds(1000) < 20 * seconds(10)


def test_no_run_directory(tmp_path: Path):
    with pytest.raises(UserError, match="no run directory"):
        RunDirectory.open(tmp_path)
    with pytest.raises(UserError, match="no run in this directory"):
        find_runs([tmp_path])
    RunDirectory.create(tmp_path, "a", {})
    with pytest.raises(UserError, match="already holds a run"):
        RunDirectory.create(tmp_path, "a", {})


def test_a_directory_that_numbers_rounds_otherwise_is_refused(tmp_path: Path):
    """One of an earlier version does not say its format; one of a later version may."""
    run = make_run(tmp_path, "a")
    meta = {name: value for name, value in run.meta.items() if name != "format"}
    for found, maker in (
        ({}, "an earlier version of fleetune, which numbered rounds from 0,"),
        ({"format": 3}, "a later version"),
    ):
        run._write_json("checkpoint/meta.json", {**meta, **found})
        for read in (RunDirectory.open, lambda path: find_runs([path]), lambda _: find_runs([tmp_path])):
            with pytest.raises(UserError, match=maker):
                read(run.path)
    assert finished_runs(tmp_path) == {}
    run._write_json("checkpoint/meta.json", {**meta, "format": FORMAT})
    assert [one.path for one in finished_runs(tmp_path)["ab12cd"]] == [run.path]


def test_spec_meta_and_result_come_back(tmp_path: Path):
    spec = make_spec(growth_rate=2)
    run = RunDirectory.create(tmp_path, "a", spec, meta={"git_commit": "abc"})
    run.update_meta(sweep="growth")
    run.write_result({"status": "finished", "metrics": {"eval_accuracy": np.float32(0.5)}})
    again = RunDirectory.open(run.path)
    assert again.spec == spec
    assert (again.run_id, again.meta["git_commit"], again.meta["sweep"]) == ("a", "abc", "growth")
    assert again.workspace == tmp_path
    assert again.result() == {"status": "finished", "metrics": {"eval_accuracy": 0.5}}


def make_sweep(workspace: Path, values: dict[int, int | float | str]) -> SweepDirectory:
    """A sweep with a trial for each growth rate, the first of which has not started."""
    spec = {"name": "growth", "grid": {"method.growth_rate": list(values.values())}}
    sweep = SweepDirectory.create(workspace, "growth-1", spec, directory=workspace / "sweeps")
    rows: list[dict[str, Any]] = []
    for number, value in values.items():
        rows.append({"trial": number, "status": "missing", "overrides": {"method.growth_rate": value}})
        if number > 0:
            run = RunDirectory.create(workspace, f"t{number}", make_spec(seed=number))
            rows[-1] |= {"status": "running", "run_id": run.run_id, "run_dir": run.path, "eval_loss": 0.5 * number}
    sweep.write_trials(rows)
    return sweep


def test_find_runs(tmp_path: Path):
    """A workspace, a sweep whose trials are among its runs, and a run itself."""
    sweep = make_sweep(tmp_path, {0: 2, 1: 4, 2: 8})
    other = RunDirectory.create(tmp_path, "z", make_spec())
    assert [run.run_id for run in find_runs([sweep.path])] == ["t1", "t2"]
    assert [run.run_id for run in find_runs([tmp_path, sweep.path])] == ["t1", "t2", "z"]
    assert [run.path for run in find_runs([other.path])] == [other.path]


def test_a_sweep_s_table_comes_back(tmp_path: Path):
    """Swept fields are columns of their own type; what a trial has not got is null; a workspace can be moved."""
    sweep = make_sweep(tmp_path / "here", {0: 2, 1: 4})
    (tmp_path / "here").rename(tmp_path / "there")
    moved = SweepDirectory.open(tmp_path / "there" / "sweeps" / sweep.path.name)
    table = moved.trials()
    assert [column.name for column in schema.TRIAL_COLUMNS] + ["set.method.growth_rate"] == list(table.columns)
    assert table["set.method.growth_rate"].tolist() == [2, 4]
    assert table["status"].tolist() == ["missing", "running"]
    assert pd.isna(table["eval_loss"][0])
    assert table["eval_loss"][1] == 0.5
    assert table["run_dir"][1] == str(tmp_path / "there" / "runs" / "t1")
    assert [run.path for run in moved.runs()] == [tmp_path / "there" / "runs" / "t1"]
    assert moved.spec["grid"] == {"method.growth_rate": [2, 4]}


def test_values_of_several_kinds_share_a_column(tmp_path: Path):
    """Whole numbers beside fractions are numbers; beside words all are text."""
    numbers = make_sweep(tmp_path / "a", {0: 1, 1: 0.5}).trials()["set.method.growth_rate"]
    assert numbers.tolist() == [1.0, 0.5]
    words = make_sweep(tmp_path / "b", {0: 1, 1: "auto"}).trials()["set.method.growth_rate"]
    assert words.tolist() == ["1", "auto"]


def test_a_spreadsheet_finds_no_formula_in_the_csv(tmp_path: Path):
    """Texts that begin like one are quoted, wherever they stand; negative numbers are left alone."""
    starts = ["=1+2", "+1", "-x", "@a", "\ta", "\ra", "plain", "a=b"]
    sweep = make_sweep(tmp_path, dict(enumerate(starts)))
    sweep.write_csv()
    with (sweep.path / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["set.method.growth_rate"] for row in rows] == [f"'{text}" for text in starts[:6]] + starts[6:]
    assert [row["eval_loss"] for row in rows[1:3]] == ["0.5", "1.0"]
    numbers = make_sweep(tmp_path / "n", {0: -2, 1: -1})
    numbers.write_csv()
    assert "'-" not in (numbers.path / "trials.csv").read_text()


def test_no_sweep_directory(tmp_path: Path):
    with pytest.raises(UserError, match="no sweep directory"):
        SweepDirectory.open(tmp_path)
    empty = SweepDirectory.create(tmp_path, "s", {"name": "s"})
    assert empty.runs() == []
    with pytest.raises(UserError, match="no trials yet"):
        empty.trials()


def test_names_say_what_tells_runs_apart(tmp_path: Path):
    specs = [make_spec(seed=seed, growth_rate=rate, num_rounds=3) for rate in (2, 4) for seed in (0, 1)]
    runs = [make_run(tmp_path, f"run{i}", spec=spec) for i, spec in enumerate(specs)]
    assert run_name(runs[0]) == "devft · r8 · 20 clients · seed 0"
    assert {label: len(members) for label, members in group_labels(runs).items()} == {
        "devft · r8 · 20 clients · growth_rate 2": 2,
        "devft · r8 · 20 clients · growth_rate 4": 2,
    }
    assert varied_fields(runs) == {"method.growth_rate": [2, 2, 4, 4]}
    runs[0].update_meta(overrides={"method.growth_rate": 2, "seed": 0})
    assert run_name(runs[0]) == "devft · growth_rate 2 · seed 0"
    assert filled_fields({"a": {"b": 1, "c": None}, "d": {}}) == {"a.b": 1}


def test_trace_lays_the_phases_end_to_end(tmp_path: Path):
    """Round 1 refuses client 3 for 10 s. Round 2 begins after 2 s of waiting: 1 s receiving, 2 computing, 3 sending, 4 idle."""
    run = RunDirectory.create(tmp_path, "a", {})
    columns = {"client_id": [3], "device": "nano", "status": "ok"}
    phases = {"downlink_seconds": 1.0, "compute_seconds": 2.0, "uplink_seconds": 3.0, "sim_seconds": 6.0}
    refused = {"status": "oom", "refused_by": "memory", "refused_hint": "batch size 4"}
    run.append_round({"round": 1, "stage": 0, "sim_seconds": 10.0}, columns | refused)
    run.append_round({"round": 2, "stage": 0, "sim_seconds": 22.0, "waited_seconds": 2.0}, columns | phases)
    events = json.loads(write_timeline(run).read_text())["traceEvents"]
    slices = {(e["pid"], e["tid"], e["name"]): (e["ts"] / 1e6, e["dur"] / 1e6) for e in events if e["ph"] == "X"}
    assert slices == {
        (1, 0, "round 1"): (0, 10), (1, 0, "round 2"): (12, 10), (1, 1, "stage 0"): (0, 22),
        (1, 2, "nobody available"): (10, 2), (2, 3, "refused"): (0, 10), (2, 3, "downlink"): (12, 1),
        (2, 3, "compute"): (13, 2), (2, 3, "uplink"): (15, 3), (2, 3, "idle"): (18, 4),
    }  # fmt: skip
    assert [e["ts"] / 1e6 for e in events if e["name"] == "aggregate"] == [10, 22]
    assert [e["args"] for e in events if e["name"] == "refused"] == [
        {"round": 1, "by": "memory", "would fit": "batch size 4"}
    ]
    named = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert named == {"server", "rounds", "stages", "nano", "client 3"}


def test_a_split_models_turn_has_the_servers_part_in_it(tmp_path: Path):
    """1 s down, 2 s of its own, 3 s of the server's, 1 s up; the slower client is cut at the close after 6 s."""
    run = RunDirectory.create(tmp_path, "a", {})
    columns = {"client_id": [0, 1], "device": "nano", "status": ["ok", "late"], "sim_seconds": [5.0, 7.0]}
    columns |= {"downlink_seconds": 1.0, "compute_seconds": 2.0, "server_seconds": [1.0, 3.0], "uplink_seconds": 1.0}
    run.append_round({"round": 1, "sim_seconds": 6.0}, columns)
    events = json.loads(write_timeline(run).read_text())["traceEvents"]
    lanes = {tid: [(e["name"], e["dur"] / 1e6) for e in events if e["ph"] == "X" and e["pid"] == 2 and e["tid"] == tid]
             for tid in (0, 1)}  # fmt: skip
    assert lanes[0] == [("downlink", 1), ("compute", 2), ("server", 1), ("uplink", 1), ("idle", 1)]
    assert lanes[1] == [("downlink", 1), ("compute", 2), ("server", 3)]
    half = next(e for e in events if e["name"] == "its half")
    assert (half["ts"], half["dur"], half["args"]) == (1e6, 3e6, {"seconds of all clients": 4.0})


def test_trace_holds_what_the_format_asks_for(tmp_path: Path):
    """Every event has its fields, they are in order of time, no two slices of a lane overlap, and turns fill their rounds."""
    run = make_run(tmp_path, "a")
    events = json.loads(write_timeline(run).read_text())["traceEvents"]
    timed = [e for e in events if e["ph"] != "M"]
    assert {e["ph"] for e in events} == {"M", "X", "C", "i"}
    assert all(isinstance(e[key], int) for e in events for key in ("pid",))
    assert [e["ts"] for e in timed] == sorted(e["ts"] for e in timed)
    lanes: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in timed:
        if event["ph"] == "X":
            lanes.setdefault((event["pid"], event["tid"]), []).append(event)
    for lane in lanes.values():
        for before, after in itertools.pairwise(lane):
            assert after["ts"] >= before["ts"] + before["dur"] - 1e-3
    rounds = {e["name"]: e["dur"] for e in lanes[1, 0]}
    for (pid, _), lane in lanes.items():
        filled: dict[int, float] = {}
        for event in lane if pid > 1 else ():
            filled[event["args"]["round"]] = filled.get(event["args"]["round"], 0.0) + event["dur"]
        assert filled == pytest.approx({i: rounds[f"round {i}"] for i in filled})


def test_trace_samples_clients_of_a_large_run(tmp_path: Path):
    """12 rounds x 20 clients x 4 slices = 960 events; with room for 480, half of the clients stay whole."""
    run = make_run(tmp_path, "a")
    trace = json.loads(write_timeline(run, max_events=480).read_text())
    assert trace["otherData"]["clients"] == "10 of 20, evenly chosen by id"
    assert len({e["tid"] for e in trace["traceEvents"] if e["pid"] > 1 and e["name"] != "process_name"}) == 10


def test_the_documented_columns_are_the_columns():
    text = (REPOSITORY / "docs" / "reference" / "records.md").read_text()
    assert schema.markdown_table(schema.CLIENT_COLUMNS) in text
    assert schema.markdown_table(schema.PERSONAL_COLUMNS) in text
    assert schema.markdown_table(schema.ROUND_COLUMNS) in text
    assert schema.markdown_table(schema.TRIAL_COLUMNS) in text
