"""Clients whose work is not finite: their turn has failed, and the round is worked out as if they had not been sampled.

A client fails (``diverged``) if its loss, or any number that it brings back or keeps, is NaN or infinite. It has paid for its
full turn, because the server sees only what arrives; for the same reason nobody takes its place. The work of the others is
then done again with the weights of a round without it: sums that were formed with its weight cannot be mended for every
method (averages by rank row, a server's half that clients share, methods that read each update), and a round without any failure,
which is nearly every one, pays nothing for it. A round in which everybody fails leaves the state as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fleetune.engine.checkpoint.checkpoint import Progress
from fleetune.engine.execution.work_units import WorkUnitReply
from fleetune.engine.round.planner import RoundPlan
from fleetune.engine.round.rules import FAILED, OK
from fleetune.errors import RunFailed
from fleetune.methods.base import State
from fleetune.tensors import all_finite

MAX_FAILED_ROUNDS = 3
"""After so many rounds in a row in which everybody who worked failed, the run ends: each tried other clients or other batches
from the same state, so a further one would do no better. One bad round alone may be chance, and the run goes on after it."""


class Diverged(Exception):
    """A client that was counted on has diverged: the sums of this round are not to be used. All replies are in."""


def marked(now: RoundPlan, replies: Sequence[WorkUnitReply]) -> RoundPlan:
    """The round with those clients as failed that diverged according to the replies."""
    ids = [reply.client_ids[reply.diverged] for reply in replies]
    return fail(now, np.isin(now.client_ids, np.concatenate(ids) if ids else ()))


def fail(now: RoundPlan, who: np.ndarray) -> RoundPlan:
    """The round with some of its n clients as failed. ``who``: (n,) bool."""
    if not who.any():
        return now
    status = now.outcome.status.copy()
    status[who] = FAILED
    return replace(now, outcome=replace(now.outcome, status=status))


def settled(now: RoundPlan, before: State, after: State) -> tuple[State, RoundPlan]:
    """The state after a round: the one before, if the sum of finite updates is not finite; then all that counted have failed.

    Finite updates can still overflow when they are added up. Only tensors that the method replaced are looked at, as the others
    were finite before.
    """
    if all_finite(tensor for name, tensor in after.tensors.items() if tensor is not before.tensors.get(name)):
        return after, now
    return before, fail(now, now.outcome.status == OK)


def check_progress(progress: Progress, num_rounds: int) -> None:
    """Raises RunFailed if a further round would be in vain, or the run is over and nobody's work was ever finite."""
    num_ok, num_failed = (progress.totals.get(name, 0) for name in ("num_ok", "num_failed"))
    in_a_row = progress.failed_rounds >= MAX_FAILED_ROUNDS
    if not in_a_row and not (progress.next_round >= num_rounds and num_failed and not num_ok):
        return
    when = f"in {progress.failed_rounds} rounds in a row" if in_a_row else "in every round"
    outcome = "the last good adapter is kept" if num_ok else "the model is still untrained"
    raise RunFailed(
        f"every client that worked diverged {when}: its loss or its update was not finite ({outcome}; lower "
        "local.learning_rate, or bound the gradient with local.max_grad_norm)",
        round_idx=progress.next_round - 1,
    )


class Notices:
    """Sentences for people about a run's numbers that are not finite: one at the first client, one at the first evaluation."""

    def __init__(self) -> None:
        self._has_noted_evaluation = False

    def of(self, event: dict[str, Any]) -> Iterator[str]:
        """Sentences about a coordinator's event."""
        if event["kind"] != "round":
            return
        row = event["row"]
        failed = row["num_failed"]
        if failed and failed == event["totals"]["num_failed"]:  # the run's first, also of one that was resumed
            yield (
                f"round {row['round']}: {failed} of {row['num_clients']} clients diverged (loss or update not finite) and were "
                "left out; num_failed counts them from here on, and clients.parquet names them"
            )
        loss = row.get("eval_loss")
        if loss is not None and not math.isfinite(loss) and not self._has_noted_evaluation:
            self._has_noted_evaluation = True
            yield f"round {row['round']}: the evaluation's loss is not finite ({loss}); it is on record as that"
