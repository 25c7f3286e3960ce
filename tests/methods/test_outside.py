"""Methods from outside: found by module and class or by entry point, checked like built-in ones, and part of a run's identity."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetune import spec as specs
from fleetune.check.contract import CHECKS
from fleetune.check.matrix import BROKEN, outcomes
from fleetune.cli import catalogue
from fleetune.engine.execution.ray_worker import PackedJob
from fleetune.errors import UserError
from fleetune.methods import METHODS, find
from fleetune.methods.find import code_of, find_method
from fleetune.methods.source_files import source_digests
from fleetune.problem.content import Contents, check_content, identity
from fleetune.sweep.config import load as load_sweep
from fleetune.sweep.existing_runs import add_trials
from fleetune.sweep.expansion import sweep_id, trials_of
from fleetune.sweep.status import SweepStatus
from fleetune.sweep.trial_runner import TrialOrder, TrialRunner
from support import REPOSITORY, commands, runs, tiny

EXAMPLE = REPOSITORY / "tests" / "support" / "server_rate.py"
NAME = "server_rate:ServerRate"
Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _a_process_that_knows_no_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Modules that a test imports are forgotten after it, as the next one may write another file of the same name."""
    monkeypatch.setattr(find, "_found", {})
    monkeypatch.setattr(find, "_folders", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example's file, alone in a folder."""
    folder = tmp_path / "mine"
    folder.mkdir()
    return Path(shutil.copy(EXAMPLE, folder))


def job_in(folder: Path, overrides: dict[str, Any] | None = None, **method: Any) -> Path:
    """A job file that names the example, in a folder of which nobody has been told yet."""
    find.look_in(folder)
    job = commands.job_file(folder, {"method": {"name": NAME, **method}, **(overrides or {})})
    find._folders.clear()
    find._found.clear()
    return job


def changed(file: Path, old: str, new: str) -> None:
    """Change a file, and let this process import it anew."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    find._found.clear()
    sys.modules.pop(file.stem, None)


def refusal(name: str, **settings: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        tiny.spec({"method": {"name": name, **settings}})
    return caught.value


def test_a_class_beside_the_job_file_is_found_and_its_settings_are_checked(example: Path):
    spec = specs.load(job_in(example.parent, server_rate=0.5))
    assert type(spec.method).__name__ == "ServerRateConfig"
    assert spec.to_dict()["method"] == {"name": NAME, "server_rate": 0.5}
    assert specs.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(UserError, match=r"^method.server_rate=-1: .*greater than 0"):
        specs.load(job_in(example.parent), {"method.server_rate": -1})
    with pytest.raises(UserError, match=r"^method.server_rat: unknown field \(did you mean 'server_rate'"):
        specs.load(job_in(example.parent), {"method.server_rat": 1})


def test_with_rate_one_the_example_is_fedavg_bit_for_bit_and_else_goes_part_of_the_way(example: Path):
    find.look_in(example.parent)
    states = {
        rate: runs.run(tiny.spec({"method": {"name": NAME, "server_rate": rate}, "rounds.num_rounds": 1})).state.tensors
        for rate in (1.0, 0.5)
    }
    done = runs.run(tiny.spec({"rounds.num_rounds": 1}, method="fedavg"))
    runs.same_tensors(states[1.0], done.state.tensors)
    start = done.problem.method.start().tensors
    runs.close_tensors(states[0.5], {name: (start[name] + x) / 2 for name, x in states[1.0].items()})


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("nowhere:M", "", "there is no module nowhere"),
        ("mine.py:M", "", "there is no module mine.py"),
        ("a/mine:M", "", "must name a module and a class in it"),
        ("mine:", "", "must name a module and a class in it"),
        ("__main__:M", "", "no other process can import a script"),
        ("mine:M", "", "has no class M"),
        ("mine:M", "import not_there", "cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
        ("mine:M", "def f(:", "cannot be imported: SyntaxError"),
        ("mine:M", "raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        ("mine:M", "1 / 0", "cannot be imported: ZeroDivisionError"),
        ("mine:M", "class M: pass", "is no method"),
        ("mine:M", "M = 3", "is no method"),
        ("mine:M", "from fleetune.methods.base import Method\nclass M(Method): pass", "has no Config"),
        (
            "mine:M",
            "from fleetune.methods.base import Method, MethodConfig\nclass M(Method): Config = MethodConfig",
            "has no source",
        ),
        (
            "mine:M",
            "from fleetune.methods.fedavg import FedAvg\nclass M(FedAvg): pass",
            "allow only the name 'fedavg'",
        ),
        ("fedpox", "", "no such method"),
    ],
)
def test_what_is_no_complete_method_is_refused_with_the_way_out(name: str, text: str, rule: str, tmp_path: Path):
    (tmp_path / "mine.py").write_text(text)
    error = refusal(name)
    assert error.field == "method.name"
    assert error.value == name
    assert rule in error.rule
    assert error.hint


def test_a_misspelt_module_or_class_is_named_rightly(example: Path):
    find.look_in(example.parent)
    assert "did you mean server_rate?" in str(refusal("server_rat:ServerRate").hint)
    assert refusal("server_rate:ServerRates").hint == "it has ServerRate"


def test_a_file_of_the_users_does_not_stand_before_a_library_afterwards(example: Path):
    (example.parent / "colorsys.py").write_text("mine = True")
    find.look_in(example.parent)
    find_method(NAME)
    assert str(example.parent) not in sys.path[:1]
    assert str(example.parent) in sys.path
    import colorsys

    assert not hasattr(colorsys, "mine")


def test_the_code_of_a_method_is_its_file_and_the_helpers_beside_it(tmp_path: Path):
    package = tmp_path / "pack"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text("import numpy\nfrom . import deeper")
    (package / "deeper.py").write_text("import os")
    (package / "unused.py").write_text("")
    helped = "from fleetune.methods.fedavg import FedAvg\ndef f():\n    from pack.losses import numpy\n"
    (package / "method.py").write_text(helped + "class M(FedAvg): pass\n")
    sys.path.insert(0, str(tmp_path))
    import pack.method  # type: ignore[import-not-found]

    files = {"pack/__init__.py", "pack/losses.py", "pack/deeper.py", "pack/method.py"}
    assert set(source_digests([pack.method.M])) == files == set(code_of(pack.method.M))
    assert all(code_of(method) == {} for method in METHODS.values())


def test_changed_code_is_another_identity_and_is_not_resumed(example: Path):
    find.look_in(example.parent)
    spec = tiny.spec({"method": {"name": NAME}})
    before = Contents().of(spec)
    assert "method.name/server_rate.py" in before
    assert runs.problem(spec).content == before
    changed(example, "return State(moved", "return  State(moved")
    after = Contents().of(spec)
    assert identity(spec, before) != identity(spec, after)
    with pytest.raises(UserError, match=r"its server_rate\.py has changed since the run was started"):
        check_content(spec, before, after, run="runs/x")


def test_a_run_is_resumed_from_another_folder_and_refused_once_its_method_is_gone(
    example: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fleetune(*arguments: Any) -> commands.Output:
        find._found.clear()
        find._folders.clear()
        return commands.fleetune(capfd, monkeypatch, *arguments)

    job = job_in(example.parent, {"rounds.num_rounds": 1})
    out = fleetune("run", job, "-w", tmp_path / "ws", "--set", "method.server_rate=0.5", "--json")
    assert out.status == 0, out.stderr
    run_dir = Path(out.document["run_dir"])
    assert yaml.safe_load((run_dir / "spec.yaml").read_text())["method"] == {"name": NAME, "server_rate": 0.5}
    (run_dir / "result.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert fleetune("resume", run_dir, "--json").status == 0
    (run_dir / "result.json").unlink()
    changed(example, "eta, the part", "the part")
    out = fleetune("resume", run_dir)
    assert out.status == 2
    assert "its server_rate.py has changed" in out.stderr
    example.unlink()
    sys.modules.pop("server_rate")
    out = fleetune("resume", run_dir)
    assert out.status == 2
    assert "there is no module server_rate" in out.stderr
    out = fleetune("report", run_dir, "--out", tmp_path / "report")  # what was run can still be looked at
    assert out.status == 0, out.stderr


def test_a_sweep_over_methods_runs_one_from_outside_and_again_once_its_code_has_changed(example: Path, tmp_path: Path):
    job_in(example.parent, {"rounds.num_rounds": 1})
    file = example.parent / "sweep.yaml"
    file.write_text(yaml.safe_dump({"base": "job.yaml", "grid": {"method.name": ["fedit", NAME]}}))
    sweep = load_sweep(file)
    trials, place = trials_of(sweep), tmp_path / "sweeps" / sweep_id(sweep)
    assert [trial.spec.method.name for trial in trials] == ["fedit", NAME]

    def entries() -> list[Any]:
        status = SweepStatus(sweep, num_trials=2)
        add_trials(status, trials, place)
        return list(status.entries.values())

    for entry in entries():
        order = TrialOrder(
            entry.trial.number,
            entry.trial.spec.to_dict(),
            str(tmp_path),
            entry.run.path.name,
            {},
            find.code_path(),
        )
        find._folders.clear()  # the process of a trial has read no job file
        find._found.clear()
        event = list(TrialRunner().run(TrialOrder(**json.loads(order.to_json()))))[-1]
        assert event["over"] == "finished", event
    assert [entry.status for entry in entries()] == ["finished", "finished"]
    changed(example, "eta, the part", "the part")
    assert [entry.status for entry in entries()] == ["finished", "missing"]


def test_a_worker_with_other_code_refuses_the_job(example: Path, monkeypatch: pytest.MonkeyPatch):
    find.look_in(example.parent)
    spec = tiny.spec({"method": {"name": NAME}})
    packed = PackedJob.of(spec, find_method(NAME))
    assert packed.unpack() == (spec, find_method(NAME))
    changed(example, "eta, the part", "the part")
    with pytest.raises(UserError, match=r"its server_rate.py on node .* is not the one that the run was started with"):
        packed.unpack()
    example.unlink()
    changed_modules = sys.modules.pop("server_rate", None)
    find._found.clear()
    assert changed_modules
    with pytest.raises(UserError, match="there is no module server_rate"):
        packed.unpack()


@pytest.fixture
def installed(tmp_path: Path, example: Path) -> str:
    """A package that offers the example under a name of its own, and one that is broken."""
    site = tmp_path / "site"
    info = site / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(example, site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[fleetune.methods]\nserver-rate = {NAME}\nbroken = nowhere:M\nfedit = x:Y\n"
    )
    sys.path.insert(0, str(site))
    return "server-rate"


def test_an_installed_method_has_a_short_name_and_is_listed_with_its_settings(installed: str):
    spec = tiny.spec({"method": {"name": installed, "server_rate": 2.0}})
    assert spec.to_dict()["method"] == {"name": "server-rate", "server_rate": 2.0}
    about = {row["name"]: row["about"] for row in catalogue.methods()}
    assert "Reddi et al. 2021" in about[installed]
    assert about["broken"].startswith("cannot be used: there is no module nowhere")
    assert about["fedit"] == METHODS["fedit"].source
    schema = specs.json_schema()
    assert schema["$defs"]["method server-rate"]["properties"]["server_rate"]["maximum"] == 10.0
    assert "method broken" not in schema["$defs"]
    assert "server-rate" in str(refusal("server-rat").hint)


def test_without_installed_methods_the_schema_knows_modules_and_classes():
    options = specs.json_schema()["properties"]["method"]["oneOf"]
    assert len(options) == len(METHODS) + 1
    assert any("pattern" in option.get("properties", {}).get("name", {}) for option in options)


BROKEN_METHODS = {
    "same seed": (
        "import random\n",
        "return State({n: x + random.random() for n, x in state.tensors.items()})",
        "the same seed gives the same bits",
    ),
    "resume": (
        "",
        "self.n = getattr(self, 'n', 0) + 1; return State({n: x + self.n for n, x in state.tensors.items()})",
        "a run that is stopped goes on bit for bit",
    ),
    "in place": (
        "",
        "[x.add_(1) for x in state.tensors.values()]; raise KeyError('lost')",
        "three rounds are finite and learn",
    ),
}


@pytest.mark.parametrize("kind", BROKEN_METHODS)
def test_a_method_that_breaks_the_contract_is_told_which_part(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The check of the part that it breaks says so; where the method itself raises, its own line is named."""
    imports, body, name = BROKEN_METHODS[kind]
    text = EXAMPLE.read_text().partition("        mean = ")[0] + f"        {body}\n"
    (tmp_path / "broken.py").write_text(text.replace("import torch\n", f"{imports}import torch\n"))
    check = name.replace(" ", "_")
    monkeypatch.setattr("fleetune.check.matrix.CHECKS", {check: CHECKS[check]})
    (outcome,) = outcomes("broken:ServerRate", {})
    assert (outcome.check, outcome.status) == (name, BROKEN)
    assert outcome.expected
    assert outcome.found
    if kind == "in place":
        assert f"KeyError: 'lost' ({tmp_path / 'broken.py'}, line " in outcome.found


def test_the_command_says_ok_or_broken_line_by_line(
    example: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(example.parent)
    name = "only_what_the_plan_names_changes_and_travels"
    monkeypatch.setattr("fleetune.check.matrix.CHECKS", {name: CHECKS[name]})
    out = commands.fleetune(capfd, monkeypatch, "check", NAME, "--set", "method.server_rate=0.5")
    assert out.status == 0, out.stderr
    assert out.stdout.splitlines() == [f"ok             {name.replace('_', ' ')}", f"{NAME} keeps the contract"]
    changed(example, "        mean = ", "        raise ValueError('no')\n        mean = ")
    out = commands.fleetune(capfd, monkeypatch, "check", NAME, "--json")
    assert out.status == 1
    assert (out.document["broken"], out.document["checks"][0]["status"]) == (1, "broken")
    assert "ValueError: no" in out.document["checks"][0]["found"]
    out = commands.fleetune(capfd, monkeypatch, "check", NAME, "--set", "method.server_rate=99")
    assert out.status == 2
