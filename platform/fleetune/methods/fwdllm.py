"""FwdLLM: clients measure slopes of the loss with forward passes alone, and the server takes the step.

Xu et al. 2024, "FwdLLM: Efficient Federated Finetuning of Large Language Models with Perturbed Inferences", USENIX ATC 2024,
arXiv 2308.13894. The estimator is that of Spall 1992 (simultaneous perturbation), with normal directions.

        client k      v ~ N(0, I) from a seed;  j = (L(theta + h v) - L(theta - h v)) / (2 h); sends j     (equation 1)
        server        g = sum_k p_k mean j v, every v drawn again from its seed                          (equation 2)
        pacing        Var = mean over elements of (a - b)^2 / 2, a and b the means of j v over two halves of the slopes;
                      Var > threshold: keep g, ask the same clients for more directions on the same examples
        step          theta <- theta - lr mean g, over all that was kept                                 (equation 3)

theta is the adapter, and stays as it is for a client's full round: its steps are batches on which it measures. E[j v] is the
gradient as h -> 0, and the mean of N of them points along it with a cosine of about sqrt(N / (N + d)) in d dimensions.

Discriminative sampling draws several candidates for every direction that is needed and keeps those with the largest cosine with
the gradient that was applied last. The server then sends that gradient along, and a client says which candidates it kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fleetune.errors import UserError
from fleetune.methods.base import GlobalModel, Method, MethodConfig, Payload, PrivateStates, State, Update
from fleetune.methods.traits import Traits
from fleetune.scopes import ADAPTERS, part
from fleetune.seeds import seed_of
from fleetune.tensors import Stack, Tensors, add_weighted, select
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan, none
from fleetune.training.slopes import measure_slopes, slopes_and_directions
from fleetune.training.worker import Worker

# Beginnings of the names of tensors that are no part of the adapter: the gradient that was applied last, the sum of those that
# wait, and the monitored tensor's part of that sum from each half of the slopes, with that half's weight.
LAST, SUM, HALVES = "last.", "sum.", ("half0.", "half1.")


class FwdLLMConfig(MethodConfig):
    """Settings of FwdLLM."""

    name: Literal["fwdllm"] = "fwdllm"
    directions: int = Field(1, ge=1, le=10_000)
    """Directions per batch, each of which takes two forward passes. The paper takes one."""
    h: float = Field(0.01, gt=0, le=1e3)
    """How far the adapter is moved along a direction, either way."""
    learning_rate: float = Field(0.01, ge=0, le=1e6)
    """Step size of the server, whose step is the only one; the job's local.learning_rate and optimizer are not used."""
    warm_up_rounds: int = Field(0, ge=0, le=1_000_000)
    """Rounds in which the step size rises linearly to its full value."""
    schedule: Literal["constant", "linear"] = "constant"
    """Step size after the warm-up: constant, or falling linearly to 0 at the end of the run, as the authors' code has it."""
    threshold: float | None = Field(None, ge=0, le=1e12)
    """Variance above which gradients wait for more directions; null: every round takes a step, and nothing is measured. The
    paper takes 0.1 to 0.2, but the variance scales with the square of the loss's slope and falls with every direction more."""
    candidates: int = Field(1, ge=1, le=1000)
    """Candidates drawn for each direction that is used; 1: all are used. The paper takes 10."""

    @property
    def traits(self) -> Traits:
        """Forward passes only."""
        return Traits(backward=False)


