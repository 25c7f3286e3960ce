"""Model folders as other people write them: changed copies of tiny models, and what must come of reading them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fleetune.errors import UserError
from fleetune.models.config import LoRAConfig, ModelConfig
from fleetune.models.load import load_base
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from support import random_models as models

Folder = Callable[..., Path]
"""Makes a copy of a tiny model of an architecture, with the given fields of its config.json changed."""


def change(path: Path, **fields: Any) -> None:
    """Change fields of config.json; a field of None is taken out."""
    values = {**json.loads((path / "config.json").read_text()), **fields}
    (path / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def refused(path: Path | str, *said: str) -> None:
    """The model is refused in one sentence that names the field, the model and what is wrong."""
    with pytest.raises(UserError) as caught:
        load_base(ModelConfig(base=str(path)))
    assert (caught.value.field, caught.value.value) == ("model.base", str(path))
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def logits(path: Path | str, ids: torch.Tensor) -> torch.Tensor:
    """(N, S, V), of the whole model with a fresh adapter, for token ids (N, S)."""
    base = load_base(ModelConfig(base=str(path)))
    network = Network(base, Submodel.prefix(base.num_layers), LoRAConfig())
    return network.logits(network.blocks(network.embed(ids)))


def same_as_transformers(path: Path, num_tokens: int = 11) -> None:
    """The logits are those of the model that AutoModelForCausalLM loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = models.random_ids(2, num_tokens)
    with torch.no_grad():
        torch.testing.assert_close(logits(path, ids), model(ids).logits, rtol=1e-4, atol=1e-4)
