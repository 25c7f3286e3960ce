"""The comparison of a sweep's configurations, as text for the docs, as data and in the page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fleetune.records import SweepDirectory
from fleetune.reports.comparison import Spread, spread_text
from fleetune.reports.html import Cell, Note, Table, markup
from fleetune.reports.markdown import markdown
from fleetune.reports.sweep_report import sweep_comparison, sweep_markdown
from support.commands import fleetune
from support.synthetic_runs import make_run
from support.synthetic_sweeps import make_sweep

CLAIM = {"rises": "sim_seconds", "over": "method.growth_rate", "source": "table 1"}


def sweep_of(workspace: Path, **fields: object) -> SweepDirectory:
    """Growth rate 4 costs twice as much as 2, and its accuracy gains the whole where 2 gains half; two seeds."""
    return make_sweep(
        workspace,
        {"method.growth_rate": [2, 4], "seed": [0, 1]},
        gain=lambda overrides: overrides["method.growth_rate"] / 4,
        cost=lambda overrides: overrides["method.growth_rate"] / 2,
        **fields,  # type: ignore[arg-type]
    )


def test_a_target_that_one_configuration_reaches(tmp_path: Path):
    """An accuracy of 65 %: growth rate 4 alone comes so far. Of what all have the best is bold."""
    comparison = sweep_comparison(sweep_of(tmp_path).path, targets=["65%"])
    best, other = comparison.rows
    assert (best.configuration, other.configuration) == ("growth_rate 4", "growth_rate 2")
    assert (best.values["sim_seconds_to_0"].num_seeds, other.values["sim_seconds_to_0"].num_seeds) == (2, 0)
    assert best.values["uplink_bytes"].mean > other.values["uplink_bytes"].mean
    assert comparison.untrained["eval_accuracy"] == 0.2
    text = sweep_markdown(tmp_path / "sweeps" / "growth-0", targets=["65%"])
    head, _, untrained, *rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert head[4:6] == ["virtual time to 65.0 %", "uplink to 65.0 %"]
    assert untrained[:3] == ["| untrained model", "–", "20.0 %"]
    assert rows[1][4] == "– (0 of 2)"
    assert rows[0][2].startswith("**")
    assert rows[1][6].startswith("**")
    assert "Claims" not in text


def test_the_common_loss_is_one_that_all_who_learn_reach(tmp_path: Path):
    """Losses are not scaled: both configurations come to the common one, with every seed."""
    sweep = sweep_of(tmp_path)
    (quality,) = (comparison := sweep_comparison(sweep.path)).qualities
    assert comparison.is_common
    worst = sweep.trials()["eval_loss"].max()
    assert worst <= quality.level < worst + 1e-3
    assert {row.values["sim_seconds_to_0"].num_seeds for row in comparison.rows} == {2}
    assert all(row.learns for row in comparison.rows)


def test_the_document_has_the_numbers_of_the_text(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """And the page has them too, beside the verdicts on claims."""
    sweep = sweep_of(tmp_path)
    sweep.write_spec({**sweep.spec, "claims": [CLAIM]})
    document = fleetune(capfd, monkeypatch, "report", sweep.path, "--json").document
    (claim,) = document["claims"]
    rows = document["comparison"]["configurations"]
    text = fleetune(capfd, monkeypatch, "report", sweep.path, "--markdown").stdout
    assert f"| {claim['claim']} | table 1 | {claim['verdict']} |" in text
    page = Path(document["report"]).read_text()
    assert "<caption>Comparison</caption>" in page
    for row in rows:
        shown = spread_text(Spread(**row["eval_accuracy"]), "fraction")
        assert shown in text
        assert shown in page


def test_a_sweep_that_evaluated_nothing(tmp_path: Path):
    """There are costs, no quality and no untrained model."""
    text = sweep_markdown(make_sweep(tmp_path, {"seed": [0, 1]}, evaluate=False).path)
    assert "no common quality" in text
    header = next(line for line in text.splitlines() if line.startswith("| configuration"))
    assert "accuracy" not in header
    assert "uplink" in header
    assert "untrained model" not in text


def test_markdown_is_refused_for_runs_and_beside_the_page(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run, sweep = make_run(tmp_path, "a"), sweep_of(tmp_path)
    for arguments in ([run.path], [sweep.path, "--out", tmp_path], [sweep.path, "--json"], [sweep.path, sweep.path]):
        out = fleetune(capfd, monkeypatch, "report", *arguments, "--markdown")
        assert out.status == 2
        assert "--markdown" in out.stderr


@pytest.mark.parametrize(
    ("value", "quantity", "text"),
    [
        (Spread(0.4811, 0.0092, 5), "fraction", "48.1 ± 0.9 %"),
        (Spread(0.1289, 0.0031, 5), "loss", "0.129 ± 0.003"),
        (Spread(66_846_720.0, 412_000.0, 5), "bytes", "66.8 ± 0.4 MB"),
        (Spread(4_200_000_000.0, 0.0, 3), "bytes", "4.20 ± 0.00 GB"),
        (Spread(34.85, 1.9, 5), "seconds", "34.9 ± 1.9 s"),
        (Spread(300.0, 30.0, 2), "seconds", "5.00 ± 0.50 min"),
        (Spread(0.0, 0.0, 2), "bytes", "0 ± 0 B"),
        (Spread(7.0, math.nan, 1), "joules", "7.00 J"),
        (Spread(math.nan, math.nan, 0), "joules", "–"),
    ],
)
def test_a_spread_as_text(value: Spread, quantity: str, text: str):
    assert spread_text(value, quantity) == text


def test_markdown_of_notes_and_tables():
    """Elements of a note have Markdown's form, what was escaped is itself again, and no text leaves its cell."""
    table = Table(["a|b", "n"], [[Cell("x\ny"), Cell("2", 2, best=True)]], caption="")
    notes = [Note(markup("<b>{}</b> by <code>--target</code>", "a < b")), Note("plain & simple")]
    assert markdown([*notes, table]).splitlines() == [
        "**a < b** by `--target`",
        "",
        "plain & simple",
        "",
        r"| a\|b | n |",
        "| --- | ---: |",
        "| x y | **2** |",
    ]
