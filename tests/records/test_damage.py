"""A killed run whose files were damaged since: it goes on with the bits of a run that nobody touched, or names the file."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fleetune.engine.checkpoint.client_store import ClientStore
from fleetune.engine.launch import run as launch
from fleetune.errors import RunFailed, Stopped, UserError
from fleetune.records.run_directory import RunDirectory
from fleetune.spec import RunSpec
from fleetune.tracking.sync import sync
from support import commands, runs, tiny

ROUNDS = 6


def spec_of(**overrides: Any) -> RunSpec:
    """FedSA-LoRA, whose clients keep tensors of their own; a few clients a round, so that some wait for long."""
    values = {"rounds.num_rounds": ROUNDS, "evaluation.every": ROUNDS, "evaluation.generate": False, **overrides}
    return tiny.spec(values, method="fedsa-lora")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return launch.run(spec_of(), workspace=tmp_path_factory.mktemp("whole")).run_dir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after four rounds."""

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "round" and event["round"] == 4:
            raise KeyboardInterrupt

    workspace = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stopped) as end:
        launch.run(spec_of(), workspace=workspace, report=report)
    (run_path,) = (workspace / "runs").iterdir()
    assert str(end.value) == f"fleetune resume {run_path}"
    return run_path


def state_of(run_path: Path) -> runs.Finished:
    return runs.finished(runs.problem(spec_of()), RunDirectory.open(run_path), [])


def same(run_path: Path, undisturbed: Path) -> None:
    a, b = state_of(run_path), state_of(undisturbed)
    runs.same_tensors(a.state.tensors, b.state.tensors)
    assert a.private.keys() == b.private.keys()
    for client in a.private:
        runs.same_tensors(a.private[client], b.private[client])
    assert a.rounds.drop(columns="run_id").equals(b.rounds.drop(columns="run_id"))
    assert a.clients.drop(columns="run_id").equals(b.clients.drop(columns="run_id"))


def victims(run_path: Path) -> list[Path]:
    found = [path.relative_to(run_path) for path in sorted(run_path.rglob("*")) if path.is_file()]
    return [path for path in found if path.name not in ("lock", "mlflow.lock")]


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        place = int(len(content) * float(how))
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])


def goes_on_after(run_path: Path) -> int:
    """The round that a run goes on after; it is stopped there. UserError where it is refused."""
    seen: list[int] = []

    def report(event: dict[str, Any]) -> None:
        seen.append(event["round"])
        raise KeyboardInterrupt

    with pytest.raises(Stopped):
        launch.resume(run_path, report=report)
    return seen[0]


@pytest.mark.parametrize("how", ["gone", "emptied", "truncated", "0.5"])
def test_a_damaged_run_goes_on_from_what_is_whole_or_names_the_file(how: str, stopped: Path, tmp_path: Path):
    """Every file of a run that was stopped after four rounds, one at a time. tests/kill_files.py does more, and to the end."""
    expected = {
        "checkpoint/state.safetensors": 3,
        "checkpoint/state_before.safetensors": 4,
        "checkpoint/clients/token": 4,
        "checkpoint/records/round_00000004.arrow": 3,  # of the last round, which is done again
        "checkpoint/records/round_00000002.arrow": "refused",
        "checkpoint/meta.json": "refused",
        "spec.yaml": "refused",
    }
    found: dict[str, Any] = {}
    for n, victim in enumerate(victims(stopped)):
        copy = tmp_path / str(n) / "runs" / stopped.name
        shutil.copytree(stopped, copy)
        damage(copy / victim, how)
        try:
            found[str(victim)] = goes_on_after(copy)
        except UserError as error:
            found[str(victim)] = "refused" if victim.name in str(error) else str(error)
    assert expected.items() <= found.items()
    assert set(found.values()) <= {3, 4, "refused"}


@pytest.mark.parametrize("victim", ["state.safetensors", "records/round_00000004.arrow"])
def test_a_run_that_goes_on_from_the_round_before_has_the_same_bits(
    victim: str, stopped: Path, undisturbed: Path, tmp_path: Path
):
    copy = tmp_path / "runs" / stopped.name
    shutil.copytree(stopped, copy)
    damage(copy / "checkpoint" / victim, "0.5")
    said: list[str] = []
    launch.resume(copy, warn=said.append)
    same(copy, undisturbed)
    assert len(said) == 1
    assert victim in said[0]
    assert said[0].endswith("going on from the round before")


def test_both_states_damaged_are_refused(stopped: Path, tmp_path: Path):
    copy = tmp_path / "runs" / stopped.name
    shutil.copytree(stopped, copy)
    for name in ("state.safetensors", "state_before.safetensors"):
        damage(copy / "checkpoint" / name, "0.5")
    with pytest.raises(UserError, match=r"state.safetensors': is damaged, and with it the run's state"):
        launch.resume(copy)
    for name in ("state.safetensors", "state_before.safetensors"):
        (copy / "checkpoint" / name).unlink()
    with pytest.raises(UserError, match=r"state.safetensors': is damaged, .*it is missing"):
        launch.resume(copy)


