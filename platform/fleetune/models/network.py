"""The scratch model of a worker: a frozen (sub)model through which clients pass, one cohort at a time.

Shape legend: K clients, b examples per client, S tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fleetune.models.adapters import block_adapter
from fleetune.models.base import PRODUCT_DTYPES, BaseModel
from fleetune.models.block import norm, run_block
from fleetune.models.config import LoRAConfig
from fleetune.models.decoder import ATTENTION, Decoder
from fleetune.models.generated import Generator
from fleetune.models.lora import AdaptedLinear
from fleetune.models.pools import BlockGate, Pool, mixture
from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors


class Network:
    """A causal language model whose adapted linear layers take the adapters of K clients at once.

    It lies where the base's weights lie (`models.base.placed`), and whatever it is given must lie there too.
    """

    precision = "fp32"
    """Type of the products, and so of the activations between them. The residual stream, logits and adapters stay fp32."""
    device = torch.device("cpu")
    checkpointing = False
    """True if blocks keep only their input while training and are computed again in the backward pass."""
    _held: Tensors | None = None

    def __init__(self, base: BaseModel, submodel: Submodel, lora: LoRAConfig, *, precision: str = "fp32"):
        self.submodel = submodel
        self.precision = precision
        self.model: Any = Decoder(base, submodel.weights(base), submodel.num_layers, dtype=self.dtype)
        self.device = next(self.model.parameters()).device
        self.sites = _adapt(self.model, lora)
        self.model.eval()  # the adapted layers are new: without it they would drop out in an evaluation

    @property
    def num_layers(self) -> int:
        """Blocks of this (sub)model."""
        return len(self.model.model.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.model.model.embed_tokens.weight.shape[1])

    def set_adapter(self, stacked: Tensors | None) -> None:
        """Give every site and every block its stacked adapter tensors (`models.adapters`); None removes them.

        A site takes ``<site>.lora_A`` (K, r, in), ``.lora_B`` (K, out, r) and, if it is there, ``.lora_E`` (K, r).
        """
        tensors = stacked or {}
        for name, site in self.sites.items():
            site.lora_A, site.lora_B = tensors.get(f"{name}.lora_A"), tensors.get(f"{name}.lora_B")
            scales = tensors.get(f"{name}.lora_E")
            if scales is not None and site.lora_B is not None:
                site.lora_B = site.lora_B * scales[:, None]  # B diag(E): products then see a pair like any other
        generator = Generator.of(tensors)  # once for all blocks
        for n, layer in enumerate(self.layers):
            layer.after_attention = block_adapter(tensors, n, "self_attn", generator)
            layer.after_mlp = block_adapter(tensors, n, "mlp", generator)
            layer.at_start = BlockGate.of(tensors, n)
        for name, site in self.sites.items():
            of_block = self.layers[int(name.split(".")[1])].at_start
            site.beside = mixture(tensors, name, site.pool, of_block)

    def gates(self) -> Tensors:
        """{site: (K, n, E)}: the gates of each client's n tokens in the last call, where they are noted (`models.pools`)."""
        mixtures = {name: site.beside for name, site in self.sites.items() if site.beside is not None}
        return {name: found.gates for name, found in mixtures.items() if found.gates is not None}

    def hold(self, held: Tensors) -> None:
        """Take up what is held, in place of what was held before.

        It is matrices ``<site>.delta`` (out, in), which are added to those of the base, and pools of pairs (`models.pools`).
        """
        if held is self._held or not (held or self._held):  # the same cohort after cohort, and mostly none at all
            return
        # An evaluation may be the first to take it up. What is made in its inference mode could not stand beside what is trained.
        with torch.inference_mode(mode=False):
            for name, site in self.sites.items():
                delta = held.get(f"{name}.delta")
                site.hold(delta if delta is None or delta.is_meta else delta.to(self.device))
                site.pool = Pool.of(held, name, dtype=self.dtype, device=self.device)
        self._held = held

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's type for the products."""
        return PRODUCT_DTYPES[self.precision]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which all products are carried out in the network's precision."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _wide(self, x: Tensor) -> Tensor:
        """x as fp32 if the products are of another type: for the residual stream and the logits."""
        return x if self.precision == "fp32" else x.float()

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (K b, S) -> (K b, S, D)."""
        return self._wide(self.model.model.embed_tokens(ids))

    @property
    def layers(self) -> Any:
        """The blocks' modules."""
        return self.model.model.layers

    def rotary(self, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, 1, S, head size) of token positions (B or 1, S)."""
        cos, sin = self.model.model.rotary_emb(h, positions)
        return cos[:, None], sin[:, None]

    def blocks(self, h: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run blocks [start, stop): (K b, S, D) -> (K b, S, D).

        No mask is needed: batches are padded on the right, and causal attention keeps real tokens from seeing the padding.
        """
        cos, sin = self.rotary(h, torch.arange(h.shape[1], device=h.device)[None])
        with self.autocast():
            for layer in self.layers[start:stop]:
                if self.checkpointing and torch.is_grad_enabled():
                    # Adapters are read when a block runs: they must still be set when the backward pass runs it again.
                    h = checkpoint(
                        run_block, layer, h, cos, sin, use_reentrant=False, preserve_rng_state=self.model.training
                    )
                else:
                    h = run_block(layer, h, cos, sin)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Final norm and head on any leading shape: (…, D) -> (…, V)."""
        with self.autocast():
            return self._wide(self.model.lm_head(norm(self.model.model.norm, h)[1]))


def linear_sites(base: BaseModel, lora: LoRAConfig) -> dict[str, tuple[int, int]]:
    """{site: (in, out)} of the linear layers that get an adapter, in the order of the model's modules."""
    out = {}
    for layer in range(base.num_layers):
        for name, shape in base.shape.linears.items():
            if name in lora.target_names:
                out[f"layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"] = shape
    return out


def _adapt(model: Any, lora: LoRAConfig) -> dict[str, AdaptedLinear]:
    """Put an `AdaptedLinear` around every target layer, in place; {site: layer} as `linear_sites` names them."""
    sites = {}
    for name, module in list(model.named_modules()):
        if ".layers." in name and name.split(".")[-1] in lora.target_names:
            site = AdaptedLinear(module, scaling=lora.scaling, dropout=lora.dropout)
            _replace(model, name, site)
            sites[name.removeprefix("model.")] = site
    return sites


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
