"""C2A: one generator for all, and a histogram that stays with its client."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from fleetune.methods.base import Context
from fleetune.methods.c2a import C2A, C2AConfig, histogram
from fleetune.models.architectures import ModelShape, architecture
from fleetune.models.config import LoRAConfig
from fleetune.models.generated import HISTOGRAM, Generator
from fleetune.models.load import load_base
from fleetune.models.model import Model
from fleetune.models.network import Network, linear_sites
from fleetune.models.outline import base_of
from fleetune.models.peft_format import CONFIG, OWN_CONFIG, load_tensors
from fleetune.models.submodel import Submodel
from fleetune.pricing.mapping import CostedModel
from fleetune.tensors import Tensors
from fleetune.training.evaluate import evaluate_rows
from support import REPOSITORY, runs, tiny

FAST = {"evaluation.generate": False}


def num_parameters(*, hidden: int, blocks: int, categories: int, units: int, code: int, latent: int) -> int:
    """t r c + c D (latent, basis) + r D (shift) + t L (by_block) + t (C + 1) + t (D + 1) (both linear maps) + r + D (biases)."""
    t, r, c = code, units, latent
    return t * r * c + c * hidden + r * hidden + t * blocks + t * (categories + 1) + t * (hidden + 1) + r + hidden


def method(shape: ModelShape, categories: int) -> C2A:
    base, lora = base_of(shape), LoRAConfig()
    return C2A(C2AConfig(), Context(base, lora, linear_sites(base, lora), 3, 0, categories))


def count(tensors: Tensors) -> int:
    return sum(t.numel() for t in tensors.values())


def test_parameters_are_as_many_as_in_the_authors_code():
    """48,032 for 6 blocks of width 768 and 10 labels, with r = 16, t = 8, c = 32."""
    shape = ModelShape("six", 6, 768, 3072, 12, 12, 64, 1000)
    assert count(method(shape, 10).start().tensors) == 48_032
    sizes = {"hidden": 768, "blocks": 6, "categories": 10, "units": 16, "code": 8, "latent": 32}
    assert num_parameters(**sizes) == 48_032


def test_bytes_on_another_architecture_are_those_of_its_sizes():
    """The tiny model's generator, laid out for LLaMA2-7B: 32 blocks of width 4096."""
    done = runs.problem(tiny.spec(FAST, method="c2a"))
    tensors = done.method.start().tensors
    small = {"categories": 4, "units": 3, "code": 2, "latent": 4}  # the tiny method's settings
    assert count(tensors) == num_parameters(hidden=32, blocks=4, **small)
    costed = CostedModel(done.inputs.base, architecture("llama2-7b"), axes=done.method.axes)
    assert costed.num_bytes(tensors, 4) == 4 * num_parameters(hidden=4096, blocks=32, **small)


def test_a_histogram_counts_what_the_client_works_on():
    """Rows 0, 1, 1 and 3 have the categories 2, 0, 0 and 2; -1 fills up a batch."""
    rows = np.array([[0, 1], [1, 3], [-1, -1]])
    assert histogram(np.array([2, 0, 1, 2]), rows, 4).tolist() == [0.5, 0.0, 0.5, 0.0]
    assert histogram(np.array([2]), rows[2:], 3).tolist() == [0.0, 0.0, 0.0]


def test_the_weights_depend_on_the_client_through_its_histogram_alone():
    """Three clients with one generator: equal histograms give equal weights, another one gives others."""
    start = method(ModelShape("small", 2, 16, 32, 2, 2, 8, 100), 3).start().tensors
    histograms = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    generator = Generator({**{name: torch.stack([t, t, t]) for name, t in start.items()}, HISTOGRAM: histograms})
    for code in generator.of_block:
        assert torch.equal(code[0], code[1])
        assert not torch.allclose(code[0], code[2], atol=1e-2)


def test_clients_train_with_their_own_histogram_and_do_not_send_it():
    """The same batch under two histograms has two losses; no histogram crosses the seam, in either direction."""
    done, passed = runs.recorded(tiny.spec(FAST, method="c2a"))
    ours, data = done.problem.method, done.problem.inputs.train
    for one in passed:
        assert one.partial_sum is not None
        names = {*one.partial_sum.unpack(), *(n for p in one.payloads.values() for n in p.tensors)}
        assert names
        assert all(name.startswith("generator.") for name in names)
        assert one.kept == {}
    cohort = passed[0].unit.cohorts[0]
    task, payload = passed[0].unit.tasks(cohort)[0], passed[0].payloads[cohort.payload]
    plan, worker = ours.local_plan(payload), runs.worker(done.problem)
    assert plan.per_client is not None
    own = plan.per_client(task, data)[HISTOGRAM]
    drawn = data.categories[task.rows].ravel().tolist()
    assert own.tolist() == [drawn.count(c) / len(drawn) for c in range(4)]

    loss = ours.local_update(worker, payload, [task]).losses[0]
    shifted = replace(data, categories=(data.categories + 1) % 4)
    worker.data = shifted
    assert ours.local_update(worker, payload, [task]).losses[0] != loss


def test_the_base_model_stays_as_it_is():
    done = runs.run(tiny.spec(FAST, method="c2a"))
    again = load_base(done.problem.spec.model)
    runs.same_tensors(done.problem.inputs.base.weights, again.weights)


def test_what_a_run_leaves_computes_its_last_loss():
    """The files of the run directory, read back and put into a network, give the loss that the run reported."""
    done = runs.run(tiny.spec(FAST, method="c2a"))
    folder = done.run_dir.path / "adapter"
    assert (folder / OWN_CONFIG).exists()
    assert not (folder / CONFIG).exists()
    adapter, inputs = load_tensors(folder), done.problem.inputs
    runs.same_tensors(adapter, done.deployed.adapter)
    assert adapter[HISTOGRAM].tolist() == [0.25] * 4
    network = runs.worker(done.problem).network(Model(Submodel.prefix(4)))
    sums = evaluate_rows(
        network, adapter, data=inputs.evaluation.data, responses=inputs.evaluation.responses,
        rows=np.arange(len(inputs.evaluation.data)), reader=None, max_new_tokens=None, answer_pattern="",
    )  # fmt: skip
    assert sums.loss / sums.num_tokens == pytest.approx(done.rounds["eval_loss"].iloc[-1], rel=1e-6)


def test_the_page_says_how_to_load_it():
    """The lines of docs/methods/c2a.md, run as they stand, give logits that are those of the network that the run used."""
    done = runs.run(tiny.spec(FAST, method="c2a"))
    page = (REPOSITORY / "docs" / "methods" / "c2a.md").read_text()
    lines = re.search(r"```python\n(.*?)```", page, flags=re.S)
    assert lines
    names: dict = {}
    exec(lines[1].replace("runs/c2a/adapter", str(done.run_dir.path / "adapter")), names)
    inputs = done.problem.inputs
    network = Network(inputs.base, Submodel.prefix(4), done.problem.spec.model.lora)
    network.set_adapter({name: tensor[None] for name, tensor in done.deployed.adapter.items()})
    ids = torch.arange(3, 11)[None]
    expected = network.logits(network.blocks(network.embed(ids)))
    torch.testing.assert_close(names["logits"](ids), expected, rtol=0, atol=0)
