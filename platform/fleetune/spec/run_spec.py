"""The frozen spec of a run, and the part of it that identifies the run's results."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Field, SerializeAsAny, Tag, WithJsonSchema

from fleetune.config import Config, flatten
from fleetune.data.config import DataConfig
from fleetune.fleet.fleet import FleetConfig
from fleetune.methods import METHODS
from fleetune.methods.base import MethodConfig
from fleetune.methods.fedavg import FedITConfig
from fleetune.models.config import ModelConfig
from fleetune.spec.run_config import CostConfig, EvaluationConfig, ExecutionConfig, RoundsConfig
from fleetune.spec.values import MAX_INTEGER
from fleetune.tracking.config import TrackingConfig
from fleetune.training.config import LocalConfig

OUTSIDE = "outside"  # stands for all methods that are not part of this package


def _kind_of_method(value: Any) -> Any:
    """The name of a built-in method, or `OUTSIDE` for the settings of another one, which `job_file.from_dict` has checked."""
    if isinstance(value, MethodConfig):
        return value.name if value.name in METHODS else OUTSIDE
    return value.get("name") if isinstance(value, dict) else None


if TYPE_CHECKING:
    AnyMethodConfig = MethodConfig
else:
    _built_in = (Annotated[method.Config, Tag(name)] for name, method in METHODS.items())
    _schema = {
        "title": "A method from outside",
        "description": "A class of your own. Its settings are checked when the job is read.",
        "type": "object",
        "properties": {"name": {"type": "string", "pattern": r"^[\w.]+:\w+$"}},
        "required": ["name"],
    }
    _outside = Annotated[SerializeAsAny[MethodConfig], WithJsonSchema(_schema), Tag(OUTSIDE)]
    _any = functools.reduce(operator.or_, (*_built_in, _outside))
    AnyMethodConfig = Annotated[_any, Discriminator(_kind_of_method)]

# Fields, or parts with all their fields, that change no bit of a result, and why. All others are in the hash.
NO_RESULT_CHANGES = {
    "name": "what a run is called",
    "tracking": "where records are sent",
    "execution.kind": "serial or Ray: work units, cohorts and the order of sums follow from the job alone",
    "execution.workers": "how many processes the same units go through",
    "execution.workers_per_gpu": "which of them share a GPU",
}

# Fields that came when there were runs on record, with the value at which a run is what it was without them. There they are left
# out of the hash, so that those runs stay what they are: a sweep finds them again, and `resume` goes on with them.
ADDED_LATER: dict[str, Any] = {
    "rounds.max_sim_seconds": None,
    "data.skills": [],
    "data.scored_by": "auto",
    "data.columns.reference": None,
    "data.reference_template": "{reference}\n{prompt}",
    "data.max_reference_tokens": None,
    "data.held_out": 0.0,
    "evaluation.personal": "none",
    # Split learning had a file of its own before it had a family.
    "method.cut_precision": "same",
    "method.head": "server",
    "method.aggregate_every": 1,
}


class RunSpec(Config):
    """Everything that determines a run."""

    name: str = Field("run", min_length=1, max_length=100)
    """Name of the job; runs of one name share an MLflow experiment."""
    seed: int = Field(0, ge=0, le=MAX_INTEGER)
    """Every random draw of the run is derived from it."""
    model: ModelConfig = ModelConfig()
    """The base model and its adapter."""
    data: DataConfig = DataConfig()
    """What is learnt, and who holds which part of it."""
    fleet: FleetConfig = FleetConfig()
    """The clients' devices and links."""
    rounds: RoundsConfig = RoundsConfig()
    """Rounds, sampling and closing."""
    local: LocalConfig = LocalConfig()
    """A client's optimizer steps."""
    method: AnyMethodConfig = FedITConfig()
    """The federated method and its settings."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When the global model is evaluated."""
    cost: CostConfig = CostConfig()
    """What is costed."""
    execution: ExecutionConfig = ExecutionConfig()
    """Where the work runs."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the records are sent."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested data, as in a job file with every default filled in."""
        return self.model_dump(mode="json")

    @property
    def spec_hash(self) -> str:
        """The spec's part of a run's identity: a hash of all fields but those that change no result, 16 hexadecimal digits.

        The other part is the content of the files that are read (`problem.content`).
        """
        values = {
            field: value
            for field, value in flatten(self.to_dict()).items()
            if changes_results(field) and (field not in ADDED_LATER or value != ADDED_LATER[field])
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def changes_results(field: str) -> bool:
    """True if a run's results depend on the dotted field, which is then part of the run's identity."""
    return not any(field == each or field.startswith(f"{each}.") for each in NO_RESULT_CHANGES)
