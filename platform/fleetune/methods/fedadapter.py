"""FedAdapter: small adapters in the highest blocks, which grow deeper or wider by trial on the clock.

Cai, Wu, Wang, Lin and Xu 2023, "Efficient Federated Learning for Modern NLP" (FedAdapter, first called AutoFedNLP), MobiCom 2023,
arXiv 2205.10162. Steps and rules are those of the authors' code.

        adapter (d, w)     y + U relu(D y + b) + u  after the feed-forward half y of each of the highest d blocks (section 2);
                           D (w, hidden), b (w), U (hidden, w), u (hidden)
        a trial compares   stay (d, w)      wide (d, w + step)      deep (d + step, w)
        it lasts           T (e d + 1) seconds of virtual time      (60 to 90 s and e = 4 in the code)
        its winner         the branch of best accuracy; of equals the first of stay, wide, deep

Each client of a round works for one branch. When a trial's time is over, the winner is kept, and the next trial's branches go on
from its weights. Growth changes no function: a new unit has a random row in D and zeros in b and U, a new block has nothing else.

Blocks below the highest d are frozen and hold no adapter, so no backward pass enters them and nothing of them is saved for one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fleetune.errors import UserError
from fleetune.methods.base import (
    MAIN,
    ClientInfo,
    GlobalModel,
    Method,
    MethodConfig,
    Payload,
    PrivateStates,
    Report,
    State,
    Update,
)
from fleetune.methods.traits import Traits
from fleetune.models.adapters import rank_axis
from fleetune.seeds import seed_of
from fleetune.tensors import Tensors, add_weighted

STAY, WIDE, DEEP = "stay", "wide", "deep"
"""The branches of a trial, in the order in which the first of equals wins."""


class FedAdapterConfig(MethodConfig):
    """Settings of FedAdapter. model.lora plays no part: the adapters are bottlenecks, and their width is their rank."""

    name: Literal["fedadapter"] = "fedadapter"
    depth: int = Field(1, ge=1, le=10_000)
    """Blocks d with an adapter at first, counted from the highest. The paper starts at 0 or 1; at 0 there is only a classifier
    to train, which a language model does not have."""
    width: int = Field(8, ge=1, le=16_384)
    """Units w of each adapter at first. The paper starts at 8."""
    depth_step: int = Field(1, ge=1, le=10_000)
    """Blocks by which the deep branch is deeper."""
    width_step: int = Field(8, ge=1, le=16_384)
    """Units by which the wide branch is wider."""
    max_depth: int | None = Field(None, ge=1, le=10_000)
    """Most blocks with an adapter. Default: all of the model's; the paper's 12 are all of BERT-base's."""
    max_width: int = Field(64, ge=1, le=16_384)
    """Most units of an adapter. The paper names 64, which its code does not hold the width to."""
    trial_seconds: float = Field(90.0, gt=0, le=1e12)
    """Virtual seconds T of a trial at depth 0. The paper's code takes 90, its instructions 60."""
    expand: float = Field(4.0, ge=0, le=1e6)
    """Factor e by which a trial is longer for every block with an adapter; 0: all trials last trial_seconds."""

    @property
    def traits(self) -> Traits:
        """Branches are groups of clients, and the next trial needs the quality of this one's branches."""
        return Traits(groups=True, waits=True)


