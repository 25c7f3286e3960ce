"""Every method passes every check of its contract: a new entry in METHODS is in the matrix by itself.

The checks are in `fleetune.check.contract`, where `fleetune check` calls them for methods from outside.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from fleetune import spec as specs
from fleetune.check.contract import CHECKS, Case, NotApplicable
from fleetune.methods import METHODS
from support import REPOSITORY, tiny

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "devft+fedsa-lora": ("devft", {"method.aggregation": "fedsa-lora"}),
    "devft+fedprox": ("devft", {"method.aggregation": "fedprox", "method.inner.mu": 0.1}),
    "devft+dofit": ("devft", {"method.aggregation": "dofit", "method.inner": {"domains": 2, "step": 0.05}}),
    "fedsoda nf4": ("fedsoda", {"method.quantization": "nf4", "method.adapter_bits": 4}),
    "fedsoda threshold": ("fedsoda", {"method.threshold": 0.9, "method.similarity": "cka", "method.realign_every": 2}),
    "fwdllm sampled and paced": ("fwdllm", {"method.candidates": 3, "method.threshold": 0.5}),
    "sfl v2": ("sfl", {"method.version": "v2"}),
    "sl isolated": ("sl", {"method.isolated": True, "method.evaluates": "clients"}),
    "split-frozen cached": ("split-frozen", {"method.cache_activations": True}),
    "split-lora int8": ("split-lora", {"method.cut_precision": "int8"}),
    "split-lora fp16, head on client, every 2 rounds": (
        "split-lora",
        {"method.cut_precision": "fp16", "method.head": "client", "method.aggregate_every": 2},
    ),
    "lesft through": ("lesft", {"method.ref_grad": "through", "method.p_sal": 0.0014}),
    "lesft base every other round": ("lesft", {"method.paths": "base", "method.aggregate_every": 2}),
    "lesft per_client": ("lesft", {"method.server": "per_client"}),
    "smartfed equal quotas": ("smartfed", {"method.elastic": False, "method.record_fusion": True}),
    "smartfed adapters": (
        "smartfed",
        {"method.experts": "adapter", "method.adapters": [tiny.library_folder((2, 2, 2))]},
    ),
    "smartfed layer": ("smartfed", {"method.router": "layer", "method.residual": "round_robin", "method.gates": "all"}),
    "smartfed low-rank": ("smartfed", {"method.router": "low-rank", "method.router_rank": 2, "method.elastic": False}),
    "lora-flow with fusion": ("lora-flow", {"method.record_fusion": True, "method.bias": [-0.5, 0.5, 0.0]}),
    "linear-arithmetic tuned": ("linear-arithmetic", {"method.tune": True}),
    "lorahub of three": ("lorahub", {"method.candidates": 3, "method.examples": "fresh"}),
    "split-lora in_turn": ("split-lora", {"method.server": "in_turn"}),
    "split-lora per_client": ("split-lora", {"method.server": "per_client"}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {**{name: (name, {}) for name in METHODS}, **VARIANTS}

CHOOSES_ALL = {"method.quota": 7, "local.optimizer": "sgd", "local.learning_rate": 0.05}
WHEN_STACKED: dict[str, dict[str, Any]] = {
    # A step of fixed length along |G - m| blows up the rounding of domains that nearly agree, and AdamW that of gradients near 0.
    "dofit": {"method.exchange": "mean", "local.optimizer": "sgd", "local.learning_rate": 0.5},
    "devft+dofit": {"method.inner.exchange": "mean", "local.optimizer": "sgd", "local.learning_rate": 0.5},
    # Rounding decides which of two nearly equal experts is chosen: here all are. AdamW blows up the rounding of gradients near 0,
    # and steps of 0.5 that of a router which moves a hundred times as far as it does here.
    **dict.fromkeys(("smartfed", "smartfed equal quotas", "smartfed layer", "smartfed low-rank"), CHOOSES_ALL),
    "smartfed adapters": {**CHOOSES_ALL, "method.quota": 6},
}
"""What is set otherwise where cohorts of different sizes are compared, and why."""

MADE = {
    name: Case(method, tiny.METHOD_SETTINGS.get(method, {}), variant, WHEN_STACKED.get(name, {}))
    for name, (method, variant) in CASES.items()
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: str, case: str):
    try:
        CHECKS[check](MADE[case])
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_source_and_has_a_job_file(name: str):
    doc = sys.modules[METHODS[name].__module__].__doc__ or ""
    assert re.search(r"arXiv \d{4}\.\d{5}|\b(ICLR|ICML|NeurIPS|ACL|EMNLP) 20\d\d", doc)
    assert re.search(r"\b(19|20)\d\d\b", METHODS[name].source)
    job = REPOSITORY / "jobs" / "methods" / f"{name}.yaml"
    assert specs.load(job).method.name == name
