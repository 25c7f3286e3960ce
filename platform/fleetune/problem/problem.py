"""All that a run works on, loaded and checked before any work starts: base model, data, partition, fleet, method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.data.answers import AnswerReader
from fleetune.data.dataset import TokenizedDataset
from fleetune.data.partition import Partition, hold_out, partition, partition_keys
from fleetune.data.references import with_references
from fleetune.data.sources import load_records
from fleetune.data.tokenize import continuations, tokenize
from fleetune.errors import UserError
from fleetune.fleet.availability_trace import AvailabilityTrace
from fleetune.fleet.fleet import Fleet, build_fleet, read_availability
from fleetune.methods.base import Context, Method
from fleetune.methods.find import find_method
from fleetune.models.architectures import architecture
from fleetune.models.base import BaseModel
from fleetune.models.load import check_unchanged, load_base, load_tokenizer
from fleetune.models.network import linear_sites
from fleetune.problem.content import Content, check_devices, code_content, fleet_content, model_content
from fleetune.problem.input_checks import check_adapt, check_answers, check_length, room_of, within_vocabulary
from fleetune.problem.pooled import one_shard, server_alone
from fleetune.spec import RunSpec


@dataclass(frozen=True)
class EvalSet:
    """Held-out examples, as tokens and as text."""

    data: TokenizedDataset
    responses: list[str]
    """For each example the text that should follow its prompt."""


@dataclass(frozen=True)
class Inputs:
    """All that is read from disk: the heavy part of a problem, shared by every process of a node and by a sweep's trials."""

    base: BaseModel
    sites: dict[str, tuple[int, int]]
    """{site: (in, out)} of all linear layers that get an adapter."""
    train: TokenizedDataset
    """The n training examples of all clients together."""
    keys: np.ndarray
    """(n,) int64: what the partition goes by, such as each example's category."""
    evaluation: EvalSet
    dataset_name: str
    availability: AvailabilityTrace | None = None
    """When clients are available, if the job names a trace file."""
    content: Content = field(default_factory=dict)
    """Digests of all that was read (`content`)."""
    responses: list[str] = field(default_factory=list)
    """For each training example the text that should follow its prompt; empty unless clients hold some out."""
    reader: AnswerReader | None = None
    """Decodes generated answers as the model's tokenizer does: workers need nothing else of it, and import no transformers."""


@dataclass(frozen=True)
class Problem:
    """One run's inputs, and what follows from them by the spec."""

    job: RunSpec
    """The job as it was given. By it a run is known: in its directory, to a sweep, when it is resumed."""
    spec: RunSpec
    """What is carried out: the job, or for a pooled method the job of the server alone (`problem.pooled`)."""
    inputs: Inputs
    fleet: Fleet
    partition: Partition
    """What each client trains on."""
    method: Method
    held_out: Partition | None = None
    """What each client's own model is evaluated on (``data.held_out``)."""

    @property
    def content(self) -> Content:
        """Digests of all that was read, by the method as well, and of the code of a method from outside."""
        return {**self.inputs.content, **code_content(self.spec), **self.method.content()}

    @property
    def eligible(self) -> np.ndarray:
        """Ids of the clients that hold examples, ascending; only these can be sampled."""
        return np.flatnonzero(np.diff(self.partition.offsets) > 0)


def load_inputs(spec: RunSpec, *, base: BaseModel | None = None, cache_dir: Path | None = None) -> Inputs:
    """Read model, data and availability trace. Raises UserError with the field that names what is missing or does not fit.

    ``base``: a model that is loaded already, as between the trials of a sweep. Trace and model files must be the
    same before and after: a file that changes while it is read would give the run an identity that is not its own.
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
    if spec.method.traits.references:  # training alone: what is held out is answered without its solution
        train = with_references(train, records.train, tokenizer=tokenizer, config=config, room=room_of(base))
    held_out = tokenize(records.eval, tokenizer=tokenizer, config=config, cache_dir=cache_dir)
    check_length(config.max_tokens, base)
    train = within_vocabulary(train, tokenizer, base, what="the training examples")
    held_out = within_vocabulary(held_out, tokenizer, base, what="the held-out examples")
    check_answers(held_out, spec.evaluation, base)
    responses = []
    if config.held_out:
        check_answers(train, spec.evaluation, base, what="the training examples, of which clients hold some out")
        responses = continuations(records.train, train, tokenizer=tokenizer, config=config)
    keys = partition_keys(records.train, config=config.partition)[train.rows]
    return Inputs(
        base=base,
        sites=linear_sites(base, spec.model.lora),
        train=train.with_categories(keys),
        keys=keys,
        evaluation=EvalSet(held_out, continuations(records.eval, held_out, tokenizer=tokenizer, config=config)),
        dataset_name=records.name,
        availability=availability,
        content={**records.content, **model_content(base.content), **of_fleet},
        responses=responses,
        reader=AnswerReader.of(tokenizer),
    )


def context_of(spec: RunSpec, inputs: Inputs) -> Context:
    """What the job's method may look at."""
    return Context(
        inputs.base,
        spec.model.lora,
        inputs.sites,
        spec.rounds.num_rounds,
        spec.seed,
        inputs.train.num_categories,
        num_examples=len(inputs.train),
        evaluation_interval=spec.evaluation.every,
    )


def build_problem(spec: RunSpec, inputs: Inputs) -> Problem:
    """Build fleet, partition and method, with the checks that need several of them. Raises UserError if one fails."""
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
    method = find_method(spec.method.name)(spec.method, context_of(spec, inputs))
    method.check()
    check_adapt(spec, method)
    shards = partition(spec.data.partition, num_clients=spec.fleet.num_clients, keys=inputs.keys, seed=spec.seed)
    own = None
    if spec.data.held_out:
        shards, own = hold_out(shards, spec.data.held_out, seed=spec.seed)
    fleet = build_fleet(spec.fleet, spec.seed, trace=inputs.availability)
    check_devices(spec.fleet, inputs.content)
    problem = Problem(spec, spec, inputs, fleet, shards, method, own)
    if len(problem.eligible) < spec.rounds.clients_per_round:
        raise UserError(
            f"exceeds the {len(problem.eligible)} clients that hold examples",
            field="rounds.clients_per_round",
            value=spec.rounds.clients_per_round,
            hint="lower it, raise data.partition.alpha, or use more examples",
        )
    if method.traits.pooled:
        alone = server_alone(spec)
        return Problem(spec, alone, inputs, build_fleet(alone.fleet, spec.seed), one_shard(len(inputs.keys)), method)
    return problem


def set_threads(num_threads: int) -> None:
    """Set the threads of this process's matrix products: part of the spec, because they decide how sums round."""
    torch.set_num_threads(num_threads)


def base_to_arrays(base: BaseModel) -> dict[str, Any]:
    """The base model with its weights as NumPy arrays, which Ray's object store maps into each process without a copy."""
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
    """The inverse of `base_to_arrays`. Weights are views into the mapped memory, which is read-only: nobody writes to them."""
    weights = {name: torch.from_numpy(array) for name, array in parts["weights"].items()}
    return BaseModel(parts["name"], parts["config"], weights, parts["quantization"], parts["folder"], parts["content"])
