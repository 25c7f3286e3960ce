"""Every method on a pretend device: all tensors are moved there, nothing is left behind, and updates come back."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fleetune.methods import METHODS
from support.elsewhere import NAME, Elsewhere, There, register

pytestmark = pytest.mark.slow

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "dofit": ("dofit", {"method.exchange": "mean"}),  # its step of fixed length would blow up the order of sums
    "split-lora in_turn": ("split-lora", {"method.server": "in_turn"}),
    "split-lora per_client": ("split-lora", {"method.server": "per_client"}),
    "generated answers": ("fedit", {"evaluation.generate": True}),
    "dropout": ("fedit", {"model.lora.dropout": 0.1}),
}


# SGD, because AdamW's first steps blow up differences of what is nearly zero.
PLAIN = {"evaluation.generate": False, "local.steps": 1, "local.optimizer": "sgd", "local.learning_rate": 1.0}
# Two clients in three rounds are enough to be stacked and to grow; every operation there goes through Python.
PLAIN |= {"rounds.clients_per_round": 2, "data.num_eval_examples": 4}


@functools.cache
def outcomes() -> dict[str, Any]:
    """Those of all cases, from a process of their own: PyTorch takes up a device before its first backward pass, or never."""
    child = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
        env=os.environ,
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*CASES, "a tensor that was left behind"])
def test_a_run_on_another_device_is_the_run_on_the_cpu(case: str):
    """The device is this machine's memory under another name, so losses and adapters agree to the order of sums."""
    outcome = outcomes()[case]
    if case in CASES:
        assert outcome["error"] == ""
        assert outcome["num_networks_there"] > 0
        assert outcome["distance"] < 1e-5
    else:
        assert outcome["error"] == f"add: a tensor (2,) lies on the CPU, others on {NAME}"


def outcome_of(case: str) -> dict[str, Any]:
    """One case in this process, on the CPU and on the device."""
    import torch

    from fleetune.models.network import Network
    from support import runs, tiny

    found = []
    set_adapter = Network.set_adapter

    def noted(network: Network, stacked: Any) -> None:
        found.append(network.device.type == NAME)
        assert all(isinstance(tensor, There) == found[-1] for tensor in (stacked or {}).values())
        set_adapter(network, stacked)

    method, overrides = CASES[case]
    spec = tiny.spec({**PLAIN, **overrides}, method=method)
    execution = spec.execution.model_copy(update={"device": NAME})
    try:
        here = runs.run(spec)
        Network.set_adapter = noted  # type: ignore[method-assign]
        with Elsewhere():
            there = runs.run(spec.model_copy(update={"execution": execution}))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        Network.set_adapter = set_adapter  # type: ignore[method-assign]
    shipped = [{**done.deployed.adapter, **done.deployed.model.held} for done in (here, there)]
    adapters = [torch.cat([t.flatten() for t in tensors.values()]) for tensors in shipped]
    distances = [float((adapters[0] - adapters[1]).abs().max())]
    distances += [float((here.rounds[c] - there.rounds[c]).abs().max()) for c in ("train_loss", "eval_loss")]
    return {"error": "", "num_networks_there": sum(found), "distance": max(distances)}


def left_behind() -> dict[str, Any]:
    """What a tensor that nobody moved would come to."""
    import torch

    with Elsewhere():
        try:
            torch.ones(2, device=NAME) + torch.ones(2)
        except AssertionError as error:
            return {"error": str(error)}
    return {"error": ""}


if __name__ == "__main__":
    register()
    print(json.dumps({**{case: outcome_of(case) for case in CASES}, "a tensor that was left behind": left_behind()}))
