"""The columns of all tables: name, Arrow type, meaning and unit, how they are summed up, and MLflow's metrics of them.

A new cost is added here, in one place: records, plans, reports and MLflow go by this table.

The table in ``docs/reference/records.md`` is made from here (:func:`markdown_table`), and a test holds the two
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Column:
    """One column: its name, the name of its Arrow type, its meaning in one line, and what is done with its values."""

    name: str
    type: str
    meaning: str
    kind: str = ""
    """How the values of several rows become one: ``sum``, ``mean`` or ``max``. ``part``: a summand of the largest value, taken
    from its row. ``budget``: the limit beside it. Empty: not at all. Of trials.parquet: the part of the run's result
    that holds it, ``metric`` or ``total``."""
    phase: str = ""
    """Of clients.parquet: the phase of a turn whose length it grows with (downlink, compute, uplink, or the whole turn)."""
    metric: str = ""
    """Of rounds.parquet: MLflow's metric, once a round."""
    has_total: bool = False
    """Of rounds.parquet: whether the sum since the first round is a metric, too, ``total/NAME``."""
    higher_is_better: bool = False
    """Of trials.parquet: whether a higher value is the better one. Losses and costs should be low."""
    title: str = ""
    """What tables and figures of a report call it. Of clients.parquet: a cost of a turn; of rounds.parquet: of a run."""

    @property
    def unit(self) -> str:
        """bytes, seconds, joules, flops, or empty: the last word of its name."""
        word = self.name.removesuffix("_max").rpartition("_")[2]
        return word if word in ("bytes", "seconds", "joules", "flops") else ""


UNTRAINED = 0
"""Where the untrained model stands among the numbers of rounds."""


def round_number(round_idx: int) -> int:
    """The number that tables, MLflow and messages give a round, from 1. Inside the engine the first round has the index 0."""
    return round_idx + 1


CLIENT_COLUMNS: tuple[Column, ...] = (
    Column("run_id", "string", "the run"),
    Column("round", "int32", "round, from 1"),
    Column("stage", "int32", "stage of a progressive method, from 0; empty for others"),
    Column("client_id", "int32", "client, from 0"),
    Column("device", "string", "device class of the client"),
    Column("status", "string", "ok, oom (refused for memory), refused (for another budget), dropped, late or failed"),
    Column("refused_by", "string", "the budget that a refused client would break: memory, seconds, joules or bytes"),
    Column("refused_hint", "string", "what would fit a refused client, in words"),
    Column("failure", "string", "why a failed client failed: diverged (its loss or its update is not finite)"),
    Column("shard_examples", "int64", "training examples that the client holds: its weight among those that count"),
    Column("num_examples", "int64", "training examples the client trained on in this round, each time it saw one"),
    Column("num_tokens", "int64", "tokens the client trained on in this round"),
    Column("batch_size", "int32", "examples of a step; the last one of a pass may have fewer"),
    Column("rank", "int32", "rank of the adapter that the client trains; 0 if it has none"),
    Column("depth", "int32", "blocks of the submodel that the client works with"),
    Column("checkpointing", "bool", "whether it computes blocks again instead of keeping their activations"),
    Column(
        "flops", "double", "floating-point operations on the client", kind="sum", phase="compute", title="operations"
    ),
    Column(
        "server_flops",
        "double",
        "floating-point operations on the server for this client (split learning)",
        kind="sum",
        phase="compute",
        title="server's operations",
    ),
    Column(
        "peak_memory_bytes",
        "int64",
        "largest memory needed at once; for a refused client what it would have needed",
        kind="max",
        title="peak memory",
    ),
    Column("weights_bytes", "int64", "part of the peak: frozen base weights", kind="part"),
    Column("adapter_bytes", "int64", "part of the peak: adapter", kind="part"),
    Column("gradient_bytes", "int64", "part of the peak: gradients", kind="part"),
    Column("optimizer_bytes", "int64", "part of the peak: optimizer state", kind="part"),
    Column("activation_bytes", "int64", "part of the peak: activations kept for the backward pass", kind="part"),
    Column(
        "budget_bytes",
        "int64",
        "memory that the client may use: what the device offers, or fleet.budgets",
        kind="budget",
        title="memory budget",
    ),
    Column(
        "downlink_bytes", "int64", "bytes from the server to the client", kind="sum", phase="downlink", title="received"
    ),
    Column("uplink_bytes", "int64", "bytes from the client to the server", kind="sum", phase="uplink", title="sent"),
    Column("compute_seconds", "double", "virtual time of computing", kind="mean", phase="compute", title="computing"),
    Column(
        "server_seconds",
        "double",
        "virtual time for which it waits for the server's half (split learning)",
        kind="mean",
        phase="compute",
        title="server's half",
    ),
    Column("downlink_seconds", "double", "virtual time of receiving", kind="mean", phase="downlink", title="receiving"),
    Column("uplink_seconds", "double", "virtual time of sending", kind="mean", phase="uplink", title="sending"),
    Column("sim_seconds", "double", "virtual time of the client's whole turn", kind="mean", title="whole turn"),
    Column("waiting_seconds", "double", "virtual time from the round's start to its turn, where clients work in turn"),
    Column("energy_joules", "double", "energy the device spent", kind="sum", phase="turn", title="energy"),
    Column("train_loss", "double", "mean training loss of the client's steps"),
    Column("wall_seconds", "double", "real time the simulation of this client took"),
)

