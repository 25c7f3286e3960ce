"""What every test needs: a cache of its own, no network, one thread, so that nothing outside decides a result."""

from __future__ import annotations

import os
import tempfile
import warnings

import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:  # processes that share the tests share a cache
    os.environ["FLEETUNE_CACHE"] = tempfile.mkdtemp(prefix="fleetune-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

warnings.filterwarnings("ignore", message=".*MatMul8bitLt.*")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shared out over processes, one of them has all that starts Ray, from the beginning: it takes the longest."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


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
