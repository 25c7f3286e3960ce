"""LESFT: split fine-tuning in which each response token is weighted by its probability on a second, reference path.

Huang, Wang, Liu, Yi, Ai, Chen and AlQahtani 2026, "Unlocking Edge Fine-Tuning: A Sample-Efficient Language-Empowered Split
Fine-Tuning Framework", Computers, Materials & Continua 87(1), 66. Its loss is that of NLFT for right answers (arXiv 2412.20382).

    S_i = client_i(x)     S~_i = client_i(x~)        x~: the question with its solution; both go up            (2), (3)
    Y^ = server([S_1; …; S_N])     Y~^ = server([S~_1; …; S~_N])                                               (4), (5)
    P_t = P(y_t | x, y_<t)         P~_t = P(y_t | x~, y_<t)          the same response y after both prompts    (14), (15)
    L_ij = - 1/|y| sum_t S(y_t) log P_t,      S(y_t) by P~_t: `token_weights`                                  (16), (17)

The server's adapter follows the mean of L over all clients' examples (6, 7), each client's its own (8, 9); every I rounds the
clients' adapters are averaged, A and B apart, by numbers of examples (10, 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fleetune.errors import UserError
from fleetune.methods.split import Serving, SplitConfig, SplitMethod
from fleetune.methods.split_round import Batch, Path
from fleetune.methods.token_weights import ClusterMode, client_means, clusters, token_weights
from fleetune.methods.traits import Traits
from fleetune.models.block import norm
from fleetune.models.network import Network
from fleetune.training.loss import token_losses


class LESFTConfig(SplitConfig):
    """Settings of LESFT."""

    name: Literal["lesft"] = "lesft"
    split_point: int | float = Field(0.25, gt=0, le=10_000)
    """Blocks on the client; the cut is after them. An integer is their number, a number below 1 a fraction of the depth: the
    nearest block. The paper takes a quarter."""
    server: Serving = "concatenated"
    """How the server's half learns from several clients: one update per step from all together (the paper), one after each
    client's batch, or one copy per client, averaged each round: that learns what federated learning would (figure 6)."""
    aggregate_every: int | None = Field(1, ge=1, le=1_000_000)
    """I, rounds between two averages of the clients' halves; null: never, split learning alone (figure 6)."""
    paths: Literal["both", "base", "reference"] = "both"
    """What is learnt from: the base path with weights from the reference path; or, for the ablation, the base path alone or the
    reference path alone, all tokens with weight 1."""
    uniform: float | None = Field(None, ge=0, le=1e6)
    """The weight of all tokens, in place of equation (16): table 3 has 0 to 2. The reference path is then not needed."""
    p_sal: float = Field(0.95, gt=0, lt=1)
    """Probability on the reference path above which a token is salient."""
    gamma_salient: float = Field(5.0, gt=0, le=1000)
    """g1, the power in a salient token's weight."""
    gamma_sub_salient: float = Field(0.3, gt=0, le=1000)
    """g2, the power in a sub-salient token's weight."""
    gamma_irrelevant: float = Field(0.6, gt=0, le=1000)
    """g3, the power in an irrelevant token's weight; not below g2, so that it counts less."""
    cluster_mode: ClusterMode = "similarity"
    """Neighbours of a salient token that become sub-salient: those like it (cosine above 0.4), those unlike it (nlft_code: the
    released code of NLFT compares a distance), or none."""
    ref_grad: Literal["detached", "through"] = "detached"
    """Whether weights are constants, so that no gradient of the reference path exists or comes down; or the loss is also
    differentiated through them, which rewards a model for being less certain on the reference path."""
    add_nll: bool = False
    """Add the unweighted loss, as NLFT's code does: a token's weight is then 1 + S."""
    loss_scale: float = Field(1.0, gt=0, le=1e6)
    """A factor of the loss; 10 in NLFT's code. It acts before gradients are clipped."""
    average: Literal["examples", "tokens"] = "examples"
    """A batch's loss is the mean over examples of each one's mean (17), or the mean over all tokens, as split-lora has it."""

    @model_validator(mode="after")
    def _settings_agree(self) -> LESFTConfig:
        if self.gamma_sub_salient > self.gamma_irrelevant:
            raise ValueError(
                f"gamma_sub_salient={self.gamma_sub_salient:g} exceeds gamma_irrelevant={self.gamma_irrelevant:g}: sub-salient "
                "tokens would count less than irrelevant ones; exchange them"
            )
        if self.paths != "both" and self.uniform is not None:
            raise ValueError(f"paths={self.paths} has weights of 1, so uniform must be null")
        return self

    @property
    def serving(self) -> Serving:
        """As the job says."""
        return self.server

    @property
    def period(self) -> int | None:
        """I."""
        return self.aggregate_every

    @property
    def is_weighted(self) -> bool:
        """True if weights come from the reference path."""
        return self.paths == "both" and self.uniform is None

    @property
    def traits(self) -> Traits:
        """Those of the split family; every way but the base path alone needs the reference path."""
        return replace(super().traits, references=self.paths == "reference" or self.is_weighted)

    def check_job(self, job: Any) -> None:
        """Raises UserError if prompts are learnt too: the two paths have different ones."""
        if self.traits.references and job.data.loss_on != "response":
            raise UserError(
                "must be response: the two paths of lesft have the response in common, and no prompt",
                field="data.loss_on",
                value=job.data.loss_on,
                hint="set data.loss_on=response, or method.paths=base",
            )


