"""LoRAHub: the weights with which adapters are added up are found without gradients, from the losses of a few examples.

Huang et al. 2024, "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", COLM 2024, arXiv 2307.13269.
Searched by nevergrad's NGOpt (Rapin and Teytaud 2018), as the authors' code does, from w = 0 within ±1.5.

        adapter       A(w) = sum_i w_i A_i,  B(w) = sum_i w_i B_i                 (equation 1; smaller ranks filled up with zeros)
        client k      sends L_k(w), its mean loss on its batches: a number for each w, from forward passes alone
        server        asks the search for w, and tells it  sum_k p_k L_k(w) + 0.05 mean_i |w_i|        (equation 2)

The federated form is a reconstruction, the paper has one site: a round is one question to the search, and the weighted mean of
the clients' losses is the loss on all their examples together, so that the search is the authors' own. The adapters go down once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fleetune.errors import RunFailed
from fleetune.methods.base import GlobalModel, Payload, PrivateStates, Provision, Report, State, Update
from fleetune.methods.reuse import Reuse, ReuseConfig
from fleetune.methods.traits import Traits
from fleetune.scopes import ADAPTERS, part
from fleetune.seeds import seed_of
from fleetune.tensors import Stack, Tensors, add_weighted
from fleetune.training.loss import cohort_loss
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan, none
from fleetune.training.trainer import collate_step, row_lengths, step_rows
from fleetune.training.worker import Worker


class LoRAHubConfig(ReuseConfig):
    """Settings of LoRAHub."""

    name: Literal["lorahub"] = "lorahub"
    bound: float = Field(1.5, gt=0, le=1e3)
    """Largest size of a weight."""
    regularization: float = Field(0.05, ge=0, le=1e3)
    """Factor of the mean size of the weights, which is added to the loss."""
    candidates: int = Field(1, ge=1, le=1000)
    """Weights that are tried in a round. The authors' search tries one after the other; several take fewer rounds, and the search
    learns of them at once."""
    examples: Literal["fixed", "fresh"] = "fixed"
    """Whether every round asks the same clients about the same batches, as the paper's few examples are, or draws anew."""

    @property
    def traits(self) -> Traits:
        """Forward passes alone, of adapters that exist."""
        return Traits(backward=False, ranked=False, steps=False)


