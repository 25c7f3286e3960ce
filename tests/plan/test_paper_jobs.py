"""The jobs that stand for papers' resource figures: they plan, and give the ratios that follow from the papers' settings."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from support import REPOSITORY

pytestmark = pytest.mark.slow

JOBS = REPOSITORY / "jobs" / "paper"


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return runpy.run_path(str(JOBS / "table.py"))


def test_every_published_figure_is_met_or_explained(table: dict[str, Any]):
    """Ratios by arithmetic. Four equal stages of L/8 … L send 15/32. A has r x in elements of r (in + out): 8192 of 13312 on
    q and v of llama3.1-8b. 512 x 2048 x 4 B each way (the stream between blocks is fp32), and 4 B of label a token, for
    200 examples."""
    ours = {line.what: line.ours for line in table["published"]()}
    for size in ("7B", "13B"):
        assert ours[f"{size}, FedIT over DevFT, uplink"] == 32 / 15
        assert ours[f"{size}, FedSA-LoRA over FedSA-LoRA + DevFT"] == 32 / 15
        assert ours[f"{size}, FedIT over FedSA-LoRA"] == 2
        assert 2 < ours[f"{size}, FedIT over DevFT, time"] < 32 / 15
    assert ours["7B, FedIT, all rounds"] == pytest.approx(8 * 5.03, rel=1e-3)
    assert ours["13B, FedIT, all rounds"] == pytest.approx(8 * 8.39, rel=1e-3)
    assert ours["llama3.1-8b, q and v, FedIT over FedSA-LoRA"] == 13312 / 8192
    cut = 200 * 512 * 2048 * 4
    assert ours["SplitLoRA, cut, both ways"] == pytest.approx((2 * cut + 200 * 512 * 4) / 1e9, rel=1e-12)
    assert ours["llama3.1-8b, 16 of 32 blocks in NF4"] == pytest.approx(75.6, abs=0.2)


def test_a_tx2_nx_holds_the_first_two_stages_and_not_the_last(table: dict[str, Any]):
    needs, *boards = table["stages_on_boards"]()
    assert [float(cell) for cell in needs[2:]] == pytest.approx([1.45, 2.19, 3.66, 6.60], rel=0.01)
    fits = {board: cells for board, _, *cells in boards}
    assert fits["jetson-tx2-nx"] == ["2", "1", "does not fit", "does not fit"]
    assert fits["jetson-agx-orin-64gb"] == ["16"] * 4
    needs = {way: float(need) for way, need, *_ in table["ways_out"]()}
    assert needs["checkpointing"] < 0.75 * needs["the whole model"]
    ways = {way: where for way, *_, where in table["ways_out"]()}
    assert "orin-nano-8gb" in ways["checkpointing"]
    assert "orin-nano-8gb" not in ways["the whole model"]
    assert "tx2-nx" not in ways["the whole model"]
    assert ways["split after 8 blocks"] == ways["capacity limited to 8 blocks"] == "all"


def test_the_page_shows_what_the_script_prints(table: dict[str, Any]):
    page = table["PAGE"].read_text(encoding="utf-8")
    assert "| needs at batch 1, GB |" in page
    assert table["page_with"](table["markdown"]()) == page, "run python jobs/paper/table.py --write"