PERSONAL_COLUMNS: tuple[Column, ...] = (
    Column("run_id", "string", "the run"),
    Column("round", "int32", "round after which the client was evaluated, from 1"),
    Column("client_id", "int32", "client, from 0"),
    Column("device", "string", "device class of the client"),
    Column("shard_examples", "int64", "training examples that the client holds"),
    Column("held_out_examples", "int64", "examples that it holds out, on which its own model is evaluated"),
    Column("held_out_tokens", "int64", "counted tokens of these examples"),
    Column("eval_loss", "double", "loss of the client's own model on them, in nats per token"),
    Column("eval_accuracy", "double", "share right of its own answers to them, 0 to 1; empty if none are generated"),
)

ROUND_COLUMNS: tuple[Column, ...] = (
    Column("run_id", "string", "the run"),
    Column("round", "int32", "round, from 1"),
    Column("stage", "int32", "stage of a progressive method, from 0; empty for others"),
    Column("num_available", "int32", "clients that could be chosen when the round began"),
    Column("num_clients", "int32", "clients chosen for the round"),
    Column("num_ok", "int32", "clients whose update counted", kind="sum", metric="clients/ok"),
    Column("num_oom", "int32", "clients refused for memory", kind="sum", metric="clients/oom"),
    Column("num_refused", "int32", "clients refused for time, energy or bytes", kind="sum", metric="clients/refused"),
    Column("num_dropped", "int32", "clients that left in the middle", kind="sum", metric="clients/dropped"),
    Column("num_late", "int32", "clients that came after the round's close", kind="sum", metric="clients/late"),
    Column(
        "num_failed",
        "int32",
        "clients whose work was not finite, and was left out",
        kind="sum",
        metric="clients/failed",
    ),
    Column("train_loss", "double", "training loss, the clients' mean weighted by examples", metric="train/loss"),
    Column("eval_loss", "double", "loss on the evaluation set; empty in rounds without evaluation", metric="eval/loss"),
    Column(
        "eval_accuracy", "double", "share right on the evaluation set, 0 to 1; empty likewise", metric="eval/accuracy"
    ),
    Column(
        "num_personal", "int32", "clients whose own model was evaluated; this and what follows: evaluation.personal"
    ),
    Column(
        "eval_personal_loss",
        "double",
        "loss of a client's own model on the examples that it holds out, mean over clients",
        metric="eval/personal_loss",
    ),
    Column("eval_personal_loss_std", "double", "its standard deviation over clients", metric="eval/personal_loss_std"),
    Column(
        "eval_personal_loss_worst",
        "double",
        "its mean over the tenth of the clients whose loss is highest",
        metric="eval/personal_loss_worst",
    ),
    Column(
        "eval_personal_accuracy",
        "double",
        "share right of a client's own model on the examples that it holds out, mean over clients",
        metric="eval/personal_accuracy",
    ),
    Column(
        "eval_personal_accuracy_std",
        "double",
        "its standard deviation over clients",
        metric="eval/personal_accuracy_std",
    ),
    Column(
        "eval_personal_accuracy_worst",
        "double",
        "its mean over the tenth of the clients that have fewest right",
        metric="eval/personal_accuracy_worst",
    ),
    Column(
        "sim_seconds",
        "double",
        "virtual time since the start of the run (cumulative)",
        metric="sim/seconds",
        title="virtual time",
    ),
    Column("waited_seconds", "double", "virtual time before the round in which no client was available"),
    Column("wall_seconds", "double", "real time of this round", kind="sum", metric="wall/seconds"),
    Column(
        "uplink_bytes",
        "int64",
        "bytes all clients sent in this round",
        kind="sum",
        metric="cost/uplink_bytes",
        has_total=True,
        title="uplink",
    ),
    Column(
        "downlink_bytes",
        "int64",
        "bytes all clients received in this round",
        kind="sum",
        metric="cost/downlink_bytes",
        has_total=True,
        title="downlink",
    ),
    Column(
        "energy_joules",
        "double",
        "energy all clients spent in this round",
        kind="sum",
        metric="cost/energy_joules",
        has_total=True,
        title="energy",
    ),
    Column(
        "peak_memory_bytes_max",
        "int64",
        "largest peak memory of a client that was not refused",
        metric="cost/peak_memory_bytes_max",
    ),
)

