"""The evaluation of a run's models: the global model of a round, and the untrained model, which runs of one base share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fleetune.engine.execution.executor import Executor
from fleetune.engine.pending_rounds import PendingQuality
from fleetune.methods.base import GlobalModel
from fleetune.models.adapters import adds_nothing
from fleetune.problem import Problem

Baselines = dict[str, PendingQuality]
"""What decides the untrained model's quality -> that quality. Passed from run to run within a process, so that the trials of a
sweep evaluate the untrained model once."""


class Evaluator:
    """Begins evaluations on the held-out examples; nobody waits for them here."""

    def __init__(self, problem: Problem, executor: Executor, baselines: Baselines):
        self.problem, self.executor, self.baselines = problem, executor, baselines

    def evaluate(self, models: GlobalModel | Mapping[str, GlobalModel]) -> PendingQuality:
        """Loss and accuracy of a model, or of several by name, in chunks that any worker can take."""
        num_examples = len(self.problem.inputs.evaluation.data)
        size = self.problem.spec.evaluation.batch_size
        chunks = [np.arange(start, min(start + size, num_examples)) for start in range(0, num_examples, size)]
        named = {"": models} if isinstance(models, GlobalModel) else models
        distinct = {id(model): model for model in named.values()}  # a model of two names is evaluated once
        begun = {key: self.executor.evaluate(model, chunks) for key, model in distinct.items()}
        return PendingQuality({name: begun[id(model)] for name, model in named.items()})

    def untrained(self, model: GlobalModel | Mapping[str, GlobalModel]) -> PendingQuality:
        """The quality of the model that a run starts from.

        With pairs of B = 0 in all its blocks it is the base model, whatever the method and A are; so runs over one base and data
        share it.
        """
        num_layers = self.problem.inputs.base.num_layers
        if not isinstance(model, GlobalModel) or not model.model.is_base(num_layers) or not adds_nothing(model.adapter):
            return self.evaluate(model)
        key = self._baseline_key()
        # An evaluation that is not done belongs to another run, which may have failed: it might never come.
        if key not in self.baselines or not self.baselines[key].is_done():
            self.baselines[key] = self.evaluate(model)
        return self.baselines[key]

    def _baseline_key(self) -> str:
        """All that the base model's quality depends on, down to how its products round; the fleet has no part in it."""
        spec, inputs = self.problem.spec, self.problem.inputs
        data = spec.data.model_dump_json(exclude={"partition"})
        products = spec.execution.model_dump(include={"threads", "device", "precision", "kernels"})
        content = sorted(pair for pair in inputs.content.items() if not pair[0].startswith("fleet."))
        return f"{inputs.base.key} {content} {data} {spec.evaluation} {spec.seed} {products}"
