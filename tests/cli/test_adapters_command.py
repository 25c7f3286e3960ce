"""A library of adapters on the command line: a job's adapter goes in, and what is in it can be read off."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetune.models.library import SKILL
from fleetune.records.run_directory import RunDirectory
from support import commands, runs, tiny
from support.commands import Output

Command = Callable[..., Output]


@pytest.fixture
def fleetune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """A command of this process: ``fleetune("adapters", "list", folder)``."""
    return lambda *arguments: commands.fleetune(capfd, monkeypatch, *arguments)


def test_a_job_s_adapter_goes_into_a_library_and_a_method_composes_it(fleetune: Command, tmp_path: Path):
    """The same run gives a second adapter of the same bytes, and the two together compose to that adapter."""
    job, library = commands.job_file(tmp_path), tmp_path / "skills"
    trained = fleetune("adapters", "train", job, "-l", library, "-n", "sums", "-w", tmp_path, "--json")
    assert trained.status == 0, trained.stderr
    document = trained.document
    assert Path(document["folder"]) == library / "sums"
    run_dir = RunDirectory.open(document["run_dir"])
    metrics = (run_dir.result() or {})["metrics"]
    assert document["quality"] == {"eval_loss": metrics["eval_loss"], "untrained_loss": metrics["baseline_eval_loss"]}
    assert (document["rank"], document["method"], document["seed"]) == (2, "fedit", 0)
    assert list(document["base_weights"]) == ["model.safetensors"]
    again = fleetune("adapters", "train", run_dir.path, "--library", library, "--name", "again")
    assert (again.status, again.stdout) == (0, f"adapter    {library / 'again'}\n")
    for file in ("adapter_config.json", "adapter_model.safetensors", SKILL):
        assert (library / "again" / file).read_bytes() == (library / "sums" / file).read_bytes()
    adapters = {"method.adapters": [str(library)], "evaluation.generate": False}
    composed = runs.run(tiny.spec(adapters, method="linear-arithmetic"))
    assert composed.rounds["eval_loss"].iloc[-1] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_a_library_is_listed_with_what_cannot_be_used_and_one_adapter_is_shown(fleetune: Command, tmp_path: Path):
    library = Path(shutil.copytree(tiny.library_folder(), tmp_path / "skills"))
    (library / "skill-1" / "adapter_model.safetensors").unlink()
    (library / "skill-0" / SKILL).write_text(json.dumps({"skill": "sums", "quality": {"eval_loss": 1.5}, "note": "x"}))
    rows = fleetune("adapters", "list", library, "--json").document
    assert [(row["name"], row["skill"], row["rank"], row["eval_loss"]) for row in rows] == [
        ("skill-0", "sums", 2, 1.5),
        ("skill-1", None, None, None),
        ("skill-2", None, 2, None),
    ]
    assert [row["cannot_be_used"] for row in rows] == [None, "lacks adapter_model.safetensors", None]
    assert {"q_proj", "down_proj"} < set(rows[0]["targets"])
    table = fleetune("adapters", "list", library).stdout
    assert "lacks adapter_model.safetensors" in table
    assert "sums" in table
    shown = fleetune("adapters", "show", library / "skill-0", "--json").document
    assert (shown["num_matrices"], set(shown["ranks"].values()), shown["scaling"], shown["note"]) == (28, {2}, 2.0, "x")
    assert set(shown["files"]) == {"adapter_config.json", "adapter_model.safetensors", SKILL}
    assert "eval_loss" in fleetune("adapters", "show", library / "skill-0").stdout
    refused = fleetune("adapters", "show", library)
    assert refused.status == 2
    assert "holds 3 adapters: skill-0, skill-1, skill-2" in refused.stderr


def test_what_no_library_holds_is_refused_before_work_starts(fleetune: Command, tmp_path: Path):
    """Something in the adapter's place, a name that is a path, a method that ships gates beside pairs, a run that is not over."""
    job, library = commands.job_file(tmp_path), tmp_path / "skills"
    (library / "tiny").mkdir(parents=True)

    def refused(*arguments: object) -> str:
        out = fleetune("adapters", "train", *arguments, "-l", library, "-w", tmp_path / "ws")
        assert out.status == 2
        assert not (tmp_path / "ws").exists()
        return out.stderr

    assert f"--library='{library / 'tiny'}': is there already (choose another name with --name, or remove" in refused(
        job
    )
    assert "--name='a/b': is no name for a folder of a library" in refused(job, "-n", "a/b")
    gates = commands.job_file(tmp_path, method="mole")
    assert "method.name='mole': ships more than pairs of factors" in refused(gates, "-n", "gates")
    started = RunDirectory.create(tmp_path / "other", "started", tiny.spec().to_dict())
    out = fleetune("adapters", "train", started.path, "-l", library, "-n", "started")
    assert out.status == 1
    assert "has not finished: go on with fleetune resume" in out.stderr
    assert sorted(path.name for path in library.iterdir()) == ["tiny"]
