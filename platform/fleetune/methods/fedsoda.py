"""FedSODA: clients tune a quantised model of a few blocks, which the server keeps aligned with the full model.

Zhu et al. 2025, "FedSODA: Federated Fine-tuning of LLMs via Similarity Group Pruning and Orchestrated Distillation Alignment",
ECAI 2025, arXiv 2508.12727. What lies behind the names of the two modules is not published as far as we know, so every line below
is a reconstruction, from what QLoRA, FedPFT and offsite-tuning do (`similarity_groups`, `distillation`).

        F  blocks 0 … L-1                           S  kept blocks k_0 = 0 < … < k_{n-1} = L-1, in NF4
        SGP    groups of alike blocks, of each the most influential one is kept            server, before round 1
        ODA    W_S <- W_S + alpha/r B A, so that S does what F does; then NF4, sent once   server, before round 1
        round  theta <- sum_k p_k theta_k, theta the adapter of S's blocks                 clients, as FedIT
        ODA    theta <- a few steps towards what F with theta at the kept blocks does      server, before rounds q + 1, 2q + 1, …

        L_align = a T^2 KL(softmax(z_F / T) || softmax(z_S / T)) + b mean_n MSE(H_F[end(n)], H_S[n]) / rms^2

Block n of S has to do what F does up to the end of the group that n stands for. In the end F serves with theta at the kept
blocks, and clients with S; both are evaluated. With every block kept, no quantisation and no alignment it is FedIT, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fleetune.data.batches import NO_EXAMPLE, draw_batches
from fleetune.errors import UserError
from fleetune.methods.base import (
    MAIN,
    GlobalModel,
    Method,
    MethodConfig,
    Payload,
    PrivateStates,
    Provision,
    ServerWork,
    State,
    Update,
)
from fleetune.methods.distillation import Alignment, align, gradient_divergence, layer_statistics
from fleetune.methods.layer_groups import Groups
from fleetune.methods.similarity_groups import cheapest_groups, groups_above, kept_blocks
from fleetune.methods.stage_record import moved
from fleetune.methods.traits import Traits
from fleetune.methods.wire import WIRE_AXES, coded_changes, decoded_stack, from_wire, to_wire
from fleetune.models.adapters import AXES, Axes
from fleetune.models.lora import init_lora
from fleetune.models.model import Model
from fleetune.models.outline import meta_weights
from fleetune.models.submodel import Submodel
from fleetune.seeds import rng, seed_of
from fleetune.tensors import Stack, Tensors, add_weighted, select
from fleetune.training.plan import ClientTask, CohortUpdate, LocalPlan, none
from fleetune.training.worker import Worker

SUB = "sub"
"""The name of the sub-model in evaluations, beside the full model."""


class FedSODAConfig(MethodConfig):
    """Settings of FedSODA; the paper's own values are not known."""

    name: Literal["fedsoda"] = "fedsoda"
    keep: int | float = Field(0.5, gt=0, le=10_000)
    """Blocks of the sub-model: their number, or with a decimal point their share of all, up to 1.0. Two at least."""
    threshold: float | None = Field(None, ge=-1, le=1)
    """Let a group go on as long as its blocks are so similar to its first one, instead of asking for ``keep`` groups."""
    similarity: Literal["cosine", "cka"] = "cosine"
    """How alike two blocks' outputs are: their mean cosine over tokens, or linear CKA."""
    quantization: Literal["none", "int8", "nf4"] = "nf4"
    """Storage of the sub-model's matrices; none: that of ``model.quantization``, which the server's full model has anyway."""
    adapter_bits: Literal[4, 32] = 32
    """Bits of an adapter's numbers on the wire: fp32, or NF4 with an fp32 scale per 64 numbers (4.5 bits). Clients then send the
    change of their adapter in 4 bits, as a small step of a coarse number would be lost."""
    send_sub_model: bool = True
    """Charge every client once for the sub-model. Off: clients hold it already, as devices hold the base with other methods."""
    calibration_examples: int = Field(64, ge=1, le=1_000_000)
    """Training examples, drawn from all clients, that stand for the server's public text: for similarities and alignment."""
    align_steps: int = Field(50, ge=0, le=1_000_000)
    """Steps of the alignment before the first round; 0: none."""
    realign_steps: int = Field(2, ge=0, le=1_000_000)
    """Steps of each alignment between rounds; 0: none."""
    realign_every: int = Field(1, ge=1, le=1_000_000)
    """q, rounds from one alignment to the next."""
    learning_rate: float = Field(1e-3, ge=0, le=10)
    """Of the alignment's steps; the optimizer is that of ``local``."""
    batch_size: int = Field(8, ge=1, le=65_536)
    """Examples of each of the server's steps."""
    logits_weight: float = Field(1.0, ge=0, le=1e6)
    """a, weight of the softened logits in the alignment's loss."""
    hidden_weight: float = Field(1.0, ge=0, le=1e6)
    """b, weight of the hidden states."""
    temperature: float = Field(2.0, gt=0, le=1e3)
    """T, by which logits are divided."""
    divergence_examples: int = Field(16, ge=0, le=1_000_000)
    """Examples, none of those for the alignment, on which the divergence of gradients is measured; 0: it is not measured."""

    @property
    def traits(self) -> Traits:
        """The server prunes and aligns."""
        return Traits(serves=True)

    def check_job(self, job: Any) -> None:
        """An alignment needs a loss."""
        if (self.align_steps or self.realign_steps) and not (self.logits_weight or self.hidden_weight):
            raise UserError(
                "leaves the alignment without a loss, as method.hidden_weight is 0 too",
                field="method.logits_weight",
                value=self.logits_weight,
                hint="raise one of them, or set method.align_steps and method.realign_steps to 0",
            )