@pytest.mark.parametrize("how", ["emptied", "truncated", "0.5"])
def test_a_damaged_finished_run_is_told_by_whoever_reads_it(
    how: str, undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    names = ["rounds.parquet", "clients.parquet", "result.json", "checkpoint/meta.json"]
    names += ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    for n, name in enumerate(names):
        copy = tmp_path / str(n) / undisturbed.name
        shutil.copytree(undisturbed, copy)
        damage(copy / name, how)
        with pytest.raises(UserError, match=Path(name).name):
            launch.resume(copy)
        with pytest.raises(UserError, match=Path(name).name):
            sync(copy, uri=f"sqlite:///{tmp_path}/mlflow.db")
        if name.endswith("parquet"):
            out = commands.fleetune(capfd, monkeypatch, "report", copy, "--out", tmp_path / "report")
            assert out.status == 2
            assert name in out.stderr
            assert "Traceback" not in out.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_a_damaged_token_is_replaced(tmp_path: Path):
    """It only tells this folder from others of its name."""
    store = ClientStore.open(tmp_path)
    for content in (b"", b"\xff\xfe", b"x"):
        (tmp_path / "token").write_bytes(content)
        assert not store.is_here
        assert ClientStore.open(tmp_path).is_here


def test_what_a_kill_left_half_written_is_gone_when_the_run_goes_on(stopped: Path, tmp_path: Path):
    copy = tmp_path / "runs" / stopped.name
    shutil.copytree(stopped, copy)
    (copy / "adapter").mkdir(exist_ok=True)
    for name in (
        "adapter/.adapter_model.safetensors.1999999999.ab.tmp",
        "checkpoint/.state.safetensors.1999999999.ab.tmp",
    ):
        (copy / name).touch()
    launch.resume(copy)
    assert not list(copy.rglob("*.tmp"))


# -- a full disk ----------------------------------------------------------------------------------------------------------
def test_whichever_write_finds_the_disk_full_the_run_fails_in_one_sentence_and_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From the n-th write on nothing can be written any more, for one n in nine; then there is room again.

    tests/kill_files.py does it for every n.
    """
    replace, n = os.replace, 0
    outcome: Any = None
    while not isinstance(outcome, launch.Result):
        n += 9
        workspace = tmp_path / str(n)
        monkeypatch.setattr(os, "replace", failing_after(n, replace))
        outcome = outcome_of(lambda where=workspace: launch.run(spec_of(), workspace=where))  # type: ignore[misc]
        monkeypatch.setattr(os, "replace", replace)
        if isinstance(outcome, UserError):  # no run was begun yet
            assert "No space left on device" in str(outcome)
            assert not list(workspace.glob("runs/*/spec.yaml"))
        elif isinstance(outcome, RunFailed):
            (run_path,) = (workspace / "runs").iterdir()
            assert "cannot be written: No space left on device" in str(outcome)
            assert str(outcome).endswith(f"fleetune resume {run_path}")
            assert not list(run_path.rglob("*.tmp"))
            if n % 2 == 0:  # not all, for time's sake
                launch.resume(run_path)
                same(run_path, undisturbed)
    assert n > 3 * ROUNDS


def outcome_of(work: Any) -> Any:
    """What a call returns, or the error that a user is told."""
    try:
        return work()
    except (UserError, RunFailed) as error:
        return error


def failing_after(n: int, replace: Any) -> Any:
    """A rename that finds the disk full from the n-th on."""
    left = iter(range(n))

    def rename(*paths: Any) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*paths)

    return rename


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    place = tmp_path / "disk"
    place.mkdir()
    if os.system(f"mount -t tmpfs -o size=128k tmpfs {place} 2>/dev/null") != 0:
        pytest.skip("mounting is not allowed here")
    yield place
    os.system(f"umount -l {place}")


def test_a_disk_that_is_full_is_one_sentence_and_room_is_enough(
    small_disk: Path,
    undisturbed: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(spec_of().to_dict(), sort_keys=False))
    out = commands.fleetune(capfd, monkeypatch, "run", job, "-w", small_disk)
    assert out.status == 1, out.stderr
    assert "Traceback" not in out.stderr
    assert [line for line in out.stderr.splitlines() if "cannot be written" in line] == out.stderr.splitlines()[-1:]
    (run_path,) = (small_disk / "runs").iterdir()
    os.system(f"mount -o remount,size=8m {small_disk}")
    out = commands.fleetune(capfd, monkeypatch, "resume", run_path)
    assert out.status == 0, out.stderr
    same(run_path, undisturbed)
