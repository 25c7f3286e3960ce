"""ProgFed: the model grows from its lowest blocks upwards, and clients train what there is of it.

Wang et al. 2022, "ProgFed: Effective, Communication, and Computation Efficient Federated Learning by Progressive Training",
ICML 2022, arXiv 2110.05323.

        stage 1       E_1 ─ head                    blocks [0, L/S)
        stage 2       E_1 ─ E_2 ─ head              blocks [0, 2L/S)
        stage S       E_1 ─ … ─ E_S ─ head          the whole model

The network is split into S parts E_1 … E_S of consecutive blocks. In stage s clients hold, train and send the adapters of the
first s parts alone, so that traffic, compute and memory grow with s. A stage lasts T / (2 S) rounds, the last one the rest.
Clients and server begin each stage with fresh optimizers, which they do here in every round.

In the paper each stage has a head of its own, trained from scratch. A pretrained language model's final norm and head take any
block's residual stream, so they serve every stage here, frozen. Blocks of later stages keep their initial adapter (B = 0).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field

from fleetune.errors import UserError
from fleetune.methods.base import GlobalModel, Method, MethodConfig, Payload, PrivateStates, Report, State
from fleetune.models.model import Model
from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors, select
from fleetune.training.plan import LocalPlan


class ProgFedConfig(MethodConfig):
    """Settings of ProgFed."""

    name: Literal["progfed"] = "progfed"
    stages: int = Field(4, ge=1, le=10_000)
    """Parts S of the model; 1 is FedAvg. The paper takes 3 to 5, 4 for most networks."""
    rounds_per_stage: int | None = Field(None, ge=1, le=1_000_000)
    """Rounds of every stage but the last. Default: T / (2 S), the paper's, so that the whole model gets over half of them."""
    warm_up_rounds: int = Field(0, ge=0, le=1_000_000)
    """Rounds at the beginning of each stage but the first in which only the newest part is trained. The paper adds 25 rounds to
    a stage of 375; here they are part of the stage."""


class ProgFed(Method):
    """Averages what clients train of the blocks that there are."""

    Config = ProgFedConfig
    source: ClassVar[str] = "grow the model block by block from below (Wang et al. 2022, arXiv 2110.05323)"

    @property
    def stage_rounds(self) -> int:
        """Rounds of every stage but the last, at least one."""
        return self.config.rounds_per_stage or max(1, self.context.num_rounds // (2 * self.config.stages))

    def num_blocks(self, stage: int) -> int:
        """Blocks of a stage's model, counted from 0: floor(L (stage + 1) / S)."""
        return self.context.num_layers * (stage + 1) // self.config.stages

    def check(self) -> None:
        """Every stage needs a block and a round."""
        if self.config.stages > self.context.num_layers:
            raise UserError(
                f"exceeds the model's {self.context.num_layers} blocks: a stage would add none",
                field="method.stages",
                value=self.config.stages,
                hint="lower it, or take a deeper model",
            )
        if self.stage_rounds * (self.config.stages - 1) >= self.context.num_rounds:
            raise UserError(
                f"leaves no round to the last of {self.config.stages} stages of {self.stage_rounds} rounds",
                field="rounds.num_rounds",
                value=self.context.num_rounds,
                hint="raise it, or lower method.stages or method.rounds_per_stage",
            )
        if self.config.warm_up_rounds >= self.stage_rounds:
            raise UserError(
                f"leaves no round to train all blocks of a stage of {self.stage_rounds} rounds",
                field="method.warm_up_rounds",
                value=self.config.warm_up_rounds,
                hint="lower it, or raise method.rounds_per_stage or rounds.num_rounds",
            )

    # -- server ---------------------------------------------------------------------------------------------------------
    def stage(self, round_idx: int) -> int:
        """The stage of a round, from 0."""
        return min(round_idx // self.stage_rounds, self.config.stages - 1)

    def start(self) -> State:
        """The adapters of all blocks; before the first stage begins, all blocks are there: the untrained model is whole."""
        return State(self.context.fresh_adapter(), {"num_blocks": self.context.num_layers})

    def begin_round(self, state: State, round_idx: int, report: Report) -> State:
        """The stage's blocks; what was trained before stays as it is."""
        return State(state.tensors, {"num_blocks": self.num_blocks(self.stage(round_idx))})

    def broadcast(self, state: State, round_idx: int, group: Any) -> Payload:
        """The adapters of the blocks that there are, and which of them are trained."""
        stage, num_blocks = self.stage(round_idx), state.values["num_blocks"]
        is_warm_up = stage > 0 and round_idx - stage * self.stage_rounds < self.config.warm_up_rounds
        values = {
            "submodel": Submodel.prefix(num_blocks).to_values(),
            "first_trained": self.num_blocks(stage - 1) / num_blocks if is_warm_up else 0.0,
        }
        return Payload(self._there(state), values)

    def evaluated(self, state: State, private: PrivateStates) -> GlobalModel:
        """The blocks that there are, with the frozen head."""
        return GlobalModel(Model(Submodel.prefix(state.values["num_blocks"])), self._there(state))

    def deployed(self, state: State, private: PrivateStates) -> GlobalModel:
        """All blocks; adapters that no stage has reached change nothing."""
        return GlobalModel(self.context.whole_model, state.tensors)

    def columns(self, state: State) -> dict[str, float]:
        """Blocks of the stage's model."""
        return {"depth": float(state.values["num_blocks"])}

    def _there(self, state: State) -> Tensors:
        """The adapters of the blocks that there are."""
        return select(state.tensors, lambda name: _block(name) < state.values["num_blocks"])

    # -- client ---------------------------------------------------------------------------------------------------------
    def local_plan(self, payload: Payload) -> LocalPlan:
        """Train and send all that came; in a warm-up round only the newest part."""
        plan = super().local_plan(payload)
        # As a part of the depth, because costs are traced on models of another depth.
        first = round(payload.values["first_trained"] * plan.submodel.num_layers)

        def is_newest(name: str) -> bool:
            return _block(name) >= first

        return replace(plan, trainable=is_newest, uploads=is_newest) if first else plan


def _block(name: str) -> int:
    return int(name.split(".")[1])
