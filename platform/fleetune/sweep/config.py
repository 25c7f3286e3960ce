"""A sweep file: a base job and what is varied in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from fleetune.claims import config as claim_config
from fleetune.claims import pairs
from fleetune.claims.config import AnyClaim
from fleetune.columns import HIGHER_IS_BETTER
from fleetune.config import Config
from fleetune.errors import UserError
from fleetune.methods.find import look_in
from fleetune.spec import MAX_INTEGER, apply_overrides, as_user_error, plain, read_yaml

Metric = Literal[
    "eval_accuracy",
    "eval_loss",
    "eval_personal_accuracy",
    "eval_personal_loss",
    "train_loss",
    "sim_seconds",
    "uplink_bytes",
    "energy_joules",
]

MAX_TRIALS = 100_000  # assumed: more are a mistake
Bounded = Annotated[float, Field(ge=-1e30, le=1e30)]  # the width of a range is a number too
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]  # Optuna counts in floats, which hold no larger ones exactly


class Distribution(Config):
    """The range or list from which a searched field is drawn. Exactly one of these is set."""

    uniform: tuple[Bounded, Bounded] | None = None
    """A number between these two."""
    loguniform: tuple[Bounded, Bounded] | None = None
    """A number between these two positive ones, with uniform logarithm."""
    randint: tuple[Whole, Whole] | None = None
    """A whole number between these two, both included."""
    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values."""

    @model_validator(mode="after")
    def _one(self) -> Distribution:
        set_fields = {name: value for name, value in self if value is not None}
        if len(set_fields) != 1:
            raise ValueError("needs exactly one of uniform, loguniform, randint, choice")
        name, value = next(iter(set_fields.items()))
        if name != "choice" and not value[0] < value[1]:
            raise ValueError(f"{name} needs a smaller and a larger number")
        if name == "loguniform" and value[0] <= 0:
            raise ValueError("loguniform needs positive numbers")
        return self

    @property
    def kind(self) -> str:
        """The name of the field that is set."""
        return next(name for name, value in self if value is not None)

    def ends(self) -> list[Any]:
        """Values to check instead of all: both ends of a range, or every choice."""
        return list(getattr(self, self.kind))


class SearchConfig(Config):
    """A search: trials drawn from a space."""

    kind: Literal["random", "optuna"] = "random"
    """random: drawn independently, all before the first starts; optuna: each proposed from the results so far (TPE)."""
    num_trials: int = Field(ge=1, le=MAX_TRIALS)
    """Trials, before they are repeated for every seed of ``seeds``."""
    space: dict[str, Distribution] = Field(min_length=1)
    """Dotted field -> distribution, e.g. ``{local.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}}``."""
    seed: int = Field(0, ge=0, le=MAX_INTEGER)
    """Seed of the draws."""


class EarlyStopping(Config):
    """Asynchronous successive halving (ASHA): trials that fall behind at a rung are stopped."""

    kind: Literal["asha"] = "asha"
    """The rule that stops trials."""
    grace_rounds: int = Field(1, ge=1, le=1_000_000)
    """Rounds that every trial gets: the first rung. Each further rung is ``reduction_factor`` times as far."""
    reduction_factor: float = Field(3.0, gt=1.0, le=1e6)
    """At each rung, one in this many trials continues."""


class SweepSpec(Config):
    """Everything that determines a sweep. Give a grid, a search, or seeds alone."""

    name: str | None = Field(None, min_length=1, max_length=100)
    """Name of the sweep and of its MLflow experiment; null: the file's name."""
    base: dict[str, Any]
    """The job to vary: the path of a job file, relative to the sweep file or the current folder, or the job's fields."""
    grid: dict[str, tuple[Any, ...]] | None = None
    """Dotted field -> values. Every combination is a trial."""
    search: SearchConfig | None = None
    """Trials drawn from a space, instead of a grid."""
    seeds: tuple[int, ...] | None = None
    """Every trial is repeated with each of these seeds."""
    metric: Metric = "eval_accuracy"
    """The metric that ranks trials, for the best trial, search and early stopping. Accuracy is maximised, others minimised."""
    early_stopping: EarlyStopping | None = None
    """Stop trials that fall behind; null: every trial runs to its end."""
    max_concurrent: int | None = Field(None, ge=1, le=MAX_TRIALS)
    """Trials that run at the same time; null: as many as the cores hold."""
    claims: tuple[AnyClaim, ...] = ()
    """What a paper claims of these trials. They decide nothing about what is run: each gets a verdict from the results."""

    @field_validator("claims", mode="before")
    @classmethod
    def _claims(cls, value: Any) -> Any:
        return claim_config.read(value)

    @field_serializer("claims")
    def _plain_claims(self, claims: tuple[AnyClaim, ...]) -> list[dict[str, Any]]:
        return claim_config.plain(claims)

    @field_validator("base", mode="before")
    @classmethod
    def _mapping(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("must be the path of a job file, or a mapping of a job's fields")
        return value

    @model_validator(mode="after")
    def _something_is_varied(self) -> SweepSpec:
        if self.grid is not None and self.search is not None:
            raise ValueError("give a grid or a search, not both")
        if self.grid is None and self.search is None and not self.seeds:
            raise ValueError("needs a grid, a search or seeds: what is to be varied")
        varied = self.grid if self.grid is not None else self.search.space if self.search else {}
        if self.grid is not None and not self.grid and not self.seeds:
            raise UserError("is empty", field="grid", hint="for example grid: {method.growth_rate: [2, 4, 8]}")
        for field, values in (self.grid or {}).items():
            if not values:
                raise UserError("holds no values", field=f"grid.{field}", hint="give at least one, or take it out")
        if self.seeds is not None and "seed" in varied:
            raise ValueError("seed is varied twice: in seeds and as a field")
        if self.search is not None and self.search.kind == "optuna" and self.seeds and len(self.seeds) > 1:
            raise ValueError("an optuna search goes by one result per trial: give one seed, or search kind random")
        # The trials of a grid beyond the limit are refused when they are expanded; their pairs would take too long to list.
        if math.prod(len(values) for values in (self.grid or {}).values()) <= MAX_TRIALS:
            pairs.check(self.claims, self.grid, self.seeds)
        return self

    @property
    def sign(self) -> int:
        """1 if a higher metric is better, -1 if a lower one is."""
        return 1 if self.metric in HIGHER_IS_BETTER else -1


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SweepSpec:
    """Read a sweep file. ``overrides`` apply to its base job."""
    path = Path(path)
    values = read_yaml(path)
    look_in(path.parent)
    base = values.get("base")
    if isinstance(base, str):
        candidates = [path.parent / base, Path(base)]
        job = next((file for file in candidates if file.is_file()), candidates[-1])
        look_in(job.parent)
        values["base"] = read_yaml(job)
    elif base is None:
        raise UserError("a sweep needs a base", field="base", hint="base: jobs/quickstart.yaml")
    if isinstance(values["base"], dict):
        values["base"] = apply_overrides(values["base"], overrides or {})
    values = plain(values)
    values.setdefault("name", path.stem)
    try:
        return SweepSpec.model_validate(values)
    except ValidationError as error:
        raise as_user_error(error, SweepSpec) from None
