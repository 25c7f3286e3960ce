"""The parts of a job file that belong to no other room: rounds, evaluation, execution and cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from fleetune.config import Config

MAX_PARTS = 100_000  # assumed: of workers, of their threads, and of clients that are stacked


class RoundsConfig(Config):
    """How many rounds, how many clients in each, and which replies count."""

    num_rounds: int = Field(20, ge=1, le=1_000_000)
    """Rounds of the run; the most, if virtual time ends it (max_sim_seconds)."""
    clients_per_round: int = Field(5, ge=1, le=10_000_000)
    """Clients sampled each round, without replacement, among those that hold examples."""
    close: Literal["all", "deadline", "first_k"] = "all"
    """When a round ends on the virtual clock: after all replies, at a deadline, or after the first k replies. Who is still
    at work then cannot be sampled before it is done; if nobody is free, the next round waits for the first."""
    deadline_seconds: float | None = Field(None, gt=0, le=1e9)
    """Virtual seconds after which replies are late (close: deadline)."""
    first_k: int | None = Field(None, ge=1, le=10_000_000)
    """Replies after which the others are late (close: first_k)."""
    max_sim_seconds: float | None = Field(None, gt=0, le=1e12)
    """Virtual seconds after which no round begins: the one in which they are over is the last, and is evaluated. null: no limit.
    Schedules (learning rates, stages) go by num_rounds all the same."""

    def is_over(self, num_rounds: int, sim_seconds: float) -> bool:
        """True if no round follows after so many, which took so much virtual time."""
        return num_rounds >= self.num_rounds or (
            self.max_sim_seconds is not None and sim_seconds >= self.max_sim_seconds
        )


class EvaluationConfig(Config):
    """When and how the global model is evaluated on the held-out examples."""

    every: int = Field(5, ge=1, le=1_000_000_000)
    """Rounds between evaluations; the last round is always evaluated, and so is the untrained model."""
    generate: bool = True
    """Generate answers and count exact matches (eval_accuracy); off: loss only."""
    num_answers: int | None = Field(None, ge=1, le=1_000_000_000)
    """Held-out examples, the first so many, whose answers are generated; null: all. The loss is that of all."""
    max_new_tokens: int = Field(64, ge=1, le=1_048_576)
    """Longest generated answer."""
    batch_size: int = Field(64, ge=1, le=1_000_000)
    """Examples that are evaluated together."""
    personal: Literal["none", "last", "every"] = "none"
    """Evaluate each client that has taken part with its own model on the part of its examples that it holds out
    (data.held_out): none; last: after the last round; every: whenever the global model is evaluated."""


class ExecutionConfig(Config):
    """Where the work runs. Only cohort, threads, device, precision and kernels change results: they round differently."""

    kind: Literal["auto", "ray", "serial"] = "auto"
    """ray: a pool of worker actors; serial: in this process; auto: ray if more than one worker can be busy."""
    workers: int | Literal["auto"] = "auto"
    """Worker actors through which clients pass. auto: one per core, as many as a round can keep busy."""
    cohort: int | Literal["auto"] = "auto"
    """Clients that train stacked, as one batch over the shared base. auto: enough for every worker, at most 16, and
    on processors no more than 4,096 padded tokens per step (local.batch_size times data.max_tokens for each client)."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads per worker; workers times threads never exceed the cores. auto: cores / workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where workers compute. auto: cuda if every node has a GPU and the workers find room there, else cpu."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of products in training and evaluation; bf16: autocast. Adapters, gradients and optimizer stay fp32."""
    kernels: Literal["auto", "compiled", "torch"] = "auto"
    """How norms, rotations, gates and the loss are computed. compiled: by code that this machine's C compiler makes once, in a
    quarter of a second, for fp32 on CPUs. auto: compiled if the machine that starts the run can, else torch."""
    workers_per_gpu: int = Field(1, ge=1, le=10_000)
    """Workers that share a GPU (device: cuda); each holds the base model once in the GPU's memory."""

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return {} if value == "auto" else value

    @field_validator("workers", "cohort", "threads", mode="wrap")
    @classmethod
    def _auto_or_positive(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            number = handler(value)
        except ValidationError:
            number = 0
        if number != "auto" and not 1 <= number <= MAX_PARTS:
            raise ValueError(f"must be auto or a whole number from 1 to {MAX_PARTS}")
        return number


class CostConfig(Config):
    """The architecture and the precision whose costs are counted."""

    model: str | None = None
    """Architecture to cost instead of the one that is trained, e.g. llama2-7b or its hub id; depth is mapped by fraction."""
    weights: Literal["model", "fp32", "bf16", "int8", "nf4"] = "model"
    """Storage of the frozen weights on the device; model: as model.quantization says (none: fp32)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic on the device."""
