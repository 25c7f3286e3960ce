"""Runs that die while they write each of their files in turn, and files that are damaged afterwards.

python tests/kill_files.py                       # 100 kills, every file damaged in seven ways, every write on a full disk; serial
python tests/kill_files.py --ray --kills 20      # kills whichever actor writes; about ten seconds each
python tests/kill_files.py --short               # what CI runs, less than a minute

Every run must go on to the bits of an undisturbed one, or be refused with the name of the file. Half of the kills are power
cuts as well: files that were not fsynced yet are empty afterwards.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PLAN = "FLEETUNE_KILL_FILES"  # a folder: `at` says which step is the last one, `steps` grows by a byte with each


def watch_writes(step: Callable[[str], None], lost: Callable[[set[str]], None]) -> None:
    """Call ``step`` before and after all that brings a file to its place, ``lost`` with files that a power cut would empty."""
    from fleetune import files

    replace, fsync, sealed = os.replace, os.fsync, files._sealed
    synced: set[int] = set()
    unsynced: set[str] = set()

    def watched_replace(a: Any, b: Any) -> None:
        step(f"before {Path(b).name} has its name")
        if os.stat(a).st_ino not in synced:
            unsynced.add(str(b))
        replace(a, b)
        lost(unsynced)
        step(f"after {Path(b).name} has its name")

    def watched_fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        step(f"before the fsync of {Path(name).name}")
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)
        unsynced.discard(name)
        lost(unsynced)
        step(f"after the fsync of {Path(name).name}")

    def in_halves(content: memoryview) -> Iterator[memoryview]:
        whole = memoryview(b"".join(bytes(piece) for piece in sealed(content)))
        step("before a file is written")
        yield whole[: len(whole) // 2]
        step("in the middle of a file")
        yield whole[len(whole) // 2 :]

    os.replace, os.fsync, files._sealed = watched_replace, watched_fsync, in_halves


def die_on_plan(folder: Path) -> None:
    """In any process: count the steps of all of them together, and die at the planned one."""
    unsynced: list[set[str]] = [set()]

    def step(what: str) -> None:
        with (folder / "steps").open("ab") as file:
            file.write(b".")
            file.flush()
            number = os.fstat(file.fileno()).st_size
        if number == int((folder / "at").read_text() or 0):
            with (folder / "killed").open("a") as file:
                file.write(what)
            if (folder / "power").exists():
                for path in unsynced[0]:
                    if os.path.exists(path):
                        os.truncate(path, 0)
            os.kill(os.getpid(), signal.SIGKILL)

    watch_writes(step, lambda files_not_synced: unsynced.__setitem__(0, files_not_synced))


def plan(folder: Path, at: int, *, is_power_cut: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("steps", "killed", "power"):
        (folder / name).unlink(missing_ok=True)
    (folder / "at").write_text(str(at))
    if is_power_cut:
        (folder / "power").touch()


class Campaign:
    """Runs of one job, held to an undisturbed one."""

    def __init__(self, folder: Path, kind: str):
        sys.path.insert(0, str(Path(__file__).parent / "records"))
        import test_damage

        self.folder, self.plan_folder, self.tests = folder, folder / "plan", test_damage
        self.spec = test_damage.spec_of(**{"execution.kind": kind, "execution.workers": 1 if kind == "serial" else 2})
        self.undisturbed = folder
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def run(self, workspace: Path, **options: Any) -> Path:
        from fleetune.engine.launch import run as launch

        return launch.run(self.spec, workspace=workspace, **options).run_dir

    def note(self, kind: str, case: str, outcome: str) -> None:
        self.counts[f"{kind}: {outcome}"] += 1
        if outcome not in ("the same bits", "refused with its name", "no run was begun"):
            self.wrong.append(f"{kind}, {case}: {outcome}")
            print(self.wrong[-1], flush=True)

    def outcome(self, run_path: Path, *, victim: str | None = None) -> str:
        """What becomes of a run directory when it is gone on with."""
        from fleetune.engine.launch import run as launch
        from fleetune.errors import UserError

        try:
            launch.resume(run_path)
            self.tests.same(run_path, self.undisturbed)
        except UserError as error:
            named = victim is not None and (Path(victim).name in str(error) or victim == "spec.yaml")
            return "refused with its name" if named else f"refused: {error}"
        except AssertionError:
            return f"other bits: {traceback.format_exc(limit=2)}"
        except Exception:
            return f"broke: {traceback.format_exc()}"
        left = list(run_path.rglob("*.tmp"))
        return f"left {left}" if left else "the same bits"

    # -- kills --------------------------------------------------------------------------------------------------------
    def forked(self, at: int, workspace: Path, *, is_power_cut: bool = False) -> str:
        """A run in a fork that dies at its n-th step; what that step was."""
        plan(self.plan_folder, at, is_power_cut=is_power_cut)
        child = os.fork()
        if child == 0:
            try:
                die_on_plan(self.plan_folder)
                self.run(workspace)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.waitpid(child, 0)
        killed = self.plan_folder / "killed"
        return killed.read_text() if killed.exists() else ""

    def kills(self, number: int) -> None:
        self.forked(0, self.folder / "counted")
        num_steps = (self.plan_folder / "steps").stat().st_size
        for n in range(number):
            at = 1 + n * (num_steps - 1) // max(number - 1, 1)
            workspace = self.folder / f"killed-{n}"
            step = self.forked(at, workspace, is_power_cut=n % 2 == 1)
            found = list(workspace.glob("runs/*/spec.yaml"))
            outcome = self.outcome(found[0].parent) if found and step else "no run was begun" if step else "not killed"
            self.note("kill", f"step {at} of {num_steps}, {step}", outcome)
            shutil.rmtree(workspace, ignore_errors=True)

    def kills_of_actors(self, number: int, *, draw: random.Random) -> None:
        """The run itself goes on: a worker is replaced and its unit run again, a coordinator goes on after the last round."""
        plan(self.plan_folder, 0)
        self.run(self.folder / "counted")
        num_steps = (self.plan_folder / "steps").stat().st_size
        for n in range(number):
            plan(self.plan_folder, draw.randrange(1, num_steps), is_power_cut=False)
            run_path = self.run(self.folder / f"killed-{n}")
            killed = self.plan_folder / "killed"
            step = killed.read_text() if killed.exists() else "not killed"
            self.note("kill of an actor", step, self.outcome(run_path) if killed.exists() else step)

    # -- damage, full disks -------------------------------------------------------------------------------------------
    def damages(self, number: int | None, *, draw: random.Random) -> None:
        stopped = self.stopped()
        ways = ("gone", "emptied", "truncated", "0.0", *(f"{draw.random():.4f}" for _ in range(3)))
        cases = [(victim, how) for victim in self.tests.victims(stopped) for how in ways]
        for n, (victim, how) in enumerate(cases if number is None else draw.sample(cases, min(number, len(cases)))):
            copy = self.folder / f"damaged-{n}" / "runs" / stopped.name
            shutil.copytree(stopped, copy)
            self.tests.damage(copy / victim, how)
            self.note("damage", f"{victim} {how}", self.outcome(copy, victim=str(victim)))
            shutil.rmtree(copy.parent.parent)

    def stopped(self) -> Path:
        """A run that was stopped after four rounds."""
        from fleetune.errors import Stopped

        def report(event: dict[str, Any]) -> None:
            if event["kind"] == "round" and event["round"] == 4:
                raise KeyboardInterrupt

        try:
            self.run(self.folder / "stopped", report=report)
        except Stopped:
            (path,) = (self.folder / "stopped" / "runs").iterdir()
            return path
        raise AssertionError("the run was not stopped")

    def full_disks(self, every: int) -> None:
        from fleetune.errors import RunFailed, UserError

        replace, n = os.replace, 0
        outcome: Any = None
        while outcome is None or isinstance(outcome, UserError | RunFailed):
            n += every
            workspace = self.folder / f"full-{n}"
            os.replace = self.tests.failing_after(n, replace)
            outcome = self.tests.outcome_of(lambda where=workspace: self.run(where))
            os.replace = replace
            if isinstance(outcome, RunFailed):
                says = "No space left on device" in str(outcome) and "fleetune resume" in str(outcome)
                (run_path,) = (workspace / "runs").iterdir()
                self.note("full disk", f"write {n}", self.outcome(run_path) if says else f"says {outcome}")
            shutil.rmtree(workspace, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fleetune-kill-files-"))
    os.environ.setdefault("FLEETUNE_CACHE", str(folder / "cache"))
    os.environ["OMP_NUM_THREADS"] = "1"
    draw = random.Random(args.seed)
    if args.ray:
        os.environ[PLAN] = str(folder / "plan")
        plan(folder / "plan", 0)
        (folder / "python").mkdir()
        hook = "import os, sys\nif 'default_worker.py' in ' '.join(sys.orig_argv):\n    import kill_files, pathlib\n"
        hook += f"    kill_files.die_on_plan(pathlib.Path(os.environ[{PLAN!r}]))\n"
        (folder / "python" / "sitecustomize.py").write_text(hook)
        paths = [folder / "python", Path(__file__).parent, os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    campaign = Campaign(folder, "ray" if args.ray else "serial")
    campaign.undisturbed = campaign.run(folder / "whole")
    if args.ray:
        campaign.kills_of_actors(args.kills, draw=draw)
    else:
        campaign.kills(20 if args.short else args.kills)
        campaign.damages(20 if args.short else None, draw=draw)
        campaign.full_disks(9 if args.short else 1)
    for outcome, number in sorted(campaign.counts.items()):
        print(f"{number:4d}  {outcome}")
    if not campaign.wrong:
        shutil.rmtree(folder)
    return int(bool(campaign.wrong))


if __name__ == "__main__":
    sys.exit(main())
