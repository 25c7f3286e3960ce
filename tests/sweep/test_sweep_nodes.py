"""Three nodes, each with its own raylet and one core: a lost node costs no result, and neither does a lost driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from fleetune.records import SweepDirectory
from fleetune.sweep.status import SweepStatus
from support.commands import started
from support.sweeping import kill_after, local_ray, one_by_one, same_as, sweep, sweep_file

__all__ = ["local_ray"]
pytestmark = [pytest.mark.ray, pytest.mark.nodes]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without cores of its own."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def cluster(nodes: Cluster) -> Cluster:
    """With three nodes of one core each, whatever became of those before."""
    while len(nodes.worker_nodes) < 3:
        nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    return nodes


def lose_node_of(cluster: Cluster, process_name: str) -> None:
    """A node that such a process runs on is gone from one moment to the next, with everything on it."""
    # With what it is asked for named, the iterator passes over processes that end meanwhile.
    found = [one.info for one in psutil.process_iter(["cmdline", "ppid"])]
    working = [info["ppid"] for info in found if process_name in " ".join(info["cmdline"] or ())]
    nodes = [n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid in working]
    cluster.remove_node(nodes[0], allow_graceful=False)


class LoseNode:
    """Takes a node away once a trial has finished two rounds."""

    def __init__(self, cluster: Cluster, process_name: str):
        self.cluster, self.process_name, self.is_done = cluster, process_name, False

    def __call__(self, sweep_status: SweepStatus) -> None:
        if not self.is_done and any(entry.num_rounds == 2 for entry in sweep_status.entries.values()):
            self.is_done = True
            lose_node_of(self.cluster, self.process_name)


def test_a_gang_that_fits_on_no_set_of_nodes_is_refused_at_once(cluster: Cluster, tmp_path: Path):
    """Four workers for three places, and two cores where no node has more than one."""
    for wish, lack in (
        ({"execution.workers": 4}, "4 workers"),
        ({"execution.workers": 2, "execution.threads": 2}, "2 workers"),
    ):
        path = sweep_file(tmp_path, base={"execution.kind": "ray", **wish}, seeds=[0])
        with pytest.raises(ValueError, match=rf"a trial needs {lack} of .* nodes of 1, 1, 1 cores"):
            sweep(path, tmp_path / "ws", address=cluster.address)
    assert not (tmp_path / "ws" / "sweeps").exists()


def test_a_sweep_outlives_its_driver_and_a_node(cluster: Cluster, tmp_path: Path):
    """kill -9 of the command, and a node gone in the middle of the next launch: the records of trials run one by one."""
    path = sweep_file(tmp_path)
    with started("sweep", path, "-w", tmp_path, "--address", cluster.address) as process:
        kill_after(process, tmp_path, num_rounds=2, timeout_seconds=150)
    lost = LoseNode(cluster, "TrialProcess")
    result = sweep(path, tmp_path, lost, address=cluster.address)
    assert lost.is_done
    assert result.trials == {"finished": 4}
    same_as(SweepDirectory.open(result.sweep_dir), one_by_one(path))


def test_a_gang_across_nodes_outlives_one_of_them(cluster: Cluster, tmp_path: Path):
    """Two workers on two nodes; one of these is lost, the third takes its place: the bits of one process."""
    gang: dict[str, Any] = {"execution.kind": "ray", "execution.workers": 2, "execution.cohort": 1}
    path = sweep_file(tmp_path, base=gang, seeds=[0])
    lost = LoseNode(cluster, "RayWorker")
    result = sweep(path, tmp_path, lost, address=cluster.address)
    assert lost.is_done
    assert result.trials == {"finished": 1}
    same_as(SweepDirectory.open(result.sweep_dir), one_by_one(path))