class LESFT(SplitMethod):
    """Two paths over the cut, and the weighted loss behind it."""

    Config = LESFTConfig
    source: ClassVar[str] = "weight tokens by a reference path over the cut (Huang et al. 2026, CMC 87(1), 66)"

    def paths(self, examples: np.ndarray) -> list[Path]:
        """The base path, and the reference path if it is needed.

        Constant weights have no gradient, so the reference path is only looked at, and its labels, which are those of the base
        path, do not go up again.
        """
        if self.config.paths == "reference":
            return [Path(examples, on_reference=True)]
        if not self.config.is_weighted:
            return [Path(examples)]
        if self.config.ref_grad == "through":
            return [Path(examples), Path(examples, on_reference=True)]
        return [Path(examples), Path(examples, learns="neither", sends_labels=False, on_reference=True)]

    def loss(self, network: Network, hidden: Sequence[Tensor], batches: Sequence[Batch], num_clients: int) -> Tensor:
        """Each client's mean of S_t (- log P_t), (n,), equation (17)."""
        config, labels = self.config, batches[0].labels
        losses, counted = token_losses(network, hidden[0], labels)
        owner = counted // (labels.shape[1] - 1)  # (M,): the example of each counted token
        if config.is_weighted:
            weights: Tensor | float = self._weights(network, hidden, batches, owner=owner, counted=counted)
        else:
            weights = 1.0 if config.uniform is None else config.uniform
        losses = config.loss_scale * (weights + float(config.add_nll)) * losses
        return client_means(losses, owner, len(labels), num_clients, over=config.average)

    def _weights(
        self, network: Network, hidden: Sequence[Tensor], batches: Sequence[Batch], *, owner: Tensor, counted: Tensor
    ) -> Tensor:
        """S_t, (M,), by equation (16): both paths have the same M counted tokens in the same order."""
        config = self.config
        reference, _ = token_losses(network, hidden[1], batches[1].labels)
        log_reference = -reference if config.ref_grad == "through" else -reference.detach()
        salient = log_reference.detach().exp() > config.p_sal
        sub_salient = salient
        # In a trace nothing is known of who is salient: the walk, some vector products per token, is not costed.
        if config.cluster_mode != "none" and not hidden[0].is_meta:
            with torch.no_grad():
                h = hidden[0].detach().flatten(0, 1)
                positions = counted + owner  # rows of h are one longer than those of the targets
                features = norm(network.model.model.norm, h.index_select(0, positions))[1]
                sub_salient = clusters(features.float(), salient, owner, mode=config.cluster_mode)
        gammas = (config.gamma_salient, config.gamma_sub_salient, config.gamma_irrelevant)
        return token_weights(log_reference, sub_salient, p_sal=config.p_sal, gammas=gammas)
