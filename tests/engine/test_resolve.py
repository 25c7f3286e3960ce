"""What `auto` becomes on the nodes that are there, and which jobs they have no room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetune.engine.launch import backends
from fleetune.engine.launch import run as launch
from fleetune.engine.launch.resolve import gpu_fraction, resolve_execution
from fleetune.errors import UserError
from fleetune.spec.run_config import ExecutionConfig
from support import tiny


def resolved(
    node_cores: list[int],
    overrides: dict[str, Any] | None = None,
    *,
    method: str = "fedit",
    node_gpus: list[int] | None = None,
) -> dict[str, Any]:
    auto = {"execution": "auto", "rounds.clients_per_round": 6}
    spec = tiny.spec({**auto, **(overrides or {})}, method=method)
    return resolve_execution(spec, node_cores=node_cores, node_gpus=node_gpus).execution.model_dump()


# -- what auto becomes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("node_cores", "overrides", "kind", "workers", "threads", "cohort"),
    [
        ([1], {}, "serial", 1, 1, 6),
        ([2], {}, "ray", 2, 1, 3),
        ([4], {}, "ray", 4, 1, 2),
        ([64], {}, "ray", 6, 10, 1),  # no more workers than clients in a round; they share the cores
        ([8, 8], {}, "ray", 6, 2, 1),
        ([4], {"execution.workers": 2}, "ray", 2, 2, 3),
        ([4], {"execution.threads": 4}, "serial", 1, 4, 6),
        ([4], {"execution.workers": 2, "execution.threads": 1}, "ray", 2, 1, 3),
        ([4], {"execution.cohort": 5}, "ray", 4, 1, 5),
        ([1], {"local.batch_size": 64}, "serial", 1, 1, 2),  # 64 x 32 padded tokens each: two fill a step of 4,096
        ([1], {"local.batch_size": 256}, "serial", 1, 1, 1),  # one is more than that
        ([2], {"execution.kind": "serial"}, "serial", 2, 1, 3),  # the cohorts, and so the bits, of the run on Ray
    ],
)
def test_auto_keeps_every_core_busy(
    node_cores: list[int], overrides: dict[str, Any], kind: str, workers: int, threads: int, cohort: int
):
    chosen = resolved(node_cores, overrides)
    assert (chosen["kind"], chosen["workers"], chosen["threads"], chosen["cohort"]) == (kind, workers, threads, cohort)


def test_clients_that_share_a_server_half_are_one_worker_s_work():
    """SplitLoRA's clients meet in every step: a second worker would only wait."""
    assert resolved([4], method="split-lora")["kind"] == "serial"


def test_workers_that_do_not_fit_are_refused():
    with pytest.raises(
        UserError, match=r"execution\.workers=3: .* of 2 cores \(lower one of them, or set one to auto\)"
    ):
        resolved([2], {"execution.workers": 3, "execution.threads": 1})
    with pytest.raises(UserError, match="nodes of 3, 3 cores"):  # six cores, but no worker has a foot on two nodes
        resolved([3, 3], {"execution.workers": 3, "execution.threads": 2})


# -- GPUs -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("node_cores", "node_gpus", "overrides", "device", "kind", "workers", "threads", "cohort"),
    [
        ([8], [1], {}, "cuda", "serial", 1, 8, 6),  # one worker has the GPU, and all cores for what it prepares
        ([8], [2], {}, "cuda", "ray", 2, 4, 3),
        ([8], [2], {"execution.workers_per_gpu": 2}, "cuda", "ray", 4, 2, 2),
        ([8, 4], [1, 1], {}, "cuda", "ray", 2, 4, 3),
        ([8, 8], [4, 0], {}, "cpu", "ray", 6, 2, 1),  # workers would lie on both nodes
        ([8, 8], [4, 0], {"execution.device": "cuda"}, "cuda", "ray", 4, 2, 2),
        ([8], [1], {"execution.device": "cpu"}, "cpu", "ray", 6, 1, 1),
        ([8], [1], {"execution.workers": 2}, "cpu", "ray", 2, 4, 3),  # two workers were asked for, no matter where
        ([8], [1], {"execution.workers": 2, "execution.workers_per_gpu": 2}, "cuda", "ray", 2, 4, 3),
        ([8], [1], {"execution.workers": 2, "execution.kind": "serial"}, "cuda", "serial", 2, 4, 3),
    ],
)
def test_auto_takes_the_gpus_where_the_workers_find_room(
    node_cores: list[int],
    node_gpus: list[int],
    overrides: dict[str, Any],
    device: str,
    kind: str,
    workers: int,
    threads: int,
    cohort: int,
):
    chosen = resolved(node_cores, overrides, node_gpus=node_gpus)
    assert chosen["device"] == device
    assert (chosen["kind"], chosen["workers"], chosen["threads"], chosen["cohort"]) == (kind, workers, threads, cohort)


def test_what_was_decided_is_decided():
    """A spec from a run directory is resolved again where it goes on, and nothing in it changes."""
    spec = tiny.spec({"execution": "auto", "rounds.clients_per_round": 6})
    once = resolve_execution(spec, node_cores=[8], node_gpus=[2])
    assert resolve_execution(once, node_cores=[8, 16], node_gpus=[2, 4]) == once
    with pytest.raises(UserError, match=r"execution\.device='?cuda"):
        resolve_execution(once, node_cores=[8], node_gpus=[0])


def test_a_gpu_that_is_not_there_is_told_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before anything starts, on this machine as on a cluster."""
    monkeypatch.setattr(backends, "num_gpus", lambda: 0)
    with pytest.raises(UserError, match="there is no GPU that PyTorch can use") as error:
        launch.run(tiny.spec({"execution.device": "cuda"}), workspace=tmp_path)
    assert (error.value.field, error.value.value) == ("execution.device", "cuda")
    assert "set it to auto or cpu" in str(error.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no node has a GPU"):
        resolved([4, 4], {"execution.device": "cuda"})


def test_workers_that_find_no_room_on_the_gpus_are_refused():
    with pytest.raises(UserError, match=r"3 workers need more than the 1 GPU\(s\) .* raise execution\.workers_per_gpu"):
        resolved(
            [8], {"execution.device": "cuda", "execution.workers": 3, "execution.workers_per_gpu": 2}, node_gpus=[1]
        )


@pytest.mark.parametrize(("workers_per_gpu", "share"), [(1, 1.0), (3, 0.3333), (6, 0.1666)])
def test_the_shares_of_a_gpu_never_exceed_it(workers_per_gpu: int, share: float):
    """Ray counts in ten-thousandths and would round a sixth up: six of them would not fit."""
    execution = ExecutionConfig(device="cuda", workers_per_gpu=workers_per_gpu)
    assert gpu_fraction(execution) == share
    assert gpu_fraction(execution.model_copy(update={"device": "cpu"})) == 0.0
