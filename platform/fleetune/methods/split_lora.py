"""SplitLoRA: both halves of a cut model learn, and the clients' halves are averaged.

Lin et al. 2024, "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language Models", arXiv 2407.00952.
The server's three variants follow Thapa et al. 2022, "SplitFed", arXiv 2004.12088, and the text of LESFT (CMC 2026).

Every I rounds the client adapters are averaged, Theta = sum_k p_k Theta_k. The server's adapter Phi is shared by all
clients and updated once per step from the concatenation of their activations (``concatenated``), or after each client's
mini-batch in turn (``in_turn``, what the authors' code does), or there is one copy per client, averaged each round
(``per_client``, SplitFed-V1). Its AdamW moments live as long as the run; the clients' start anew each round.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fleetune.methods.split import Serving, SplitConfig, SplitMethod


class SplitLoRAConfig(SplitConfig):
    """Settings of SplitLoRA."""

    name: Literal["split-lora"] = "split-lora"
    server: Serving = "concatenated"
    """How the server's half learns from several clients."""
    aggregate_every: int = Field(1, ge=1, le=100_000)
    """I: rounds between two averages of the clients' halves. In between each client keeps its own."""

    @model_validator(mode="after")
    def _copies_are_averaged_each_round(self) -> SplitLoRAConfig:
        if self.server == "per_client" and self.aggregate_every > 1:
            raise ValueError(
                f"aggregate_every is {self.aggregate_every}, but the server's copies (server: per_client) are averaged each "
                "round together with the clients' halves; set aggregate_every: 1, or share the server's half"
            )
        return self

    @property
    def serving(self) -> Serving:
        """As the job says."""
        return self.server

    @property
    def period(self) -> int:
        """I."""
        return self.aggregate_every


class SplitLoRA(SplitMethod):
    """The family's plain form."""

    Config = SplitLoRAConfig
    source: ClassVar[str] = "cut the model between client and server (Lin et al. 2024, arXiv 2407.00952)"
