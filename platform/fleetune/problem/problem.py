"""A run's inputs and all that follows from them by the spec: base model, data, partition, fleet, method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.data.answers import AnswerReader
from fleetune.data.dataset import TokenizedDataset
from fleetune.data.partition import Partition, partition, partition_keys
from fleetune.data.sources import load_records
from fleetune.data.tokenize import continuations, tokenize
from fleetune.errors import UserError
from fleetune.fleet.availability_trace import AvailabilityTrace
from fleetune.fleet.fleet import Fleet, build_fleet, read_availability
from fleetune.methods import METHODS
from fleetune.methods.base import Context, Method
from fleetune.models.architectures import architecture
from fleetune.models.base import BaseModel
from fleetune.models.load import check_unchanged, load_base, load_tokenizer
from fleetune.models.network import linear_sites
from fleetune.problem.content import Content, check_devices, fleet_content, model_content
from fleetune.problem.input_checks import check_adapt, check_answers, check_length, within_vocabulary
from fleetune.spec import RunSpec


@dataclass(frozen=True)
class EvalSet:
    """Held-out examples as tokens, and the texts that should follow their prompts."""

    data: TokenizedDataset
    responses: list[str]


@dataclass(frozen=True)
class Inputs:
    """Everything that is read from disk: the heavy part of a problem, shared by all processes of a node."""

    base: BaseModel
    sites: dict[str, tuple[int, int]]
    """Name -> (inputs, outputs) of each layer that gets an adapter."""
    train: TokenizedDataset
    keys: np.ndarray
    """The code of each training example by which the partition goes, int64 (n,); zeros if it goes by none."""
    evaluation: EvalSet
    dataset_name: str
    availability: AvailabilityTrace | None = None
    """The intervals in which clients are available, if the job names a trace file."""
    content: Content = field(default_factory=dict)
    """Part -> digest of all that was read (`problem.content`)."""
    reader: AnswerReader | None = None
    """Decodes generated answers as the model's tokenizer does: workers need nothing else of it, and import no transformers."""


@dataclass(frozen=True)
class Problem:
    """One run's inputs, and what follows from them by the spec."""

    spec: RunSpec
    inputs: Inputs
    fleet: Fleet
    partition: Partition
    method: Method

    @property
    def eligible(self) -> np.ndarray:
        """Ids of the clients that hold examples, and so can be sampled: int64 (m,), ascending."""
        return np.flatnonzero(np.diff(self.partition.offsets) > 0)


def load_inputs(spec: RunSpec, *, base: BaseModel | None = None, cache_dir: Path | None = None) -> Inputs:
    """Read model and data. Raises UserError with the field that names a missing or unfit file.

    ``base``: the base model if it is loaded already. A file that changes while it is read is refused: its digest would be that
    of neither content.
    """
    of_fleet = fleet_content(spec.fleet)
    availability = read_availability(spec.fleet, spec.seed)
    if fleet_content(spec.fleet) != of_fleet:
        path = spec.fleet.availability.path
        raise UserError("was changed while it was read", field="fleet.availability.path", value=path, hint="try again")
    records = load_records(spec.data, seed=spec.seed)
    base = base or load_base(spec.model)
    tokenizer = load_tokenizer(base.folder)
    check_unchanged(base)  # the tokenizer is read now, the weights perhaps long ago
    config = spec.data
    train = tokenize(records.train, tokenizer=tokenizer, config=config, cache_dir=cache_dir)
    held_out = tokenize(records.eval, tokenizer=tokenizer, config=config, cache_dir=cache_dir)
    check_length(config.max_tokens, base)
    train = within_vocabulary(train, tokenizer, base, what="the training examples")
    held_out = within_vocabulary(held_out, tokenizer, base, what="the held-out examples")
    check_answers(held_out, spec.evaluation, base)
    return Inputs(
        base=base,
        sites=linear_sites(base, spec.model.lora),
        train=train,
        keys=partition_keys(records.train, config=config.partition)[train.rows],
        evaluation=EvalSet(held_out, continuations(records.eval, held_out, tokenizer=tokenizer, config=config)),
        dataset_name=records.name,
        availability=availability,
        content={**records.content, **model_content(base.content), **of_fleet},
        reader=AnswerReader.of(tokenizer),
    )


def build_problem(spec: RunSpec, inputs: Inputs) -> Problem:
    """Build fleet, partition and method of a run. Raises UserError if they do not fit the inputs or each other."""
    if not inputs.sites:
        raise UserError("adapts no layer of this model", field="model.lora.targets", value=spec.model.lora.targets)
    widest = max(max(sizes) for sizes in inputs.sites.values())
    if spec.model.lora.rank > widest:
        rule = f"exceeds {widest}, the larger side of the model's largest adapted layer"
        raise UserError(rule, field="model.lora.rank", value=spec.model.lora.rank, hint="lower it")
    if spec.cost.model:
        costed = architecture(spec.cost.model)
        if spec.data.max_tokens > costed.max_positions:
            raise UserError(
                f"exceeds the {costed.max_positions} positions of the costed {costed.name}",
                field="data.max_tokens",
                value=spec.data.max_tokens,
                hint="lower it, or cost another model",
            )
    context = Context(inputs.base, spec.model.lora, inputs.sites, spec.rounds.num_rounds, spec.seed)
    method = METHODS[spec.method.name](spec.method, context)
    method.check()
    check_adapt(spec, method)
    shards = partition(spec.data.partition, num_clients=spec.fleet.num_clients, keys=inputs.keys, seed=spec.seed)
    fleet = build_fleet(spec.fleet, spec.seed, trace=inputs.availability)
    check_devices(spec.fleet, inputs.content)
    problem = Problem(spec, inputs, fleet, shards, method)
    if len(problem.eligible) < spec.rounds.clients_per_round:
        raise UserError(
            f"exceeds the {len(problem.eligible)} clients that hold examples",
            field="rounds.clients_per_round",
            value=spec.rounds.clients_per_round,
            hint="lower it, raise data.partition.alpha, or use more examples",
        )
    return problem


def set_threads(num_threads: int) -> None:
    """Set the threads of this process's matrix products. They are part of the spec, because they decide how sums round."""
    torch.set_num_threads(num_threads)


def base_to_arrays(base: BaseModel) -> dict[str, Any]:
    """The base model with its weights as NumPy arrays, which the object store maps without a copy."""
    arrays = {name: weight.numpy() for name, weight in base.weights.items()}
    return {
        "name": base.name,
        "config": base.config,
        "weights": arrays,
        "quantization": base.quantization,
        "folder": base.folder,
        "content": base.content,
    }


def base_from_arrays(parts: Mapping[str, Any]) -> BaseModel:
    """The inverse of `base_to_arrays`. Weights are views of read-only mapped memory: nobody may write to them."""
    weights = {name: torch.from_numpy(array) for name, array in parts["weights"].items()}
    return BaseModel(parts["name"], parts["config"], weights, parts["quantization"], parts["folder"], parts["content"])