class FedSODA(Method):
    """Server state: theta, the adapter of the kept blocks, counted from 0; and the merged pairs of the sub-model, ``align.…``."""

    Config = FedSODAConfig
    source: ClassVar[str] = "prune to a quantised sub-model, align by distillation (Zhu et al. 2025, arXiv 2508.12727)"
    plan_assumes: ClassVar[str | None] = "groups of equal length, and with method.threshold as many as method.keep says"
    axes: Axes = MappingProxyType({**AXES, **WIRE_AXES})

    @property
    def num_kept(self) -> int:
        """Blocks of the sub-model, if no threshold says otherwise."""
        keep = self.config.keep
        return keep if isinstance(keep, int) else round(keep * self.context.num_layers)

    def check(self) -> None:
        """Raises UserError unless the sub-model has from two blocks to all, and there are examples enough for the server."""
        num_layers, keep = self.context.num_layers, self.config.keep
        if not 2 <= self.num_kept <= num_layers:
            rule = f"keeps {self.num_kept} of the model's {num_layers} blocks: it must be from 2, the first and the last, to all"
            raise UserError(rule, field="method.keep", value=keep, hint="take a number from 2, or a share up to 1.0")
        needed = self.config.calibration_examples + self.config.divergence_examples
        if needed > self.context.num_examples:
            raise UserError(
                f"with method.divergence_examples exceeds the {self.context.num_examples} training examples",
                field="method.calibration_examples",
                value=self.config.calibration_examples,
                hint="lower them, or use more examples",
            )

    # -- the server's own work ------------------------------------------------------------------------------------------
    def start(self) -> State:
        """The adapter of all blocks, as which are kept is not known yet, unless all are."""
        values: dict[str, Any] = {"kept": None, "served": [-1, 0]}
        if self._keeps_all:
            values.update(_pruned([[n] for n in range(self.context.num_layers)]))
        return State(self.context.fresh_adapter(), values)

    @property
    def _keeps_all(self) -> bool:
        return self.config.threshold is None and self.num_kept == self.context.num_layers

    def server_work(self, state: State, round_idx: int) -> ServerWork | None:
        """Before the first round: look at the blocks, align the sub-model's weights. Between rounds: align the adapter.

        The divergence of gradients is measured before and after each alignment, and is charged to nobody.
        """
        due = self._due(round_idx)
        last_round, num_done = state.values["served"]
        done = num_done if last_round == round_idx else 0
        return self._work(state, round_idx, due[done]) if done < len(due) else None

    def _due(self, round_idx: int) -> list[str]:
        config = self.config
        aligned = []
        if round_idx == 0:
            aligned = ["align_weights"] * (config.align_steps > 0)
        elif round_idx % config.realign_every == 0:
            aligned = ["align_adapter"] * (config.realign_steps > 0)
        measured = ["measure"] * (config.divergence_examples > 0 and (bool(aligned) or round_idx == 0))
        looked = ["look"] * (round_idx == 0 and not self._keeps_all)
        return [*looked, *measured, *aligned, *(measured if aligned else [])]

    def _work(self, state: State, round_idx: int, kind: str) -> ServerWork:
        """A piece of work as data: its kind, the sub-model with the end of each block's group, and the adapter to begin with."""
        values: dict[str, Any] = {"kind": kind, "round": round_idx}
        if kind == "look":
            return ServerWork(Payload({}, values), self._in_batches(self._text[: self.config.calibration_examples]))
        submodel, groups = Submodel.select(state.values["kept"]), state.values["groups"]
        values.update(submodel=submodel.to_values(), ends=[group[-1] for group in groups])
        payload = Payload(_theta(state), values, held=_merged(state))
        if kind == "measure":
            rows = self._in_batches(self._text[self.config.calibration_examples :])
            return ServerWork(payload, rows, is_charged=False)
        if kind == "align_weights":
            pairs = init_lora(
                self.context.sites, self.context.lora, run_seed=seed_of(self.context.seed, "fedsoda-pairs")
            )
            payload = Payload(submodel.fuse_adapter(pairs), values)
        num_steps = self.config.align_steps if kind == "align_weights" else self.config.realign_steps
        seed = seed_of(self.context.seed, "fedsoda-align", round_idx)
        text, size = self._text[: self.config.calibration_examples], self.config.batch_size
        return ServerWork(payload, draw_batches(text, num_steps=num_steps, batch_size=size, seed=seed))

    @property
    def _text(self) -> np.ndarray:
        """The server's examples, those for similarities and alignment first."""
        wanted = self.config.calibration_examples + self.config.divergence_examples
        # The first ones of one shuffle: which examples are aligned on does not depend on how many are measured on.
        return rng(self.context.seed, "fedsoda-text").permutation(self.context.num_examples)[:wanted]

    def _in_batches(self, examples: np.ndarray) -> np.ndarray:
        size = min(self.config.batch_size, len(examples))
        filled = np.pad(examples, (0, -len(examples) % size), constant_values=NO_EXAMPLE)
        return filled.reshape(-1, size)

    def serve(self, worker: Worker, work: ServerWork) -> Tensors:
        """Carry out a piece on a worker."""
        payload, kind, config = work.payload, work.payload.values["kind"], self.config
        whole = self.context.whole_model
        if kind == "look":
            return layer_statistics(worker, whole, work.rows)
        kept, ends = self._places(payload.values)
        plugged = _plugged(payload.tensors, kept)
        if kind == "measure":
            return gradient_divergence(worker, (whole, plugged), (self.model(payload), payload.tensors), rows=work.rows)
        how = Alignment(config.logits_weight, config.hidden_weight, config.temperature, config.learning_rate)
        is_base = (
            kind == "align_weights"
        )  # of matrices that are not quantised yet, and of the full model without an adapter
        sub = Model(self.submodel(payload)) if is_base else self.model(payload)
        full = (whole, {} if is_base else plugged)
        return align(worker, full, (sub, payload.tensors), ends, work.rows, how)

    def served(self, state: State, work: ServerWork, result: Tensors) -> State:
        """Note what came out: groups, merged pairs, theta, or how far the gradients are apart."""
        kind, round_idx = work.payload.values["kind"], work.payload.values["round"]
        last_round, done = state.values["served"]
        values = {**state.values, "served": [round_idx, done + 1 if last_round == round_idx else 1]}
        tensors = state.tensors
        if kind == "look":
            values.update(self._grouped(result))
            tensors = Submodel.select(values["kept"]).fuse_adapter(tensors)
        elif kind == "measure" and result:
            found, before = (
                float(result["divergence"]),
                values["served"][1] <= self._due(round_idx).index("measure") + 1,
            )
            values["divergence"] = [found, found] if before else [values["divergence"][0], found]
        elif result:
            values["align_loss"] = result["loss"].tolist()
            learnt = select(result, lambda name: name != "loss")
            if kind == "align_weights":
                learnt = {f"align.{name.replace('.lora_', '.merged_')}": tensor for name, tensor in learnt.items()}
            tensors = {**tensors, **learnt}
        return State(tensors, values)

    def _grouped(self, statistics: Tensors) -> dict[str, Any]:
        """Groups and kept blocks from what `layer_statistics` found; in a plan, groups of equal length."""
        if not statistics:
            runs = np.array_split(np.arange(self.context.num_layers), self.num_kept)
            return _pruned([run.tolist() for run in runs])
        cosine = statistics["cosine"].numpy()
        similarity = cosine[1:, 1:] if self.config.similarity == "cosine" else statistics["cka"].numpy()
        influence = 1.0 - np.diagonal(cosine, offset=1)
        if self.config.threshold is None:
            groups = cheapest_groups(similarity, self.num_kept)
        else:
            groups = groups_above(similarity, self.config.threshold)
        found = {"similarity": similarity.tolist(), "influence": influence.tolist()}
        return {**_pruned(groups, np.round(influence, 9)), **found}

    def _places(self, values: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Kept blocks and the ends of their groups. If another depth is costed they lie evenly: how many there are counts."""
        kept, ends = [combination[0][0] for combination in values["submodel"]], list(values["ends"])
        depth = self.context.num_layers
        if kept == sorted(set(kept)) and kept[-1] == ends[-1] == depth - 1:
            return kept, ends
        runs = [run.tolist() for run in np.array_split(np.arange(depth), len(kept))]
        return _pruned(runs)["kept"], [run[-1] for run in runs]

    # -- rounds ---------------------------------------------------------------------------------------------------------
    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """Theta, and once the sub-model."""
        submodel = Submodel.select(state.values["kept"])
        theta = _theta(state)
        if self.config.adapter_bits == 4:
            theta = to_wire(theta)
        provision = self._provision(submodel.num_layers) if self.config.send_sub_model else None
        return Payload(theta, {"submodel": submodel.to_values()}, held=_merged(state), provision=provision)

    def _provision(self, num_layers: int) -> Provision:
        """The sub-model as it is stored, with embedding, final norm and head: the client has nothing of the full model."""
        shape = replace(self.context.base.shape, num_layers=num_layers)
        weights = meta_weights(shape, self._quantization or self.context.base.quantization)
        return Provision("sub-model", lambda last: [weights])

    @property
    def _quantization(self) -> Literal["int8", "nf4"] | None:
        kind = self.config.quantization
        return None if kind in ("none", self.context.base.quantization) else kind

    def aggregate(self, state: State, updates: Iterable[Update], round_idx: int) -> State:
        """The clients' mean, or theta and their mean change."""
        if self.config.adapter_bits == 32:
            return super().aggregate(state, updates, round_idx)
        total: Tensors = {}
        for update in updates:
            add_weighted(total, update.tensors, update.weight)
        return State({n: t + total[n] if n in total else t for n, t in state.tensors.items()}, state.values)

    def summand(self, payload: Payload, received: Stack, tasks: Sequence[ClientTask]) -> Stack:
        """What was received, in fp32."""
        return received if self.config.adapter_bits == 32 else decoded_stack(received, self.context.sites)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel | Mapping[str, GlobalModel]:
        """The full model with theta at the kept blocks, and the sub-model with theta; before the pruning the full model alone."""
        kept = state.values["kept"]
        if kept is None:
            return GlobalModel(self.context.whole_model, state.tensors)
        theta, held = _theta(state), _merged(state)
        full = GlobalModel(self.context.whole_model, _plugged(theta, kept))
        if len(kept) == self.context.num_layers and self._quantization is None and not held:
            return {MAIN: full, SUB: full}
        return {MAIN: full, SUB: GlobalModel(Model(Submodel.select(kept), held, self._quantization), theta)}

    def columns(self, state: State) -> dict[str, float]:
        """Blocks of the sub-model, and the gradients' divergence at the last alignment, before and after it."""
        kept = state.values["kept"]
        out = {"depth": float(len(kept) if kept is not None else self.num_kept)}
        if "divergence" in state.values:
            before, after = state.values["divergence"]
            out.update(divergence_before=before, divergence_after=after)
        if "align_loss" in state.values:
            out["align_loss"] = state.values["align_loss"][-1]
        return out

    def records(self, state: State) -> dict[str, Any]:
        """Groups, kept blocks, similarity and influence, and how far each kept block's adapter has moved."""
        if "similarity" not in state.values:
            return {}
        kept, groups = state.values["kept"], state.values["groups"]
        begun = Submodel.select(kept).fuse_adapter(self.context.fresh_adapter())
        wanted = ("groups", "kept", "similarity", "influence")
        return {
            **{name: state.values[name] for name in wanted},
            "contiguous": True,
            "similarity_of": self.config.similarity,
            "moved": moved(begun, _theta(state), len(groups)),
        }

    # -- client ---------------------------------------------------------------------------------------------------------
    def model(self, payload: Payload) -> Model:
        """The sub-model as it is stored."""
        return Model(self.submodel(payload), payload.held, self._quantization)

    def client_adapter(self, payload: Payload) -> Tensors:
        """Theta as it arrives."""
        return from_wire(payload.tensors, self.context.sites) if self.config.adapter_bits == 4 else payload.tensors

    def local_plan(self, payload: Payload) -> LocalPlan:
        """All of the adapter is trained. In 4 bits none of its tensors goes up as it is."""
        plan = super().local_plan(payload)
        return plan if self.config.adapter_bits == 32 else replace(plan, uploads=none)

    def local_update(self, worker: Worker, payload: Payload, tasks: Sequence[ClientTask]) -> CohortUpdate:
        """The shared trainer's work, and the changes in 4 bits."""
        if self.config.adapter_bits == 32:
            return super().local_update(worker, payload, tasks)
        return coded_changes(worker, super().local_plan(payload), self.client_adapter(payload), tasks)


def _pruned(groups: Groups, influence: np.ndarray | None = None) -> dict[str, Any]:
    """Groups and the kept block of each."""
    if influence is None:
        influence = np.zeros(groups[-1][-1] + 1)
    return {"groups": groups, "kept": kept_blocks(groups, influence)}


def _theta(state: State) -> Tensors:
    """The adapter of the kept blocks."""
    return select(state.tensors, lambda name: name.startswith("layers."))


def _merged(state: State) -> Tensors:
    """The pairs that the alignment has put into the sub-model's matrices."""
    return {n.removeprefix("align."): t for n, t in state.tensors.items() if n.startswith("align.")}


def _plugged(adapter: Tensors, kept: Sequence[int]) -> Tensors:
    """The adapter of the sub-model's blocks at their places in the full model: layers.<n>.x -> layers.<kept[n]>.x."""
    out = {}
    for name, tensor in adapter.items():
        layers, n, rest = name.split(".", 2)
        out[f"{layers}.{kept[int(n)]}.{rest}"] = tensor
    return out
