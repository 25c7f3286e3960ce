"""The blocks that a client holds, as it stores them: in another form than the base's, with pairs merged into their matrices."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import replace

from fleetune.models.base import BaseModel
from fleetune.models.model import Model
from fleetune.models.quantize import dequantize, is_linear, quantize, statistics
from fleetune.models.submodel import Submodel


def stored(base: BaseModel, model: Model, *, scaling: float) -> tuple[BaseModel, Submodel]:
    """The base and the blocks of it from which a model's network is made.

    Mostly they are those of the model. If it stores its blocks otherwise, or has pairs in them, the base is one of these blocks
    alone: W + scaling B A of each matrix, quantised as the model says. Matrices without a pair that are stored like the base's
    share its memory.
    """
    merged, kind = model.merged, model.quantization or base.quantization
    if not merged and kind == base.quantization:
        return base, model.submodel
    weights = model.submodel.weights(base)
    out = {name: w for name, w in weights.items() if not _of_linear(name)}
    for name in filter(is_linear, weights):
        a, b = (merged.get(f"{name.removeprefix('model.').removesuffix('.weight')}.merged_{c}") for c in "AB")
        if a is None and kind == base.quantization:
            out.update({name: weights[name], **{f"{name}.{k}": t for k, t in statistics(weights, name).items()}})
            continue
        matrix = dequantize(weights, name, base.quantization)
        if a is not None and b is not None:
            product = b.to(matrix.device) @ a.to(matrix.device)
            matrix = (matrix.float() + scaling * product).to(matrix.dtype)
        out.update({name: matrix} if kind == "none" else quantize(name, matrix, kind))
    num_layers = model.submodel.num_layers
    config = {**base.config, "num_hidden_layers": num_layers}
    return replace(base, config=config, weights=out, quantization=kind), Submodel.prefix(num_layers)


def key_of(model: Model) -> Hashable:
    """What tells the networks of two models over one base apart; what is held beside the matrices is no part of a network."""
    merged = model.merged
    if not merged and model.quantization is None:
        return model.submodel
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in merged.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return model.submodel, model.quantization, digest.hexdigest()


def _of_linear(name: str) -> bool:
    """True for a block's matrix, its codes and their statistics."""
    return is_linear(name) or (".weight." in name and is_linear(f"{name.split('.weight.')[0]}.weight"))
