"""What every test needs: a cache of its own, no network, one thread, so that nothing outside decides a result."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" not in os.environ:  # processes that share the tests share a cache
    os.environ["FLEETUNE_CACHE"] = tempfile.mkdtemp(prefix="fleetune-cache-")
os.environ.setdefault("FLEETUNE_FILES", "unsynced")  # fsync takes milliseconds, and no test cuts the power
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest.register_assert_rewrite("fleetune.check.contract", "fleetune.check.runs")  # failures show the values

warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")


class RayTogether(LoadScopeScheduling):
    """Tests shared out over processes by their files; one process has all files that start Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if starts_ray(self.config.rootpath / file) else file


@functools.cache
def has_mark(path: Path, mark: str) -> bool:
    """Whether a file's tests, or some of them, are marked so."""
    return f"pytest.mark.{mark}" in path.read_text()


def starts_ray(path: Path) -> bool:
    """Whether a file's tests, or some of them, start Ray."""
    return has_mark(path, "ray")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayTogether:
    """A mark for groups would do, but pytest 9 does not show xdist 3.8 the groups."""
    return RayTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray comes first in its process, as it takes the longest, then the other files with slow tests, so that no
    process is left with one of them at the end; alone, files stay in their order.

    Tests of submitting come after all others that need Ray: its clients keep the token that they read first for as long as
    their process lives, and those of job servers read one that is no local cluster's.
    """
    is_shared_out = "PYTEST_XDIST_WORKER" in os.environ

    def place(item: pytest.Item) -> tuple[bool, bool, bool]:
        ray, slow = starts_ray(item.path), has_mark(item.path, "slow")
        return is_shared_out and not ray, is_shared_out and not ray and not slow, item.path.name == "test_submit.py"

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Matrix products round differently for another number of threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _pytorchs_kernels() -> None:
    """What one test chose for its process is not what the next one starts with."""
    from fleetune.models import kernels

    kernels.use(None)
