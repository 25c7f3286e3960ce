"""jobs/distill_chains.py: chains with the right answer are kept, each beside the original solution."""

from __future__ import annotations

import json
import os
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from support import REPOSITORY, tiny

main: Callable[[list[str]], int] = runpy.run_path(str(REPOSITORY / "jobs" / "distill_chains.py"))["main"]


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_published_chains_with_the_right_answer_are_kept(tmp_path):
    """Chains as texts or as objects; `,` and `$` in an answer do not count."""
    data, out = tmp_path / "data.jsonl", tmp_path / "chains.jsonl"
    rows = [
        {"question": f"q{i}", "ground_truth": f"so it is {i}\n#### {1000 + i}", "model": model}
        for i, model in enumerate(
            ["hence #### 1,000", {"is_correct": True, "solution": "well #### $1001"}, "no #### 5", "none"] * 5
        )
    ]
    for i, row in enumerate(rows):
        row["ground_truth"] = f"so it is {i % 4}\n#### {1000 + i % 4}"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--data", str(data), "--published", "model", "--reference", "ground_truth", "--out", str(out)]
    assert main(given) == 0
    kept = lines(out)
    assert {row["response"] for row in kept} == {"hence #### 1,000", "well #### $1001"}
    assert all(row["reference"].startswith("so it is") for row in kept)
    assert main([*given, "--template", "Q: {question}"]) == 0
    assert all(row["prompt"].startswith("Q: q") for row in lines(out))


def test_a_teacher_that_gets_nothing_right_is_refused(tmp_path, capsys):
    """A random model: exit status 2, with what it wrote, and no file."""
    out = tmp_path / "chains.jsonl"
    given = ["--data", tiny.data_file(), "--teacher", tiny.model_folder(), "--out", str(out)]
    assert main([*given, "--num-examples", "4", "--max-new-tokens", "3"]) == 2
    assert "none of 4 chains has the right answer" in capsys.readouterr().err
    assert not out.exists()
    assert main(["--data", tiny.data_file(), "--teacher", str(tmp_path), "--out", str(out)]) == 2
    assert "holds no model that can be loaded" in capsys.readouterr().err
    assert main(["--data", tiny.data_file(), "--published", "chains", "--out", str(out)]) == 2
    assert "no such column" in capsys.readouterr().err


@pytest.mark.skipif(
    "FLEETUNE_TEST_DATA" not in os.environ, reason="needs the published data files (FLEETUNE_TEST_DATA)"
)
def test_gsm8k_s_published_solutions_become_reference_paths(tmp_path):
    out = tmp_path / "chains.jsonl"
    data = Path(os.environ["FLEETUNE_TEST_DATA"]) / "gsm8k" / "example_model_solutions.jsonl"
    pattern = r"(?:####|A:)\s*([-+]?\$?[\d,]*\.?\d+)"
    given = ["--data", str(data), "--published", "175b_verification", "--reference", "ground_truth"]
    assert main([*given, "--answer-pattern", pattern, "--out", str(out)]) == 0
    assert len(lines(out)) > 300