class FedAdapter(Method):
    """Server state: an adapter for each branch, ``<branch>.layers…``; depth, width and number of the trial, and its beginning."""

    Config = FedAdapterConfig
    source: ClassVar[str] = "bottlenecks that grow deeper or wider by trial (Cai et al. 2023, arXiv 2205.10162)"
    plan_assumes = (
        "fedadapter's trials are won by the deep and the wide branch in turn: adapters grow as fast as they can"
    )

    @property
    def max_depth(self) -> int:
        """Most blocks with an adapter."""
        return self.config.max_depth or self.context.num_layers

    def check(self) -> None:
        """Raises UserError unless start <= cap <= the model, for depth and for width."""
        config, num_layers = self.config, self.context.num_layers
        for field in ("depth", "max_depth"):
            if (getattr(config, field) or 1) > num_layers:
                raise UserError(
                    f"exceeds the model's {num_layers} blocks",
                    field=f"method.{field}",
                    value=getattr(config, field),
                    hint="lower it, or take a deeper model",
                )
        for field, cap in (("depth", self.max_depth), ("width", config.max_width)):
            if getattr(config, field) > cap:
                raise UserError(
                    f"is less than method.{field}, {getattr(config, field)}, from which adapters grow",
                    field=f"method.max_{field}",
                    value=cap,
                    hint=f"raise it, or lower method.{field}",
                )

    def branches(self, depth: int, width: int) -> dict[str, tuple[int, int]]:
        """{branch: (depth, width)} of a trial. At a cap there is nothing to try, and at both caps only `STAY` is left."""
        out = {STAY: (depth, width)}
        if width < self.config.max_width:
            out[WIDE] = (depth, min(width + self.config.width_step, self.config.max_width))
        if depth < self.max_depth:
            out[DEEP] = (min(depth + self.config.depth_step, self.max_depth), width)
        return out

    # -- server ---------------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """The first adapter, before any trial: the untrained model is evaluated once and not branch by branch."""
        depth, width = self.config.depth, self.config.width
        fresh = self._fresh(depth, width)
        values = {"depth": depth, "width": width, "trial": 0, "since": 0.0}
        return State({f"{STAY}.{name}": tensor for name, tensor in fresh.items()}, values)

    def begin_round(self, state: State, round_idx: int, report: Report) -> State:
        """Open the first trial, or, when the time of one is over, the next from its winner's weights.

        A trial ends only behind an evaluated round, because the quality of its branches as they are then is to decide.
        """
        values = state.values
        branches = self._branches(state)
        if values["trial"] == 0:
            return self._opened(state, STAY, report.sim_seconds)
        is_due = report.sim_seconds - values["since"] >= self.trial_length(values["depth"])
        if len(branches) == 1 or not is_due or round_idx % self.context.evaluation_interval:
            return state
        return self._opened(state, winner(report.quality, list(branches), values["trial"]), report.sim_seconds)

    def trial_length(self, depth: int) -> float:
        """Virtual seconds of a trial that begins at this depth: T (e d + 1)."""
        return self.config.trial_seconds * (self.config.expand * depth + 1)

    def groups(self, state: State, round_idx: int, clients: Sequence[ClientInfo]) -> list[Hashable]:
        """Clients are dealt to the branches in turn. Each round begins with another branch, so that all get equally many."""
        branches = list(self._branches(state))
        return [branches[(i + round_idx) % len(branches)] for i, _ in enumerate(clients)]

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The branch's adapter."""
        return Payload(_of_branch(state, group or STAY))

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The average within each branch; a branch of which no client's update counts stays as it is."""
        totals: dict[str, Tensors] = {}
        weights: dict[str, float] = {}
        for update in updates:
            branch = str(update.group)
            add_weighted(totals.setdefault(branch, {}), update.tensors, update.weight)
            weights[branch] = weights.get(branch, 0.0) + update.total_weight
        tensors = dict(state.tensors)
        for branch, total in totals.items():
            for name, tensor in total.items():
                # The weights of a round sum to 1: of a single branch the sum is the average, bit for bit.
                tensors[f"{branch}.{name}"] = tensor / weights[branch] if len(weights) > 1 else tensor
        return State(tensors, state.values)

    def evaluated(self, state: State, private: PrivateStates) -> Mapping[str, GlobalModel]:
        """The configuration that is kept so far, which is the run's, and in a trial every branch."""
        whole = self.context.whole_model
        kept = GlobalModel(whole, _of_branch(state, STAY))
        branches = self._branches(state)
        if state.values["trial"] == 0 or len(branches) == 1:
            return {MAIN: kept}
        others = {name: GlobalModel(whole, _of_branch(state, name)) for name in branches if name != STAY}
        return {MAIN: kept, STAY: kept, **others}

    def columns(self, state: State) -> dict[str, float]:
        """Depth and width that are kept, and the trial, from 1."""
        return {name: float(state.values[name]) for name in ("depth", "width", "trial")}

    # -- parts ----------------------------------------------------------------------------------------------------------
    def _branches(self, state: State) -> dict[str, tuple[int, int]]:
        return self.branches(state.values["depth"], state.values["width"])

    def _opened(self, state: State, kept: str, sim_seconds: float) -> State:
        """The next trial, whose branches go on from the weights of ``kept``."""
        depth, width = self._branches(state)[kept]
        adapter = _of_branch(state, kept)
        tensors = {
            f"{branch}.{name}": tensor
            for branch, form in self.branches(depth, width).items()
            for name, tensor in grown(adapter, self._fresh(*form)).items()
        }
        values = {"depth": depth, "width": width, "trial": state.values["trial"] + 1, "since": sim_seconds}
        return State(tensors, values)

    def _fresh(self, depth: int, width: int) -> Tensors:
        """New bottlenecks of the highest ``depth`` blocks: D (width, hidden) random, all else 0.

        Every row of D has an address of its own, so that a unit is the same whichever branch it first appears in.
        """
        hidden, out = self.context.base.shape.hidden_size, {}
        for block in range(self.context.num_layers - depth, self.context.num_layers):
            half = f"layers.{block}.mlp"
            out[f"{half}.bottleneck_down"] = torch.stack([self._row(hidden, block, unit) for unit in range(width)])
            out[f"{half}.bottleneck_down_bias"] = torch.zeros(width)
            out[f"{half}.bottleneck_up"] = torch.zeros(hidden, width)
            out[f"{half}.bottleneck_up_bias"] = torch.zeros(hidden)
        return out

    def _row(self, hidden: int, block: int, unit: int) -> Tensor:
        """The row (hidden,) of D with which a unit begins, uniform in ±1 / sqrt(hidden)."""
        generator = torch.Generator().manual_seed(seed_of(self.context.seed, "fedadapter", block, unit))
        bound = 1.0 / math.sqrt(hidden)
        return torch.empty(hidden).uniform_(-bound, bound, generator=generator)


