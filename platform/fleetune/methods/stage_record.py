"""What DevFT keeps of a stage: its groups, the similarities that they were made of, and how far each group's adapter moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fleetune.methods.layer_groups import Groups, GroupSettings
from fleetune.methods.layer_similarity import layer_similarity
from fleetune.models.base import BaseModel
from fleetune.models.submodel import Submodel
from fleetune.tensors import Tensors


def stage_record(
    base: BaseModel, settings: GroupSettings, values: Mapping[str, Any], full: Tensors, now: Tensors
) -> dict[str, Any]:
    """Plain data. ``values``: those of DevFT's state; ``full``: the adapter of all blocks when the stage began; ``now``: the
    submodel's after it.

    The similarity is computed once more, with the same bits as when the stage began: to keep it in the state would write it
    into every round's checkpoint. It is there for every grouping, and in the last stage, where each block is a group.
    """
    groups: Groups = values["groups"]
    begun = Submodel.from_values(values["submodel"]).fuse_adapter(full)
    return {
        "groups": groups,
        "contiguous": all(group == list(range(group[0], group[-1] + 1)) for group in groups),
        "similarity_of": settings.similarity,
        "similarity": layer_similarity(base, full, settings.similarity).tolist(),
        "moved": moved(begun, now, len(groups)),
    }


def moved(begun: Tensors, now: Tensors, num_groups: int) -> list[float]:
    """Norm of the change of each group's adapter tensors: the sum of the server's steps of the stage, taken together.

    It stands for the gradients' norms, which clients do not send: a number per tensor would be charged to their uplink, and
    what a method costs must not depend on what is recorded of it. Tensors that are not in both, or have another shape, are left
    out.
    """
    squares = [0.0] * num_groups
    for name, tensor in now.items():
        if name in begun and begun[name].shape == tensor.shape and name.startswith("layers."):
            squares[int(name.split(".")[1])] += float((tensor - begun[name]).double().square().sum())
    return [square**0.5 for square in squares]
