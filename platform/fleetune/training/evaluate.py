"""Quality of a global model on held-out examples: loss on the counted tokens, and exact match of generated answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from fleetune.models.network import Network
from fleetune.tensors import Stack, Tensors
from fleetune.training.device import on_device
from fleetune.training.generate import generate
from fleetune.training.loss import cohort_loss

if TYPE_CHECKING:
    from fleetune.data.answers import AnswerReader
    from fleetune.data.dataset import TokenizedDataset


@dataclass(frozen=True)
class EvalSums:
    """Sums over some examples; adding them up in a fixed order makes the result independent of who computed which."""

    loss: float
    """Sum over counted tokens, in nats."""
    num_tokens: int
    """Counted tokens."""
    num_correct: int | None
    """Examples whose generated answer is right; None if nothing was to be generated."""
    num_answers: int
    """Examples for which an answer was generated."""


@torch.inference_mode()
def evaluate_rows(
    network: Network,
    adapter: Tensors,
    *,
    data: TokenizedDataset,
    responses: Sequence[str],
    rows: np.ndarray,
    reader: AnswerReader | None,
    max_new_tokens: int | None,
    answer_pattern: str,
    is_executed: bool = False,
    num_answers: int | None = None,
) -> EvalSums:
    """Sums over the examples ``rows (n,)`` of ``data``, for one adapter {name: shape of one client}.

    ``responses``: the reference text of every example of ``data``. Nothing is generated without ``max_new_tokens`` or ``reader``,
    and only for the first ``num_answers`` examples of ``data`` (None: all). ``is_executed``: answers are programs, and
    right if they give the reference's number.
    """
    from fleetune.data.batches import collate

    network.set_adapter(Stack.of([adapter]).to(network.device).views())
    ids, labels = (on_device(a, network.device) for a in collate(data, rows))
    loss, counts = cohort_loss(network, network.blocks(network.embed(ids)), labels, 1)
    num_tokens = int(counts.sum())
    num_correct = None
    answered = rows if num_answers is None else rows[rows < num_answers]
    if max_new_tokens is not None and reader is not None:
        answers = _generate(network, data, answered, reader, max_new_tokens) if len(answered) else []
        pattern = None if is_executed else answer_pattern
        num_correct = _count_correct(answers, [responses[i] for i in answered], pattern)
    network.set_adapter(None)
    return EvalSums(float(loss.sum()) * num_tokens, num_tokens, num_correct, len(answered))


@torch.inference_mode()
def evaluate_clients(
    network: Network,
    adapters: Sequence[Tensors],
    *,
    data: TokenizedDataset,
    responses: Sequence[str],
    rows: np.ndarray,
    reader: AnswerReader | None,
    max_new_tokens: int | None,
    answer_pattern: str,
) -> list[EvalSums]:
    """Sums over each of K clients' examples ``rows (K, b)`` of ``data``, filled up with `NO_EXAMPLE`.

    ``adapters``: one {name: shape of one client} for each client, or a single one that all share. The losses of all clients are
    computed stacked; answers are generated client by client, as a batch shrinks when answers end. The rest is as for
    `evaluate_rows`.
    """
    from fleetune.data.batches import NO_EXAMPLE, collate

    network.set_adapter(Stack.of(list(adapters)).to(network.device).views())
    ids, labels = (on_device(a, network.device) for a in collate(data, rows.reshape(-1)))
    losses, counts = cohort_loss(network, network.blocks(network.embed(ids)), labels, len(rows))
    out = []
    for k, (loss, count) in enumerate(zip(losses.tolist(), counts.tolist(), strict=True)):
        own = rows[k][rows[k] != NO_EXAMPLE]
        num_correct, num_answers = None, 0
        if max_new_tokens is not None and reader is not None:
            network.set_adapter(Stack.of([adapters[k % len(adapters)]]).to(network.device).views())
            answers = _generate(network, data, own, reader, max_new_tokens)
            num_correct, num_answers = _count_correct(answers, [responses[i] for i in own], answer_pattern), len(own)
        out.append(EvalSums(loss * count, count, num_correct, num_answers))
    network.set_adapter(None)
    return out


def _generate(
    network: Network, data: TokenizedDataset, rows: np.ndarray, reader: AnswerReader, max_new: int
) -> list[str]:
    """Greedy continuations of the prompts, as text."""
    from fleetune.data.batches import eval_prompts

    ids, mask = (on_device(a, network.device) for a in eval_prompts(data, rows))
    # After an answer's end the end token is repeated: a padding token might not be one that is left out of texts.
    padding = reader.end if reader.end >= 0 else data.pad_token_id
    out = generate(network, ids, mask, max_new_tokens=max_new, end=reader.end, padding=padding)
    return reader.texts(out.cpu().numpy())


def _count_correct(predictions: list[str], references: list[str], pattern: str | None) -> int:
    """Right answers: those that ``pattern`` finds, or without one the values of programs."""
    from fleetune.data.programs import execution_match
    from fleetune.data.template import exact_match

    if pattern is None:
        return int(execution_match(predictions, references).sum())
    return int(exact_match(predictions, references, pattern=pattern).sum())


def totals(parts: Iterable[EvalSums]) -> dict[str, float]:
    """Mean loss per token (nats) and the fraction of right answers, from sums that are added up in their order."""
    parts = list(parts)
    num_tokens = sum(p.num_tokens for p in parts)
    out = {"eval_loss": sum(p.loss for p in parts) / max(1, num_tokens)}
    if parts and all(p.num_correct is not None for p in parts):
        out["eval_accuracy"] = sum(p.num_correct or 0 for p in parts) / sum(p.num_answers for p in parts)
    return out
