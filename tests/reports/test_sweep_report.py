"""Reports of sweeps: one file that answers what to choose, whatever was swept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fleetune.errors import UserError
from fleetune.records import SweepDirectory
from fleetune.reports.run_report import report
from support.commands import fleetune
from support.synthetic_runs import make_run
from support.synthetic_sweeps import make_sweep

PNG = b"\x89PNG\r\n"
EVERYWHERE = {"curves", "pareto", "quality_under_budget", "cost_to_target", "cost_by_device"}


def figures_of(page: Path) -> set[str]:
    made = list((page.parent / "figures").glob("*.png"))
    assert all(path.read_bytes().startswith(PNG) for path in made)
    return {path.stem for path in made}


def rows_of(html: str, caption: str) -> list[list[str]]:
    """The texts of a table's cells, row by row."""
    table = html[html.index(f"<caption>{caption}</caption>") :]
    body = table[table.index("<tbody>") : table.index("</tbody>")]
    rows = re.findall(r"<tr>(.*?)</tr>", body)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows]


def test_report_of_methods_and_seeds_under_drop_out(tmp_path: Path):
    """devft gains the whole 100 % of what training brings without drop-out and 60 % with it, fedit 50 and 40 %.

    So devft without drop-out is first, and loses more of its accuracy. Trial 1 failed, and says why.
    """
    gains = {("devft", 0.0): 1.0, ("devft", 0.3): 0.6, ("fedit", 0.0): 0.5, ("fedit", 0.3): 0.4}
    sweep = make_sweep(
        tmp_path,
        {"method.name": ["devft", "fedit"], "fleet.dropout": [0.0, 0.3], "seed": [0, 1]},
        gain=lambda overrides: gains[overrides["method.name"], overrides["fleet.dropout"]],
        failed=[1],
    )
    page = report([sweep.path])
    html = page.read_text()
    assert page == sweep.path / "report.html"
    assert figures_of(page) == EVERYWHERE | {"effects", "heat_map", "parallel", "robustness_dropout"}
    assert html.count("data:image/png;base64,") == 9
    assert not re.search(r"(src|href)=\"(https?:|//)", html)

    ranked = rows_of(html, "Configurations by rank")
    assert [row[1] for row in ranked] == [f"{m} · dropout {d:g}" for m, d in gains]
    assert [row[5] for row in ranked] == ["1 of 2", "2", "2", "2"]  # trials
    assert "±" not in ranked[0][4]
    assert "±" in ranked[1][4]
    assert "seed 1: client 3, round 1: the loss is &lt;nan&gt;" in html

    change = {row[0]: float(row[3].removesuffix(" %")) for row in rows_of(html, "fleet.dropout")}
    assert change["devft"] < change["fedit"] < 0
    assert len(rows_of(html, "Trials")) == 8


def test_the_whole_budget_buys_the_best_result_and_the_best_is_the_target(tmp_path: Path):
    """Growth rate 4 costs twice as much and gains more: both are on every front; 64 % is reached by the dearer alone."""
    sweep = make_sweep(
        tmp_path,
        {"method.growth_rate": [2, 4]},
        gain=lambda overrides: 0.5 * overrides["method.growth_rate"] / 2,
        cost=lambda overrides: overrides["method.growth_rate"] / 2,
    )
    html = report([sweep.path], tmp_path / "out", targets=["64%"], budgets=["1GB", "1 B"]).read_text()
    assert figures_of(tmp_path / "out" / "report.html") == EVERYWHERE | {"effects"}
    assert "add <code>fleet.dropout: [0, 0.1, 0.3]</code>" in html
    assert [row[-1] for row in rows_of(html, "Configurations on a Pareto front")] == [
        "uplink, virtual time, energy"
    ] * 2

    finals = {row[1]: row[3] for row in rows_of(html, "Configurations by rank")}
    bought = rows_of(html, "Quality under a budget")
    assert [row[2:4] for row in bought] == [["20.0 %", finals["growth_rate 4"]], ["20.0 %", finals["growth_rate 2"]]]
    reached = rows_of(html, "Cost to a target")
    assert reached[0][2] != "–"
    assert reached[1][2:] == ["–"] * 3


def test_seeds_alone_and_nothing_evaluated(tmp_path: Path):
    """One configuration, the base job; ranked by training loss, its targets come from the first round."""
    sweep = make_sweep(tmp_path, {"seed": [0, 1]}, evaluate=False)
    html = report([sweep.path]).read_text()
    assert [row[1] for row in rows_of(html, "Configurations by rank")] == ["base job"]
    assert "ranked by training loss" in html
    assert figures_of(sweep.path / "report.html") == EVERYWHERE
    assert "What the swept fields do" not in html


def test_many_configurations(tmp_path: Path):
    """12 are all in the tables, the best eight are coloured."""
    grid = {"method.growth_rate": [2, 4, 8, 16], "model.quantization": ["none", "int8", "nf4"]}
    sweep = make_sweep(tmp_path, grid, num_rounds=3, gain=lambda overrides: overrides["method.growth_rate"] / 16)
    html = report([sweep.path]).read_text()
    assert len(rows_of(html, "Configurations by rank")) == len(rows_of(html, "Quality under a budget")) == 12
    assert "The best 8 are coloured" in html


