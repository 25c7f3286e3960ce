"""What a user gets wrong: status 2 before any actor starts, with the field, the value, the rule and the way out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from support import commands, tiny
from support.commands import Output

Command = Callable[..., Output]


@pytest.fixture
def fleetune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return lambda *arguments: commands.fleetune(capfd, monkeypatch, *arguments)


def refused(out: Output, folder: Path, field: str, value: Any, said: str) -> None:
    """The error names field and value, says the rule and the way out, and nothing was started or left behind."""
    assert out.status == 2, out.stderr
    document = out.document
    assert document["error"] == "user"
    assert (document["field"], document["value"]) == (field, value)
    (line,) = [line for line in out.stderr.splitlines() if line.startswith("fleetune: ")]
    assert line.startswith(f"fleetune: {field}")
    assert said in line
    assert "Traceback" not in out.stderr
    assert not ray.is_initialized()
    assert not (folder / "runs").exists()


# --set arguments -> field, value, and what the message must say
MISTAKES: dict[str, tuple[list[str], str, Any, str]] = {
    "misspelt field": (["rounds.num_round=3"], "rounds.num_round", None, "unknown field (did you mean 'num_rounds'?"),
    "misspelt part": (["round.num_rounds=3"], "round", None, "unknown field (did you mean 'rounds'?"),
    "misspelt method field": (["method.m=1"], "method.m", None, "unknown field (known: name)"),
    "misspelt lora field": (["model.lora.ranks=1"], "model.lora.ranks", None, "did you mean 'rank'?"),
    "field below a value": (["seed.x=1"], "seed", "dict", "should be a valid integer"),
    "wrong type": (["rounds.num_rounds=many"], "rounds.num_rounds", "many", "should be a valid integer"),
    "list for a number": (["local.steps=[1, 2]"], "local.steps", [1, 2], "should be a valid integer"),
    "text for a part": (["rounds=many"], "rounds", "many", "should be a valid dictionary"),
    "out of range": (["rounds.num_rounds=0"], "rounds.num_rounds", 0, "greater than or equal to 1"),
    "negative rate": (["local.learning_rate=-1"], "local.learning_rate", -1, "greater than or equal to 0"),
    "not a number": (["local.learning_rate=.nan"], "local.learning_rate", None, "should be a finite number"),
    "infinite": (["local.learning_rate=.inf"], "local.learning_rate", None, "should be a finite number"),
    "neither auto nor a number": (["execution.workers=few"], "execution.workers", "few", "auto"),
    "no worker": (["execution.workers=0"], "execution.workers", 0, "auto"),
    "no such choice": (["rounds.close=never"], "rounds.close", "never", "'all', 'deadline'"),
    "unknown target": (["model.lora.targets=[qproj]"], "model.lora.targets", ["qproj"], "q_proj, k_proj"),
    "personal without a held-out part": (
        ["evaluation.personal=last"],
        "evaluation.personal",
        "last",
        "data.held_out is 0",
    ),
    "a held-out part for nothing": (["data.held_out=0.2"], "data.held_out", 0.2, "evaluation.personal is none"),
    "all is held out": (["data.held_out=1"], "data.held_out", 1, "less than 1"),
    "clients of a pooled method": (
        ["method.name=centralized", "data.held_out=0.2", "evaluation.personal=last"],
        "evaluation.personal",
        "last",
        "it has no clients",
    ),
    "too many clients a round": (
        ["rounds.clients_per_round=7"],
        "rounds.clients_per_round",
        7,
        "exceeds the fleet of 6 clients (lower it, or raise fleet.num_clients)",
    ),
    "clients without examples": (
        ["data.num_examples=3", "rounds.clients_per_round=6"],
        "rounds.clients_per_round",
        6,
        "clients that hold examples (lower it, raise data.partition.alpha, or use more examples)",
    ),
    "first_k too large": (["rounds.first_k=4"], "rounds.first_k", 4, "exceeds rounds.clients_per_round=3"),
    "first_k missing": (["rounds.close=first_k"], "rounds.first_k", None, "give a number from 1 to 3"),
    "deadline missing": (["rounds.close=deadline"], "rounds.deadline_seconds", None, "is needed"),
    "no such model": (["model.base=./nowhere"], "model.base", "./nowhere", "built-in: micro-llama"),
    "misspelt model": (["model.base=micro-lama"], "model.base", "micro-lama", "did you mean 'micro-llama'?"),
    "no such data": (["data.dataset=nowhere.jsonl"], "data.dataset", "nowhere.jsonl", "no such file"),
    "misspelt data": (
        ["data.dataset=micro-reasonin"],
        "data.dataset",
        "micro-reasonin",
        "did you mean 'micro-reasoning'?",
    ),
    "unknown device": (
        ["fleet.devices={jetson-nanno: 1}"],
        "fleet.devices",
        "jetson-nanno",
        "did you mean 'jetson-nano'?",
    ),
    "fractions": (["fleet.devices={jetson-nano: 0.6}"], "fleet.devices", {"jetson-nano": 0.6}, "sum to 1"),
    "unknown network": (["fleet.network=wify"], "fleet.network", "wify", "did you mean 'wifi'?"),
    "unknown architecture": (["cost.model=llama2-7"], "cost.model", "llama2-7", "did you mean 'llama2-7b'?"),
    "unknown method": (["method.name=devf"], "method.name", "devf", "did you mean 'devft'?"),
    "method without a name": (["method={}"], "method.name", None, "the method needs a name (one of "),
    "capacity beyond the model": (
        ["method.name=devft", "method.initial_capacity=5"],
        "method.initial_capacity",
        5,
        "4",
    ),
    "split point outside": (
        ["method.name=split-lora", "method.split_point=4"],
        "method.split_point",
        4,
        "it must be from 1 to 3 (leave at least one block to the server)",
    ),
    "split that leaves the client nothing": (
        ["method.name=split-frozen", "method.split_point=0.05"],
        "method.split_point",
        0.05,
        "of 4 blocks this is 0, and it must be from 1 to 3 (leave at least one block to the client)",
    ),
    "frozen clients with a head": (
        ["method.name=split-frozen", "method.split_point=2", "method.head=client"],
        "method",
        "dict",
        "nothing comes down to a frozen client; set head: server, or use split-lora",
    ),
    "no assignment": (["rounds.num_rounds"], "--set", "rounds.num_rounds", "must have the form path.to.field=value"),
    "no field": (["=3"], "--set", "=3", "must have the form path.to.field=value"),
    "examples longer than the model": (["data.max_tokens=129"], "data.max_tokens", 129, "exceeds the model's 128"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(fleetune: Command, tmp_path: Path, mistake: str):
    sets, field, value, said = MISTAKES[mistake]
    job = commands.job_file(tmp_path)
    out = fleetune("run", job, "-w", tmp_path, "--json", *(part for one in sets for part in ("--set", one)))
    refused(out, tmp_path, field, value, said)


def test_without_json_stdout_stays_empty(fleetune: Command, tmp_path: Path):
    out = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path, "--set", "rounds.num_rounds=0")
    assert (out.status, out.stdout) == (2, "")
    assert out.stderr.startswith("fleetune: rounds.num_rounds=0: ")


# -- job files ----------------------------------------------------------------------------------------------------------
def test_a_job_file_that_is_not_there_names_the_nearest_one(fleetune: Command, tmp_path: Path):
    commands.job_file(tmp_path)
    out = fleetune("run", tmp_path / "jobs.yaml", "-w", tmp_path, "--json")
    refused(out, tmp_path, "JOB", str(tmp_path / "jobs.yaml"), f"did you mean {tmp_path / 'job.yaml'}?")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: {num_rounds: 3", "not valid YAML: "),
        ("name: a\n\tseed: 1", "line 2"),
        ("- seed: 1", "must hold a mapping of fields"),
        ("just text", "must hold a mapping of fields"),
        ("a: &a [*a]", "nested"),
        ("seed: 2001-13-45", "not valid YAML"),
        ("a: " + "[" * 3000, "not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_broken_job_file_is_explained(fleetune: Command, tmp_path: Path, text: str, said: str):
    job = tmp_path / "job.yaml"
    job.write_text(text)
    out = fleetune("run", job, "-w", tmp_path, "--json")
    assert (out.status, out.document["error"]) == (2, "user")
    assert out.document["field"] in ("JOB", "seed", "a")
    assert said in out.stderr
    assert "Traceback" not in out.stderr
    assert not (tmp_path / "runs").exists()


def test_a_folder_is_no_job_file(fleetune: Command, tmp_path: Path):
    refused(fleetune("run", tmp_path, "-w", tmp_path, "--json"), tmp_path, "JOB", str(tmp_path), "cannot be read")


# -- data files ---------------------------------------------------------------------------------------------------------
def test_a_data_file_without_the_columns_says_which_it_has(fleetune: Command, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"title": "a", "body": "b"}) + "\n")
    out = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path, "--json", "--set", f"data.dataset={data}")
    assert (out.status, out.document["error"]) == (2, "user")
    assert out.document["field"].startswith("data.")
    assert "title" in out.stderr
    assert "body" in out.stderr
    assert not (tmp_path / "runs").exists()


def test_a_broken_line_is_named_by_its_number(fleetune: Command, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    good = Path(tiny.data_file()).read_text().splitlines()
    data.write_text("\n".join([*good[:41], '{"prompt": "Q: 1', *good[41:]]))
    out = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path, "--json", "--set", f"data.dataset={data}")
    assert (out.status, out.document["field"]) == (2, "data.dataset")
    assert f"{data}:42: broken JSON" in out.stderr
    assert not (tmp_path / "runs").exists()


# -- places ---------------------------------------------------------------------------------------------------------------
def test_a_workspace_that_cannot_be_written_to(fleetune: Command, tmp_path: Path):
    """A file where the folder should be: the one obstacle that root meets too."""
    (tmp_path / "taken").write_text("")
    out = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path / "taken", "--json")
    refused(out, tmp_path, "--workspace", str(tmp_path / "taken"), "cannot be written to")


def test_no_cluster_at_the_address(fleetune: Command, tmp_path: Path):
    out = fleetune("run", commands.job_file(tmp_path), "-w", tmp_path, "--json", "--address", "127.0.0.1:1")
    refused(out, tmp_path, "--address", "127.0.0.1:1", "no Ray cluster answers")


@pytest.mark.parametrize("place", [".", "nowhere", "job.yaml"])
def test_resume_of_what_is_no_run(fleetune: Command, tmp_path: Path, place: str):
    commands.job_file(tmp_path)
    out = fleetune("resume", tmp_path / place, "--json")
    assert (out.status, out.document["error"]) == (2, "user")
    assert "this is no run directory" in out.stderr
    assert "a run directory is runs/<run_id>" in out.stderr


@pytest.fixture
def run_path(fleetune: Command, tmp_path: Path) -> Path:
    job = commands.job_file(tmp_path, {"rounds.num_rounds": 1})
    return Path(fleetune("run", job, "-w", tmp_path, "--json").document["run_dir"])


def test_resume_with_an_edited_spec(fleetune: Command, run_path: Path):
    """More rounds, or another seed, would be another run: its records would claim what never happened."""
    spec = yaml.safe_load((run_path / "spec.yaml").read_text())
    spec["rounds"]["num_rounds"] = 2
    (run_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    out = fleetune("resume", run_path, "--json")
    assert (out.status, out.document["error"]) == (2, "user")
    assert "spec.yaml is not the one it was started with" in out.stderr
    assert "start a new run from the job file" in out.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("spec.yaml", "rounds: {"),
        ("spec.yaml", "- 1"),
        ("spec.yaml", "\0"),
        ("checkpoint/meta.json", "{"),
        ("checkpoint/meta.json", "[]"),
    ],
)
def test_resume_of_a_damaged_run(fleetune: Command, run_path: Path, name: str, text: str):
    (run_path / name).write_text(text)
    out = fleetune("resume", run_path, "--json")
    assert (out.status, out.document["error"]) == (2, "user")
    assert name in out.stderr
    assert "Traceback" not in out.stderr


def test_report_on_what_is_no_run(fleetune: Command, tmp_path: Path):
    out = fleetune("report", tmp_path, "--out", tmp_path / "report", "--json")
    assert (out.status, out.document["error"]) == (2, "user")
    assert str(tmp_path) in out.stderr
    assert not (tmp_path / "report").exists()


def test_list_of_what_there_is_not(fleetune: Command, tmp_path: Path):
    refused(fleetune("list", "device", "--json"), tmp_path, "KIND", "device", "did you mean 'devices'?")