class LoRAHub(Reuse):
    """Server state: the best weights so far, (N,). Its values hold all that was asked and told, from which the search goes on."""

    Config = LoRAHubConfig
    config: LoRAHubConfig
    source: ClassVar[str] = "weights of adapters by a search without gradients (Huang et al. 2024, arXiv 2307.13269)"

    # -- server ---------------------------------------------------------------------------------------------------------
    def start(self) -> State:
        """All weights are 0: the base model."""
        return State({"weights": torch.zeros(len(self.skills))}, {"told": [], "asked": None, "best": None})

    def begin_round(self, state: State, round_idx: int, report: Report) -> State:
        """Ask for the round's weights, if those of the last one were told."""
        if state.values["asked"] is not None:
            return state
        candidates = _replayed(self._search(), state.values["told"], self.config.candidates)
        asked = [candidate.value.tolist() for candidate in candidates]
        return State(state.tensors, {**state.values, "asked": asked})

    def drawn_from(self, state: State, round_idx: int) -> int:
        """With fixed examples, those of the first round."""
        return 0 if self.config.examples == "fixed" else round_idx

    def broadcast(self, state: State, round_idx: int, group: Hashable) -> Payload:
        """The weights to try, (C, N). The adapters are sent once, to whoever has none."""
        pool = {
            f"skills.{i}.{name}": tensor
            for i, skill in enumerate(self.skills)
            for name, tensor in skill.pairs(self.context.lora.scaling).items()
        }
        weights = torch.tensor(state.values["asked"], dtype=torch.float32)
        return Payload({"weights": weights}, held=pool, provision=Provision("skills", lambda last: [pool]))

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """Tell the search the mean loss of each of the round's weights, with what their size adds."""
        total: Tensors = {}
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
        asked, best, weights = state.values["asked"], state.values["best"], state.tensors["weights"]
        told = list(state.values["told"])
        for tried, loss in zip(asked, total["losses"].tolist(), strict=True):
            value = loss + self.config.regularization * float(np.abs(tried).mean())
            told.append([tried, value])
            if best is None or value < best:
                best, weights = value, torch.tensor(tried, dtype=torch.float32)
        return State({"weights": weights}, {"told": told, "asked": None, "best": best})

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """All blocks with the adapter of the best weights so far."""
        return GlobalModel(self.context.whole_model, self._composed(state.tensors["weights"]))

    def columns(self, state: State) -> dict[str, float]:
        """The best value that the search was told, and its weight of each adapter; nothing before the first, as in a plan."""
        best = state.values["best"]
        if best is None:
            return {}
        return {"best_value": best, **{f"weight_{i}": w for i, w in enumerate(state.tensors["weights"].tolist())}}

    def records(self, state: State) -> dict[str, Any]:
        """The adapters' names, and every weight that was tried with its value."""
        return {"adapters": [skill.name for skill in self.skills], "told": state.values["told"]}

    def _composed(self, weights: Tensor) -> Tensors:
        return composed([skill.pairs(self.context.lora.scaling) for skill in self.skills], weights)

    def _search(self) -> Any:
        """nevergrad's search before its first question. Importing it takes seconds, so only the server does."""
        import nevergrad

        bound, num = self.config.bound, len(self.skills)
        space = nevergrad.p.Array(init=np.zeros(num), lower=-bound, upper=bound)
        space.random_state.seed(seed_of(self.context.seed, "lorahub") % 2**32)
        budget = self.context.num_rounds * self.config.candidates
        return nevergrad.optimizers.NGOpt(space, budget=budget, num_workers=self.config.candidates)

    # -- client ---------------------------------------------------------------------------------------------------------
    def local_plan(self, payload: Payload) -> LocalPlan:
        """No tensor of the adapter receives a gradient or goes up."""
        return LocalPlan(self.model(payload), trainable=none, uploads=none)

    def client_adapter(self, payload: Payload) -> Tensors:
        """The adapter of the first weights."""
        return composed(_pool(payload), payload.tensors["weights"][0])

    @torch.no_grad()
    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """Each client's mean loss with each of the weights, over its batches.

        A step's batch goes through all of them before the next step, so that a step costs what all of them cost.
        """
        network = worker.network(self.model(payload))
        with part(ADAPTERS):
            pool = _pool(payload)
            tried = [Stack.of([composed(pool, w)]).to(network.device) for w in payload.tensors["weights"].unbind()]
        losses = np.zeros((len(tasks), len(tried)), np.float32)
        num_tokens = np.zeros(len(tasks), np.int64)
        for step in range(max(len(task.rows) for task in tasks)):
            at_work = [k for k, task in enumerate(tasks) if len(task.rows) > step]
            active = [tasks[k] for k in at_work]
            ids, labels = collate_step(worker.data, active, step, network.device)
            num_tokens[at_work] += row_lengths(worker.data, step_rows(active, step)).sum(axis=1)
            for c, one in enumerate(tried):
                network.set_adapter(one.views(one.data.expand(len(active), -1)))
                loss, _ = cohort_loss(network, network.blocks(network.embed(ids)), labels, len(active))
                losses[at_work, c] += loss.tolist()
        network.set_adapter(None)
        losses /= np.array([[max(1, len(task.rows))] for task in tasks], np.float32)
        upload = Stack({"losses": (len(tried),)}, torch.from_numpy(losses))
        return CohortUpdate(upload=upload, losses=losses.mean(axis=1).astype(float), num_tokens=num_tokens)


def composed(pool: Sequence[Tensors], weights: Tensor) -> Tensors:
    """A(w) (r, in) and B(w) (out, r) of N adapters with ``weights (N,)``, r the largest rank at the matrix (equation 1)."""
    out: Tensors = {}
    for name in pool[0]:
        axis = 0 if name.endswith(".lora_A") else 1
        size = list(pool[0][name].shape)
        size[axis] = max(pairs[name].shape[axis] for pairs in pool)
        total = pool[0][name].new_zeros(size)
        for weight, pairs in zip(weights.unbind(), pool, strict=True):
            total.narrow(axis, 0, pairs[name].shape[axis]).add_(pairs[name] * weight)
        out[name] = total
    return out


def _pool(payload: Payload) -> list[Tensors]:
    """The adapters that a client holds, in their order."""
    out: list[Tensors] = []
    for name, tensor in payload.held.items():
        _, number, rest = name.split(".", 2)
        if int(number) == len(out):
            out.append({})
        out[int(number)][rest] = tensor
    return out


def _replayed(search: Any, told: Sequence[Sequence[Any]], num_candidates: int) -> list[Any]:
    """The search's next questions, after all that it was told is told to it again in the same order.

    Raises RunFailed if it asks otherwise than it did: another version of nevergrad, which would go on from other numbers.
    """
    for start in range(0, len(told), num_candidates):
        asked = [search.ask() for _ in range(num_candidates)]
        for candidate, (weights, value) in zip(asked, told[start : start + num_candidates], strict=True):
            if candidate.value.tolist() != weights:
                raise RunFailed(
                    "the search asks otherwise than it did: resume with the nevergrad that the run began with"
                )
            search.tell(candidate, value)
    return [search.ask() for _ in range(num_candidates)]