def test_nothing_to_report(tmp_path: Path):
    """All trials failed; their runs are gone; neither a run nor a sweep; a budget without a sweep."""
    failed = make_sweep(tmp_path, {"seed": [0, 1]}, failed=[0, 1])
    with pytest.raises(UserError, match=r"no trial has finished \(2 failed\)"):
        report([failed.path])
    gone = make_sweep(tmp_path, {"seed": [0]}, name="gone")
    Path(gone.trials()["run_dir"][0], "spec.yaml").unlink()
    with pytest.raises(UserError, match="the runs of its trials are gone"):
        report([gone.path])
    with pytest.raises(UserError, match="no run in this directory"):
        report([tmp_path / "nowhere"])
    run = make_run(tmp_path, "a")
    with pytest.raises(UserError, match="only the report of a sweep takes it"):
        report([run.path], budgets=["1MB"])
    empty = SweepDirectory.create(tmp_path, "empty-0", {"name": "empty"}, directory=tmp_path / "sweeps")
    with pytest.raises(UserError, match="no trials yet"):
        report([empty.path])


def test_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The sweep's own folder gets the report; a mistake is exit status 2 with the field."""
    sweep = make_sweep(tmp_path, {"method.growth_rate": [2, 4]}, num_rounds=2, num_clients=2)
    done = fleetune(capfd, monkeypatch, "report", sweep.path, "--target", "30%", "--json")
    assert (done.status, done.document["report"]) == (0, str(sweep.path / "report.html"))
    assert done.document["comparison"]["qualities"] == [{"metric": "eval_accuracy", "level": 0.3}]
    assert "virtual time to 30.0\u00a0%" in (sweep.path / "report.html").read_text()
    wrong = fleetune(capfd, monkeypatch, "report", sweep.path, "--budget", "12 parsecs")
    assert wrong.status == 2
    assert "--budget='12 parsecs'" in wrong.stderr


# -- claims ------------------------------------------------------------------------------------------------------------
CLAIMS: list[dict[str, Any]] = [
    {
        "better": {"method.name": "devft"},
        "than": {"method.name": "fedit"},
        "in": "eval/accuracy",
        "source": "table <1>",
    },
    {
        "ratio": {
            "of": {"method.name": "devft"},
            "to": {"method.name": "fedit"},
            "in": "uplink_bytes",
            "is": 2,
            "within": 0.1,
        }
    },
]


def claiming_sweep(workspace: Path, *, failed: tuple[int, ...] = ()) -> SweepDirectory:
    """devft (trials 0 and 1) gains the whole, fedit half of what training brings; both send the same, and so half the claim."""
    grid = {"method.name": ["devft", "fedit"], "seed": [0, 1]}
    gains = {"devft": 1.0, "fedit": 0.5}
    return make_sweep(workspace, grid, gain=lambda o: gains[o["method.name"]], claims=CLAIMS, failed=failed)


def test_the_page_says_which_claims_hold(tmp_path: Path):
    """The accuracies are those of the table: 0.2 + gain · rise for each seed. What a source says is escaped."""
    sweep = claiming_sweep(tmp_path)
    html = report([sweep.path]).read_text()
    first, second = rows_of(html, "Claims and verdicts")
    assert first[:3] == ["devft is better than fedit in eval/accuracy", "table &lt;1&gt;", "holds"]
    accuracy = sweep.trials()["eval_accuracy"]
    assert first[3] == f"{100 * (accuracy[:2].mean() - accuracy[2:].mean()):+.1f} pp"
    assert first[6:9] == ["2", "2", "0"]
    assert first[9] == "only 2 seeds"
    assert (second[1], second[2]) == ("–", "reversed")
    assert second[3].endswith("(ratio)")
    assert "<b>holds 1, reversed 1</b>" in html
    assert [verdict["verdict"] for verdict in sweep.verdicts()] == ["holds", "reversed"]


def test_a_sweep_without_claims_has_no_such_section(tmp_path: Path):
    """And what an earlier report noted of claims that are gone goes away."""
    sweep = claiming_sweep(tmp_path)
    report([sweep.path])
    sweep.replace_claims([])
    assert "Claims and verdicts" not in report([sweep.path]).read_text()
    assert sweep.verdicts() == []
    assert not (sweep.path / "claims.json").exists()


def test_report_json_has_the_verdicts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Trial 2, fedit's with seed 0, failed: one pair decides nothing. Written elsewhere, the page leaves the sweep alone."""
    sweep = claiming_sweep(tmp_path, failed=(2,))
    out = fleetune(capfd, monkeypatch, "report", sweep.path, "--out", tmp_path / "out", "--json")
    assert out.status == 0, out.stderr
    assert out.document["report"] == str(tmp_path / "out" / "report.html")
    first = out.document["claims"][0]
    assert (first["verdict"], first["mean"], first["num_pairs"], first["num_left_out"]) == ("not decided", None, 1, 1)
    assert first["source"] == "table <1>"
    assert not (sweep.path / "claims.json").exists()


def test_a_claim_that_was_written_into_a_sweep_s_directory_is_checked(tmp_path: Path):
    """``sweep.yaml`` may be edited: a claim that its grid lacks is the user's mistake there, too."""
    sweep = claiming_sweep(tmp_path)
    sweep.replace_claims([{**CLAIMS[0], "than": {"method.name": "flora"}}])
    with pytest.raises(UserError, match="the grid has devft, fedit") as error:
        report([sweep.path])
    assert error.value.field == "claims.0.than.method.name"


def test_more_methods_than_there_is_room_for(tmp_path: Path):
    """A field of many names, beside fields that only one method has."""
    methods = [{"name": name} for name in ("fedit", "fedavg", "fedsa-lora", "flora", "c2a", "progfed", "fedadapter")]
    methods += [
        {"name": "fedprox", "mu": 0.1},
        {"name": "devft", "initial_capacity": 2},
        {"name": "dofit", "domains": 2},
    ]
    sweep = make_sweep(tmp_path, {"method": methods}, num_rounds=2)
    assert "parallel" in figures_of(report([sweep.path]))