TRIAL_COLUMNS: tuple[Column, ...] = (
    Column("trial", "int32", "number of the trial, from 0"),
    Column("run_id", "string", "its run"),
    Column("run_dir", "string", "the run's directory, relative to the sweep's"),
    Column("status", "string", "finished, stopped (early, by the sweep), failed, running or missing (not started)"),
    Column("error", "string", "why it failed"),
    Column("spec_hash", "string", "identity of its results"),
    Column("method", "string", "the method's name"),
    Column("seed", "int64", "the run's seed"),
    Column("num_rounds", "int32", "rounds that are recorded"),
    Column("train_loss", "double", "training loss of the last round", kind="metric"),
    Column("eval_loss", "double", "loss on the evaluation set, of the last evaluation", kind="metric"),
    Column(
        "eval_accuracy",
        "double",
        "share right on the evaluation set, 0 to 1, of the last evaluation",
        kind="metric",
        higher_is_better=True,
    ),
    Column("baseline_eval_loss", "double", "loss of the untrained model", kind="metric"),
    Column(
        "baseline_eval_accuracy", "double", "share right of the untrained model", kind="metric", higher_is_better=True
    ),
    Column(
        "eval_personal_loss",
        "double",
        "loss of clients' own models on the examples that they hold out, mean over clients",
        kind="metric",
    ),
    Column("eval_personal_loss_std", "double", "its standard deviation over clients", kind="metric"),
    Column("eval_personal_loss_worst", "double", "its mean over the worst tenth of the clients", kind="metric"),
    Column(
        "eval_personal_accuracy",
        "double",
        "share right of clients' own models on these examples, mean over clients",
        kind="metric",
        higher_is_better=True,
    ),
    Column("eval_personal_accuracy_std", "double", "its standard deviation over clients", kind="metric"),
    Column(
        "eval_personal_accuracy_worst",
        "double",
        "its mean over the worst tenth of the clients",
        kind="metric",
        higher_is_better=True,
    ),
    Column("sim_seconds", "double", "virtual time of the run", kind="total"),
    Column("uplink_bytes", "double", "bytes that all clients sent", kind="total"),
    Column("downlink_bytes", "double", "bytes that all clients received", kind="total"),
    Column("energy_joules", "double", "energy that all clients spent", kind="total"),
    Column("num_oom", "double", "times a client was refused for memory", kind="total"),
    Column("num_dropped", "double", "times a client left in the middle", kind="total"),
    Column("num_late", "double", "times a client came after the round's close", kind="total"),
    Column("num_failed", "double", "times a client's work was not finite, and was left out", kind="total"),
)


def names(columns: tuple[Column, ...], *kinds: str) -> tuple[str, ...]:
    """The names of the columns of these kinds, in their order."""
    return tuple(column.name for column in columns if column.kind in kinds)


PERSONAL = tuple(column.name for column in TRIAL_COLUMNS if column.name.startswith("eval_personal_"))
"""How well clients' own models do, in rounds.parquet and trials.parquet."""

HIGHER_IS_BETTER = frozenset(column.name for column in TRIAL_COLUMNS if column.higher_is_better)
"""Results of a trial that should be high; all others should be low."""

MEMORY_PARTS = names(CLIENT_COLUMNS, "part")
"""What a client's peak memory consists of."""


def arrow_schema(columns: tuple[Column, ...]) -> pa.Schema:
    """The Arrow schema of a table with these columns."""
    import pyarrow as pa

    return pa.schema([(column.name, pa.type_for_alias(column.type)) for column in columns])


def markdown_table(columns: tuple[Column, ...]) -> str:
    """The columns as a Markdown table, for the documentation."""
    lines = ["| column | type | meaning |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| `{column.name}` | {column.type} | {column.meaning} |" for column in columns])
