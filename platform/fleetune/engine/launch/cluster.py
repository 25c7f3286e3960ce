"""Joining Ray in the background. It takes seconds in which a process can read, check and import, so it is begun early.

Imports nothing of fleetune that takes time: the command line begins here before it imports PyTorch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
import yaml

from fleetune.errors import UserError

# The job server sets it in the processes that it starts (ray._private.runtime_env.constants, 2.60).
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

TOKEN = "RAY_AUTH_TOKEN"
NO_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# For glibc, in bytes: workers keep the pages of large stacks instead of giving them back and faulting them in for every cohort.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2 << 30)}

LEAVE_SECONDS = 3.0  # assumed: it takes less than one if nothing hangs


class Cluster:
    """A Ray cluster that is being joined, or, with None for its address, started on this machine."""

    def __init__(self, address: str | None):
        self.address = address
        self._ready = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._connect, daemon=True).start()

    def _connect(self) -> None:
        try:
            connect(self.address)
        except BaseException as error:  # raised by `wait`, in the thread that needs the cluster
            self._error = error
        self._ready.set()
        threading.Event().wait()  # Ray's processes end with the thread that started them, so this one stays

    def is_up(self) -> bool:
        """True if it answers, False if it could not be joined; waits until one of both is certain."""
        self._ready.wait()
        return self._error is None

    def wait(self) -> None:
        """Return once it answers. Raises UserError if nothing does."""
        if not self.is_up():
            raise UserError(
                f"no Ray cluster answers: {(str(self._error).splitlines() or [type(self._error).__name__])[0]}",
                field="--address",
                value=self.address,
                hint="start one with `ray start --head`, or leave --address out; if it wants a token: RAY_AUTH_MODE=token",
            )


_clusters: dict[str | None, Cluster] = {}


def join(address: str | None) -> Cluster:
    """This process's cluster at an address; the first call begins to join it."""
    if address not in _clusters:
        _clusters[address] = Cluster(address)
    return _clusters[address]


def forget(address: str | None) -> None:
    """The next `join` tries anew."""
    _clusters.pop(address, None)


def forget_all() -> None:
    """The next `join` tries anew, at any address."""
    _clusters.clear()


def leave() -> None:
    """Leave every cluster. Of one that this process started on this machine, no process is left.

    Ray ends its own, but its agents look for their parent only now and then, and some were there 25 seconds later.
    """
    import psutil

    family = []
    for one in _clusters.values():
        one._ready.wait(LEAVE_SECONDS)  # processes that are still being started would be missed below
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(child.pid) == os.getsid(0):  # the process that feeds MLflow has a session of its own
                family.append(child)
    ending = threading.Thread(target=ray.shutdown, daemon=True)  # in a thread, because it hangs if the cluster is gone
    ending.start()
    ending.join(LEAVE_SECONDS)
    _, left = psutil.wait_procs(family, timeout=1.0)
    for child in left:
        with contextlib.suppress(psutil.Error):
            child.kill()


def names_ray(job: Path, assignments: Iterable[str]) -> bool:
    """True if the job file or an assignment sets ``execution.kind`` to ``ray``. The job is checked later, when it is loaded."""
    named = [value for name, _, value in (text.partition("=") for text in assignments) if name == "execution.kind"]
    if named:
        return named[-1] == "ray"
    with contextlib.suppress(Exception):
        return bool(yaml.safe_load(job.read_text())["execution"]["kind"] == "ray")
    return False


def connect(address: str | None) -> None:
    """Join the cluster at ``address``, or start one on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Actors that ask for no GPU see them all the same. It will be Ray's default, and says so unless it is set.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default of 15 lets anything else go first
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "0")  # default 1000: replies of many rounds pile up
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "namespace": "fleetune"}
    if address is None:  # "local", because without it Ray joins whatever cluster runs on this machine
        with _on_loopback():
            ray.init(address="local", num_cpus=max(num_cores(), 1), include_dashboard=False, **common)
    else:
        _knock(address)
        # A job of the cluster has its code already (fleetune submit), and Ray takes only one of both.
        sent = {} if IN_A_JOB in os.environ else {"py_modules": [str(Path(__file__).parent.parent)]}
        ray.init(address=address, runtime_env=sent, **common)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started in the block listens on 127.0.0.1 alone, and wants a token.

    Ray has no option for the first: it takes the address by which others reach this machine, and binds its ports on all
    interfaces, unless its clusters are switched off (ray._private.services.get_node_ip_address, 2.60). The token is the user's if
    there is one, else one of this process alone: in the environment, which other users cannot read, and in no file.
    """
    from ray import _raylet
    from ray._private import ray_constants

    if not os.environ.get(TOKEN) and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ[TOKEN] = secrets.token_hex(32)
    loader = getattr(_raylet, "AuthenticationTokenLoader", None)  # an older Ray has no tokens
    if loader is not None:
        loader.instance().reset_cache()  # a process that has used another cluster goes on showing that one's token
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[NO_CLUSTERS] = "0"  # for the processes that Ray starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[NO_CLUSTERS]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at HOST:PORT. Ray itself would try for minutes before it says so."""
    host, colon, port = address.rpartition(":")
    if colon and "://" not in address:
        if not port.isdecimal() or int(port) > 65535:
            raise OSError(f"{port!r} is no port")
        socket.create_connection((host, int(port)), timeout=10).close()
