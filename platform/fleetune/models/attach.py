"""Puts a pool of adapters and its gates, as a run has shipped them, into a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fleetune.models.peft_format import load_tensors
from fleetune.models.pools import BlockGate, Mixture, Pool, mixture


def attach(model: Any, folder: str | Path) -> Any:
    """The causal language model of transformers with what `peft_format.save_adapter` wrote into ``folder``, in place.

    Hooks do it: a block's gate reads the block's input before it runs, and a linear layer's mixture is added to its output.
    """
    tensors = load_tensors(Path(folder))
    stacked = {name: tensor.to(model.device)[None] for name, tensor in tensors.items()}  # one client
    for n, layer in enumerate(model.model.layers):
        gate = BlockGate.of(stacked, n)
        if gate is not None:
            layer.register_forward_pre_hook(_reading(gate), with_kwargs=True)
        for name, linear in layer.named_modules():
            site = f"layers.{n}.{name}"
            found = mixture(stacked, site, Pool.of(tensors, site, dtype=model.dtype, device=model.device), gate)
            if found is not None:
                linear.register_forward_hook(_adding(found))
    return model


def _reading(gate: BlockGate) -> Any:
    """A hook before a block, by which its gate sees the residual stream (b, S, D)."""

    def hook(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        gate(args[0] if args else kwargs["hidden_states"])

    return hook


def _adding(found: Mixture) -> Any:
    """A hook behind a linear layer, which adds the mixture of its input (b, S, in) to its output (b, S, out)."""

    def hook(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + found(args[0])

    return hook
