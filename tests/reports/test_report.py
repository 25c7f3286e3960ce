"""Figures and reports of runs of every kind: one, several, a sweep, without evaluation, with nobody able to
train.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fleetune.records import RunDirectory
from fleetune.reports.client_stats import own_models
from fleetune.reports.figures import runs as figures
from fleetune.reports.run_report import report
from fleetune.reports.run_stats import device_costs, run_totals
from support.synthetic_runs import make_run, make_spec

PNG = b"\x89PNG\r\n"


def test_totals_of_two_rounds(tmp_path: Path):
    """Uplink 10 + 20 bytes, the clock ends at 5 s, one of four turns is refused, accuracy ends at 40 %."""
    run = RunDirectory.create(tmp_path, "a", {})
    row = {"num_clients": 2, "num_oom": 0, "uplink_bytes": 10, "sim_seconds": 2.0, "eval_accuracy": 0.6}
    run.append_round({"round": 1, **row}, {})
    run.append_round(
        {"round": 2, **row, "num_oom": 1, "uplink_bytes": 20, "sim_seconds": 5.0, "eval_accuracy": 0.4}, {}
    )
    totals = run_totals(run)
    assert totals["uplink_bytes"] == 30
    assert totals["sim_seconds"] == 5
    assert totals["oom_fraction"] == 0.25
    assert (totals["eval_accuracy"], totals["best_accuracy"]) == (0.4, 0.6)


def test_device_costs_leave_out_who_did_not_run(tmp_path: Path):
    """nano: one turn of 4 s and one refused that would have needed 9 bytes of 8; orin: turns of 1 and 3 s;
    agx: one of 6 s and one that another budget refused."""
    run = RunDirectory.create(tmp_path, "a", {})
    columns = {
        "device": ["nano", "nano", "orin", "orin", "agx", "agx"],
        "status": ["ok", "oom", "ok", "late", "ok", "refused"],
        "sim_seconds": [4.0, 0.0, 1.0, 3.0, 6.0, 0.0],
        "peak_memory_bytes": [7, 9, 5, 5, 4, 4],
        "budget_bytes": 8,
    }
    run.append_round({"round": 1}, columns)
    costs = device_costs(run)
    assert costs["sim_seconds"].to_dict() == {"agx": 6.0, "nano": 4.0, "orin": 2.0}
    assert costs["oom_fraction"].to_dict() == {"agx": 0.0, "nano": 0.5, "orin": 0.0}
    assert costs["refused_fraction"].to_dict() == {"agx": 0.5, "nano": 0.0, "orin": 0.0}
    assert costs["late_fraction"].to_dict() == {"agx": 0.0, "nano": 0.0, "orin": 0.5}
    assert costs["peak_memory_bytes"].to_dict() == {"agx": 4, "nano": 9, "orin": 5}


@pytest.mark.parametrize("kind", ["usual", "without_evaluation", "all_oom", "no_rounds"])
def test_all_figures_of_one_run(tmp_path: Path, kind: str):
    if kind == "no_rounds":
        run = RunDirectory.create(tmp_path, "a", make_spec())
    else:
        run = make_run(tmp_path, "a", evaluate=kind == "usual", all_oom=kind == "all_oom")
    made = figures.write_figures(run)
    names = {"learning_curve.png", "cost_by_device.png", "timeline.png"}
    assert {path.name for path in made} == (names | {"accuracy_vs_cost.png"} if kind == "usual" else names)
    assert all(path.read_bytes().startswith(PNG) for path in made)


def test_report_of_a_sweep_is_one_file(tmp_path: Path):
    """Two growth rates with two seeds: four rows, one plot of what growth_rate does, nothing loaded from
    elsewhere.
    """
    for growth_rate in (2, 4):
        for seed in (0, 1):
            spec = make_spec(seed=seed, growth_rate=growth_rate)
            meta = {"sweep": "growth", "overrides": {"method.growth_rate": growth_rate, "seed": seed}}
            make_run(tmp_path, f"g{growth_rate}s{seed}", spec=spec, meta=meta)
    page = report([tmp_path], tmp_path / "out").read_text()
    assert "<h1>growth</h1>" in page
    assert len(set(re.findall(r"devft · growth_rate \d · seed \d", page))) == 4
    assert "varied: 2, 4" in page
    assert page.count("data:image/png;base64,") == 6  # curves, effect, accuracy, devices, two timelines
    assert not re.search(r"(src|href)=\"https?:", page)
    assert (tmp_path / "out" / "figures" / "sweep_effect.png").read_bytes().startswith(PNG)


def test_report_escapes_names(tmp_path: Path):
    spec = make_spec(num_rounds=3)
    spec["method"]["name"] = "<script>alert(1)</script>"
    page = report([make_run(tmp_path, "a", spec=spec).path], tmp_path / "r.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_what_clients_paid_stands_beside_how_well_they_do(tmp_path: Path):
    """Client 0: two turns of 3 J that counted and a refused one; client 1: one of 3 J. Only the last evaluation is shown."""
    run = RunDirectory.create(tmp_path, "a", make_spec())
    turn = {
        "device": ["nano", "orin"],
        "sim_seconds": 2.0,
        "downlink_bytes": 4,
        "uplink_bytes": 6,
        "energy_joules": 3.0,
    }
    own = {"client_id": [0, 1], "device": ["nano", "orin"], "held_out_examples": [5, 5]}
    for number, status, losses in ((1, ["ok", "ok"], [2.0, 3.0]), (2, ["ok", "oom"], [1.0, 2.5])):
        row = {"round": number, "num_clients": 2, "sim_seconds": 2.0 * number}
        clients = {"client_id": [0, 1], "status": status, "peak_memory_bytes": 1, "budget_bytes": 2, **turn}
        clients["refused_by"], clients["refused_hint"] = [
            [None, "memory" if status[1] == "oom" else None],
            [None, "nothing smaller" if status[1] == "oom" else None],
        ]
        run.append_round(row, clients, {**own, "eval_loss": losses})
    found = own_models(run.clients(), run.personal())
    assert found["eval_loss"].tolist() == [1.0, 2.5]
    assert found["num_turns"].tolist() == [2, 1]
    assert found["energy_joules"].tolist() == [6.0, 3.0]
    assert found["link_bytes"].tolist() == [20, 10]
    page = report([run.path], tmp_path / "out").read_text()
    assert "Clients&#39; own models" in page or "Clients' own models" in page
    assert (tmp_path / "out" / "figures" / "own_models.png").read_bytes().startswith(PNG)
