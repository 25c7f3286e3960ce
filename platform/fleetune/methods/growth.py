"""How DevFT's model grows: how many blocks each stage's submodel has, and how many rounds a stage lasts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field

from fleetune.errors import UserError
from fleetune.methods.base import MethodConfig


class GrowthSettings(MethodConfig):
    """The part of DevFT's settings that says how the model grows."""

    initial_capacity: int = Field(4, ge=1, le=10_000)
    """Blocks of the first stage's submodel."""
    growth_rate: int = Field(2, ge=2, le=10_000)
    """Factor by which the submodel grows from stage to stage."""
    stage_lengths: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] | None = None
    """How long each stage lasts beside the others, as rounds or as shares of the run: [1, 1, 2] gives the third of three stages
    half of all rounds. Default: stages of equal length."""


def capacities(initial: int, growth_rate: int, num_layers: int) -> list[int]:
    """Blocks per stage: {c, c g, c g^2, …} up to the full model. 4, 2, 32 -> [4, 8, 16, 32]; 4, 4, 32 -> [4, 16, 32]."""
    out = [initial]
    while out[-1] < num_layers:
        out.append(min(out[-1] * growth_rate, num_layers))
    return out


def stage_starts(num_stages: int, num_rounds: int, lengths: Sequence[float] | None = None) -> list[int]:
    """The first round of each stage, from 0.

    Stage s begins with round ceil(T (l_1 + … + l_s) / (l_1 + … + l_S)), of T rounds in S stages of lengths l. With equal
    lengths that says the same as: round t belongs to stage floor(t S / T).
    """
    lengths = lengths or [1.0] * num_stages
    total = math.fsum(lengths)
    # Shares such as 0.1 and 0.2 add up to a little more than they should, which must not cost a stage its first round.
    return [math.ceil(num_rounds * math.fsum(lengths[:s]) / total - 1e-9) for s in range(num_stages)]


def check_growth(settings: GrowthSettings, num_layers: int, num_rounds: int) -> None:
    """Raises UserError unless the first stage fits into the model and every stage has a length and a round."""
    if settings.initial_capacity > num_layers:
        raise UserError(
            f"exceeds the model's {num_layers} blocks",
            field="method.initial_capacity",
            value=settings.initial_capacity,
            hint="lower it, or take a deeper model",
        )
    blocks, lengths = capacities(settings.initial_capacity, settings.growth_rate, num_layers), settings.stage_lengths
    if len(blocks) > num_rounds:
        raise UserError(
            f"has fewer rounds than DevFT has stages ({blocks} blocks)",
            field="rounds.num_rounds",
            value=num_rounds,
            hint="raise it, or raise method.initial_capacity or method.growth_rate",
        )
    if lengths is None:
        return
    if len(lengths) != len(blocks):
        raise UserError(
            f"names {len(lengths)} lengths for {len(blocks)} stages ({blocks} blocks)",
            field="method.stage_lengths",
            value=list(lengths),
            hint=f"give {len(blocks)} numbers, or leave it out for stages of equal length",
        )
    starts = [*stage_starts(len(blocks), num_rounds, lengths), num_rounds]
    for stage, (start, end) in enumerate(pairwise(starts)):
        if start == end:
            raise UserError(
                f"leaves no round of {num_rounds} to stage {stage} ({blocks[stage]} blocks)",
                field="method.stage_lengths",
                value=list(lengths),
                hint="raise that stage's length, or rounds.num_rounds",
            )
