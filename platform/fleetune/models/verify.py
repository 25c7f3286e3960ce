"""Compares the decoder with transformers' own model, on small random weights, for configurations with unknown fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fleetune.models.folder import one_line, refusal

# A copy that takes a moment, and keeps what decides the arithmetic: head size, positions, windows, switches.
VOCABULARY, NUM_TOKENS = 64, 12
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
TOLERANCE = 1e-3  # of the largest logit: fp32 sums in another order differ by 1e-6, a switch by far more


def check_against_transformers(values: dict[str, Any], unknown: Sequence[str], name: str) -> None:
    """Raises UserError with the ``unknown`` fields if the logits differ, or if transformers cannot run such a model."""
    shown = ", ".join(unknown[:8]) + (", …" if len(unknown) > 8 else "")
    try:
        ours, theirs = _logits(_shrunk(values), name)
    except Exception as error:
        rule = f"config.json has fields that are not known here ({shown}), and transformers made no model of it"
        raise refusal(name, rule, one_line(error)) from error
    if not (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max():
        rule = f"config.json has fields that change what the model computes and are not supported: {shown}"
        raise refusal(name, rule, "name another model")


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    out = {**values, **SMALL, "head_dim": values.get("head_dim") or values["hidden_size"] // heads}
    if values.get("layer_types"):
        out["layer_types"] = values["layer_types"][: SMALL["num_hidden_layers"]]
    return out


def _logits(values: dict[str, Any], name: str) -> tuple[Tensor, Tensor]:
    """Logits (1, NUM_TOKENS, VOCABULARY) of the decoder and of transformers' model, in training mode to show any dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from fleetune.models.base import BaseModel
    from fleetune.models.config import LoRAConfig
    from fleetune.models.network import Network
    from fleetune.models.submodel import Submodel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32).train()
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))  # gains and biases that show, attention that is not even
        ids = torch.randint(VOCABULARY, (1, NUM_TOKENS))
        theirs = model(ids, use_cache=False).logits
        base = BaseModel(name, values, dict(model.state_dict()), "none", "")
        network = Network(base, Submodel.prefix(base.num_layers), LoRAConfig())
        return network.logits(network.blocks(network.embed(ids))), theirs
