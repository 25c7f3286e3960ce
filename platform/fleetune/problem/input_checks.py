"""Checks of a job against what it reads, before any work begins: token ids, lengths and windows, and how clients adapt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fleetune.data.dataset import TokenizedDataset
from fleetune.errors import UserError
from fleetune.fleet.fleet import BATCH, CAPACITY, RANK
from fleetune.methods import METHODS
from fleetune.methods.base import Method
from fleetune.models.base import BaseModel
from fleetune.models.family import attention_window
from fleetune.spec import RunSpec
from fleetune.spec.run_config import EvaluationConfig


def check_length(max_tokens: int, base: BaseModel) -> None:
    """Raises UserError if the model allows no examples of this length."""
    positions = int(base.config.get("max_position_embeddings", 1 << 30))
    if max_tokens > positions:
        raise UserError(
            f"exceeds the model's {positions} positions",
            field="data.max_tokens",
            value=max_tokens,
            hint="lower it",
        )
    window = attention_window(base.config)
    if window is not None and max_tokens > window:
        raise UserError(
            f"exceeds the model's attention window of {window}; every token attends to all before it here",
            field="data.max_tokens",
            value=max_tokens,
            hint=f"lower it to at most {window}",
        )


def room_of(base: BaseModel) -> int:
    """Tokens of the longest text that the model takes: its positions, or its attention window if that is less."""
    positions, window = int(base.config.get("max_position_embeddings", 1 << 30)), attention_window(base.config)
    return positions if window is None else min(positions, window)


def check_answers(
    data: TokenizedDataset, config: EvaluationConfig, base: BaseModel, *, what: str = "the held-out examples"
) -> None:
    """Raises UserError if a prompt and its longest answer exceed the model's positions or its attention window.

    ``what``: the data's name for people.

    The last new token is never fed back, so n new tokens after a prompt take n - 1 further positions.
    """
    if not config.generate or len(data) == 0:
        return
    longest = int(data.prompt_lengths.max())
    positions, window = int(base.config.get("max_position_embeddings", 1 << 30)), attention_window(base.config)
    room = room_of(base)
    if longest + config.max_new_tokens - 1 > room:
        limit = f"{positions} positions" if room == positions else f"attention window of {window}"
        raise UserError(
            f"exceeds the model's {limit} after the longest prompt of {what}, {longest} tokens",
            field="evaluation.max_new_tokens",
            value=config.max_new_tokens,
            hint=f"at most {room + 1 - longest} fit" if longest <= room else "lower data.max_tokens",
        )


def within_vocabulary(data: TokenizedDataset, tokenizer: Any, base: BaseModel, *, what: str) -> TokenizedDataset:
    """The data with a padding id that the model's embedding has: padding is masked, so any id will do.

    Raises UserError with the first example (from 0) that has a token beyond the embedding, in prompt or response. ``what``: the
    data's name for people.
    """
    vocabulary = int(base.config["vocab_size"])
    beyond = np.flatnonzero(np.asarray(data.tokens) >= vocabulary)
    if len(beyond):
        row = int(data.rows[np.searchsorted(data.offsets, beyond[0], side="right") - 1])
        token = int(data.tokens[beyond[0]])
        text = str(tokenizer.convert_ids_to_tokens(token))[:40]
        raise UserError(
            f"example {row} of {what} has the token {text!r}, id {token}, beyond the model's vocabulary of {vocabulary}",
            field="model.base",
            value=base.name,
            hint="save the model's own tokenizer beside it, or the model after model.resize_token_embeddings",
        )
    if data.reference is not None:
        paths = within_vocabulary(data.reference, tokenizer, base, what=f"{what}, on the reference path,")
        data = replace(data, reference=paths)
    return data if data.pad_token_id < vocabulary else replace(data, pad_token_id=0)


def can_shrink(method: type[Method]) -> bool:
    """True if the method makes submodels of fewer blocks for a client."""
    return method.shrunk is not Method.shrunk


def check_adapt(spec: RunSpec, method: Method) -> None:
    """Raises UserError if the method does not support clients that adapt in the job's way (``fleet.adapt``)."""
    kind = spec.fleet.adapt
    if kind == CAPACITY and not can_shrink(type(method)):
        able = ", ".join(name for name, other in METHODS.items() if can_shrink(other))
        raise UserError(
            f"method {spec.method.name} has no submodels of fewer blocks",
            field="fleet.adapt",
            value=kind,
            hint=f"methods that have: {able}; or adapt batch, checkpointing or rank",
        )
    if kind == RANK and not spec.method.traits.ranked:
        raise UserError(
            f"method {spec.method.name} has no adapters with ranks, of which a client could train fewer",
            field="fleet.adapt",
            value=kind,
            hint="adapt batch or checkpointing",
        )
    if kind in (BATCH, RANK) and spec.method.traits.coupled:
        raise UserError(
            f"method {spec.method.name} works on all clients of a round at once, so their batches and ranks are one",
            field="fleet.adapt",
            value=kind,
            hint="adapt checkpointing, or give each client a server of its own (method.server=per_client)",
        )