class FwdLLM(Method):
    """Server state: the adapter, the gradient applied last (for discriminative sampling), and sums of gradients that wait."""

    Config = FwdLLMConfig
    source: ClassVar[str] = "forward passes alone, scalars go up (Xu et al. 2024, arXiv 2308.13894)"

    def check(self) -> None:
        """Both losses of a direction are of the same function, and the warm-up ends."""
        if self.context.lora.dropout:
            raise UserError(
                "must be 0: the two losses whose difference is taken would be of different functions",
                field="model.lora.dropout",
                value=self.context.lora.dropout,
                hint="set it to 0",
            )
        if self.config.warm_up_rounds >= self.context.num_rounds:
            raise UserError(
                f"never ends within {self.context.num_rounds} rounds",
                field="method.warm_up_rounds",
                value=self.config.warm_up_rounds,
                hint="lower it, or raise rounds.num_rounds",
            )

    # -- server ---------------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """The initial adapter; no gradient waits."""
        return State(self.context.fresh_adapter(), {"waiting": 0, "drawn_from": None, "variance": None})

    def drawn_from(self, state: State, round_idx: int) -> int:
        """While gradients wait, the round that the first of them is of."""
        return round_idx if state.values["drawn_from"] is None else int(state.values["drawn_from"])

    def broadcast(self, state: State, round_idx: int, group: Hashable) -> Payload:
        """The adapter, and the last gradient if there is one."""
        return Payload(select(state.tensors, lambda name: is_adapter(name) or name.startswith(LAST)))

    def summand(self, payload: Payload, received: Stack, tasks: Sequence[ClientTask]) -> Stack:
        """Each client's gradient mean j v, (K, …); with pacing also the monitored tensor's part of it in either half."""
        adapter = self.client_adapter(payload)
        shapes = {name: tuple(t.shape) for name, t in adapter.items()}
        *_, monitored = shapes
        size, size_monitored = sum(t.numel() for t in adapter.values()), adapter[monitored].numel()
        out = []
        for k, task in enumerate(tasks):
            sent = received.client(k)
            share = 1.0 / max(1, len(task.rows) * self.config.directions)
            total, halves, weights = torch.zeros(size), torch.zeros(2, size_monitored), torch.zeros(2, 1)
            # A client's slopes take turns. A coin says which half has the first: it may be the client's only one.
            coin = seed_of(task.seed, "half") % 2
            measured = slopes_and_directions(task, sent["slopes"], sent.get("numbers"), size)
            for index, (slope, direction) in enumerate(measured):
                total.add_(direction, alpha=slope * share)
                turn = (coin + index) % 2
                halves[turn].add_(direction[-size_monitored:], alpha=slope * share)
                weights[turn] += share
            named = {SUM + name: t for name, t in Stack(shapes, total[None]).client(0).items()}
            if self.config.threshold is not None:
                for half, part_of_it, weight in zip(HALVES, halves, weights, strict=True):
                    named |= {half + monitored: part_of_it.view(shapes[monitored]), half + "weight": weight}
            out.append(named)
        return Stack.of(out)

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """A step along the mean of all gradients that wait, this round's included; none if their variance is too large."""
        sums = {name: t.clone() for name, t in state.tensors.items() if name.startswith((SUM, *HALVES))}
        for update in updates:
            add_weighted(sums, update.tensors, update.weight)
        num_rounds = state.values["waiting"] + 1
        variance = variance_of(sums)
        if self.config.threshold is not None and (np.inf if variance is None else variance) > self.config.threshold:
            values = {"waiting": num_rounds, "drawn_from": self.drawn_from(state, round_idx), "variance": variance}
            return State({**state.tensors, **sums}, values)
        # Each round's weights add up to 1, so that the sum over rounds is as many gradients.
        gradient = {name.removeprefix(SUM): t / num_rounds for name, t in sums.items() if name.startswith(SUM)}
        rate = self.learning_rate_at(round_idx)
        tensors = {name: t - rate * gradient[name] for name, t in select(state.tensors, is_adapter).items()}
        if self.config.candidates > 1:
            tensors |= {LAST + name: t for name, t in gradient.items()}
        return State(tensors, {"waiting": 0, "drawn_from": None, "variance": variance})

    def expected(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """As if every round took a step: from the first one on, the last gradient is sent along."""
        adapter = select(state.tensors, is_adapter)
        last = {LAST + name: t for name, t in adapter.items()} if self.config.candidates > 1 and list(updates) else {}
        return State({**state.tensors, **last}, state.values)

    def learning_rate_at(self, round_idx: int) -> float:
        """The server's step size: a linear rise over the warm-up, then constant or a linear fall to 0."""
        warm_up, num_rounds = self.config.warm_up_rounds, self.context.num_rounds
        if round_idx < warm_up:
            return float(self.config.learning_rate * (round_idx + 1) / warm_up)
        left = (num_rounds - round_idx) / (num_rounds - warm_up) if self.config.schedule == "linear" else 1.0
        return float(self.config.learning_rate * left)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """All blocks with the adapter."""
        return GlobalModel(self.context.whole_model, select(state.tensors, is_adapter))

    def columns(self, state: State) -> dict[str, float]:
        """With pacing: the rounds whose gradients wait, and the variance, NaN if one half was empty."""
        if self.config.threshold is None:
            return {}
        variance = state.values["variance"]
        return {"waiting": float(state.values["waiting"]), "variance": np.nan if variance is None else variance}

    # -- client ---------------------------------------------------------------------------------------------------------
    def local_plan(self, payload: Payload) -> LocalPlan:
        """No tensor of the adapter receives a gradient or goes up."""
        return LocalPlan(self.model(payload), trainable=none, uploads=none)

    def client_adapter(self, payload: Payload) -> Tensors:
        """theta."""
        return select(payload.tensors, is_adapter)

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """Slopes along every client's own directions, for all clients of the cohort at once."""
        adapter = self.client_adapter(payload)
        with part(ADAPTERS):
            last = [payload.tensors[LAST + name].reshape(-1) for name in adapter if LAST + name in payload.tensors]
            towards = torch.cat(last) if last else None
        found = measure_slopes(
            worker.network(self.model(payload)),
            adapter,
            tasks,
            data=worker.data,
            num_directions=self.config.directions,
            h=self.config.h,
            candidates=self.config.candidates,
            towards=towards,
        )
        # Without a choice the server knows the numbers. They are sent as floats, which are exact up to 2^24.
        sent = {"slopes": found.slopes} if towards is None else {"slopes": found.slopes, "numbers": found.numbers}
        rows = np.concatenate([array.reshape(len(tasks), -1) for array in sent.values()], axis=1)
        return CohortUpdate(
            upload=Stack({name: array.shape[1:] for name, array in sent.items()}, torch.from_numpy(rows)),
            upload_bytes=np.array([4 * len(sent) * self.config.directions * len(task.rows) for task in tasks]),
            losses=found.losses,
            num_tokens=found.num_tokens,
        )


def is_adapter(name: str) -> bool:
    """True for a tensor of the adapter itself, of all that the state or a payload holds."""
    return not name.startswith((LAST, SUM, *HALVES))


def variance_of(sums: Tensors) -> float | None:
    """The mean over elements of (a - b)^2 / 2 for the monitored tensor's means a and b over two halves of the slopes.

    None if one half is empty, or nothing is monitored.
    """
    weights = [float(sums.get(half + "weight", torch.zeros(1))) for half in HALVES]
    if min(weights) <= 0:
        return None
    a, b = (
        next(t for name, t in sums.items() if name.startswith(half) and name != half + "weight") / weight
        for half, weight in zip(HALVES, weights, strict=True)
    )
    return float((a - b).square().mean() / 2)
