"""fleetune as its user meets it: job files on disk, the command line in this process or in one of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from fleetune import cli
from fleetune.problem import Inputs
from support import tiny

QUICK = {"evaluation.generate": False, "execution.cohort": 1}


@dataclass(frozen=True)
class Output:
    """What a command left in the shell."""

    status: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """The JSON document of ``--json``: the last line, and the only one."""
        lines = self.stdout.splitlines()
        assert len(lines) == 1, self.stdout
        return json.loads(lines[0])


def job_file(folder: Path, overrides: Mapping[str, Any] | None = None, *, method: str = "fedit") -> Path:
    """A job file of the tiny world."""
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tiny.spec({**QUICK, **(overrides or {})}, method=method).to_dict()))
    return path


def fleetune(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Output:
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", ["fleetune", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capfd.readouterr()
    return Output(int(end.value.code or 0), out, err)


def start(*arguments: object, **variables: str) -> subprocess.Popen[str]:
    """Start a command as a process of its own, the leader of a group."""
    return subprocess.Popen(
        [sys.executable, "-m", "fleetune", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **variables},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, timeout_seconds: float = 200) -> Output:
    """Wait for its end."""
    out, err = process.communicate(timeout=timeout_seconds)
    return Output(process.returncode, out, err)


def poisoned(inputs: Inputs, rows: np.ndarray) -> Inputs:
    """The same data, but these training examples hold a token that the model has no embedding for."""
    data = inputs.train
    tokens = data.tokens.copy()
    for row in rows.tolist():
        tokens[data.offsets[row]] = 10**6
    return dataclasses.replace(inputs, train=dataclasses.replace(data, tokens=tokens))


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A command and all its processes, which are gone at the end whatever happens."""
    process = start(*arguments)
    family: list[psutil.Process] = []
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        end_group(process, family)


def end_group(process: subprocess.Popen[str], family: list[psutil.Process]) -> None:
    """kill -9 for the command's process group and whatever it had started in groups of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.communicate()