def winner(quality: Mapping[str, float], branches: Sequence[str], trial: int) -> str:
    """The branch of highest accuracy, or of lowest loss if nothing was generated; of equals the first.

    A plan knows no quality. There the deep branch wins every odd trial and the wide one every even trial, as far as they exist.
    """
    if not quality:
        wanted = (DEEP, WIDE) if trial % 2 else (WIDE, DEEP)
        return next(branch for branch in wanted if branch in branches)
    has_accuracy = f"eval_accuracy/{STAY}" in quality

    def score(branch: str) -> float:
        value = quality[f"eval_accuracy/{branch}"] if has_accuracy else -quality[f"eval_loss/{branch}"]
        return -math.inf if math.isnan(value) else value

    return max(branches, key=score)  # of equals, max gives the first


def grown(adapter: Tensors, fresh: Tensors) -> Tensors:
    """The adapter in the larger form of ``fresh``, from which it takes the blocks and units that it lacks; the same function."""
    out: Tensors = {}
    for name, new in fresh.items():
        old, axis = adapter.get(name), rank_axis(name)
        if old is None or axis is None:
            out[name] = new if old is None else old.clone()
            continue
        width = old.shape[axis]
        out[name] = torch.cat([old, new.narrow(axis, width, new.shape[axis] - width)], dim=axis)
    return out


def _of_branch(state: State, branch: str) -> Tensors:
    """A branch's adapter."""
    prefix = f"{branch}."
    return {name.removeprefix(prefix): t for name, t in state.tensors.items() if name.startswith(prefix)}
