"""What a run's clients paid: refusals, whom rounds wait for, memory by part, and how a report shows them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fleetune.records import RunDirectory
from fleetune.reports.client_stats import adapted, bounds, memory_parts, phase_seconds, refusal_lines, refusals
from fleetune.reports.run_report import report
from support.synthetic_runs import make_run, make_spec


def turns(**columns: list[Any]) -> pd.DataFrame:
    """Rows of clients.parquet that hold only what a test looks at."""
    return pd.DataFrame(columns)


def test_refusals_are_counted_by_device_and_budget():
    """Three of four nano turns: two for memory (the smaller needs 7 of 5 bytes), one for time; of two orin turns none."""
    clients = turns(
        device=["nano"] * 4 + ["orin"] * 2,
        client_id=[0, 1, 0, 1, 2, 3],
        status=["oom", "oom", "refused", "ok", "ok", "late"],
        refused_by=["memory", "memory", "seconds", None, None, None],
        refused_hint=["batch size 4", "batch size 4", "nothing smaller", None, None, None],
        peak_memory_bytes=[9, 7, 4, 4, 4, 4],
        budget_bytes=[5] * 6,
    )
    rows = refusals(clients).to_dict("records")
    assert [(row["device"], row["refused_by"], row["num_turns"], row["share"]) for row in rows] == [
        ("nano", "memory", 2, 0.5),
        ("nano", "seconds", 1, 0.25),
    ]
    assert (rows[0]["need_bytes"], rows[0]["budget_bytes"], rows[0]["num_clients"]) == (7, 5, 2)
    assert np.isnan(rows[1]["need_bytes"])
    assert refusal_lines(clients) == [
        "nano: 2 turns (50%) for memory; would fit with batch size 4",
        "nano: 1 turns (25%) for seconds; no smaller share fits",
    ]


def test_a_round_waits_for_the_slowest_that_counts():
    """Round 1: client 1 computes longest; the late one and the refused one are not waited for. Round 2: client 0 sends."""
    clients = turns(
        round=[1, 1, 1, 1, 2, 2],
        client_id=[0, 1, 2, 3, 0, 1],
        device=["a", "b", "b", "a", "a", "b"],
        status=["ok", "dropped", "late", "oom", "ok", "ok"],
        sim_seconds=[4.0, 6.0, 9.0, 0.0, 5.0, 2.0],
        downlink_seconds=[1.0, 1.0, 1.0, 0.0, 1.0, 0.5],
        compute_seconds=[2.0, 3.0, 1.0, 0.0, 1.0, 1.0],
        server_seconds=[0.0, 2.0, 0.0, 0.0, 0.0, 0.0],
        uplink_seconds=[1.0, 0.0, 7.0, 0.0, 3.0, 0.5],
    )
    slowest = bounds(clients)
    assert slowest[["client_id", "device", "longest"]].to_numpy().tolist() == [[1, "b", "compute"], [0, "a", "uplink"]]
    assert phase_seconds(clients).iloc[1].tolist() == [1.0, 3.0, 2.0, 0.0]


def test_memory_is_that_of_the_largest_need():
    parts = {f"{part}_bytes": [1, 2] for part in ("weights", "adapter", "gradient", "optimizer", "activation")}
    clients = turns(device=["nano", "nano"], peak_memory_bytes=[5, 10], budget_bytes=[8, 8], **parts)
    assert memory_parts(clients).loc["nano"].tolist() == [2, 2, 2, 2, 2, 10, 8]


def test_shares_are_counted_among_those_that_started():
    clients = turns(
        device=["nano"] * 3, status=["ok", "late", "oom"], batch_size=[4, 4, 8], rank=8, depth=16, checkpointing=False
    )
    assert adapted(clients)[["batch_size", "num_turns"]].to_numpy().tolist() == [[4, 2]]


def test_the_report_of_a_run_profiles_its_clients(tmp_path: Path):
    """Sections for turns, rounds, memory, energy and refusals, with the nano's reason; also where nobody could start."""
    run = make_run(tmp_path, "a")
    page = report([run.path], tmp_path / "out").read_text()
    for title in ("Distribution over turns", "Who bounds the rounds", "Memory by part", "Energy", "Refused"):
        assert f"<h2>{title}</h2>" in page
    cells = [">jetson-nano</td>", ">memory</td>", ">batch size 4</td>"]
    assert re.search("<td[^>]*".join(["", *cells]), page)
    nobody = make_run(tmp_path, "b", spec=make_spec(num_rounds=2), all_oom=True)
    assert "<h2>Who bounds" not in report([nobody.path], tmp_path / "nobody").read_text()


def test_a_run_without_rounds_has_no_profile(tmp_path: Path):
    empty = RunDirectory.create(tmp_path, "c", make_spec())
    assert "Distribution over turns" not in report([empty.path], tmp_path / "none").read_text()
