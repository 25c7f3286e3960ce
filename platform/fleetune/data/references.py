"""The reference path of every example: the same response after a prompt that also holds the ground-truth solution.

Both paths carry the same response ids, those of the base path, because the response's probabilities on the two are compared token
by token. Before them stand the tokens of the reference path's own text. Where the base path's first response token also holds the
end of its prompt, the reference path leaves that end to it, if it ends alike.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fleetune.data.columns import REFERENCE_NAMES
from fleetune.data.config import DataConfig
from fleetune.data.dataset import TokenizedDataset
from fleetune.data.ends import Ends, ends_of
from fleetune.data.records import Examples
from fleetune.data.template import render_prompts
from fleetune.data.tokenize import CHUNK, first_token, plain_backend, texts_of
from fleetune.errors import UserError, unknown_name


def with_references(
    dataset: TokenizedDataset, examples: Examples, *, tokenizer: Any, config: DataConfig, room: int
) -> TokenizedDataset:
    """``dataset``, the tokens of ``examples``, with the reference path of each of its n examples.

    ``room``: the longest text that the model takes. Raises UserError if there is no column of references, if an example has
    none, or if a path is longer than ``room`` or ``data.max_reference_tokens``: a cut would take away the solution, for which the
    path is there.
    """
    kept = examples.take(dataset.rows)
    column = _column(kept, config)
    blank = [i for i, text in enumerate(kept[column]) if not text.strip()]
    if blank:
        raise UserError(
            f"{kept.source}: {len(blank)} of {len(kept)} examples have no reference in column {column!r}, the first is "
            f"example {int(dataset.rows[blank[0]])}",
            field="data.columns.reference",
            value=config.columns.reference,
            hint="fill it, or leave these examples out of the file",
        )
    backend = plain_backend(tokenizer)
    ends = ends_of(backend, tokenizer, config)
    backend.post_processor = None
    prompts, responses = texts_of(kept, config, ends)
    columns = {**kept.columns, "prompt": prompts, "reference": kept[column]}
    columns = dict(ends.without_inner_bos(columns, config.reference_template))
    texts = [ends.once(text) for text in render_prompts(config.reference_template, columns)]
    shared = _shared_ends(texts, prompts, dataset.overlaps)
    follows = [config.separator + response for response in responses]
    reference = _joined(dataset, _prompt_ids(texts, follows, shared, backend=backend, ends=ends))
    _refuse_long(reference, config, room)
    return replace(dataset, reference=reference)


def _column(examples: Examples, config: DataConfig) -> str:
    """The column of the references: the one that the job names, else the first usual one."""
    named = config.columns.reference
    known = list(examples.columns)
    if named is not None and named not in known:
        raise unknown_name(f"column in {examples.source}", named, known, field="data.columns.reference")
    found = named or next((name for name in REFERENCE_NAMES if name in known), None)
    if found is None:
        raise UserError(
            f"{examples.source}: the method needs a reference solution for every example, and no column is named like one "
            f"({', '.join(REFERENCE_NAMES)})",
            field="data.columns.reference",
            hint=f"name one of: {', '.join(known)}",
        )
    return found


def _shared_ends(texts: list[str], prompts: list[str], overlaps: np.ndarray) -> list[int]:
    """How many characters at the end of each text the base path's first response token holds, (n,).

    A text that ends otherwise than the base path's prompt stays whole.
    """
    out = []
    for text, prompt, overlap in zip(texts, prompts, overlaps.tolist(), strict=True):
        end = prompt[len(prompt) - overlap :]
        out.append(overlap if text.endswith(end) else 0)
    return out


def _prompt_ids(
    texts: list[str], follows: list[str], shared: list[int], *, backend: Any, ends: Ends
) -> list[list[int]]:
    """The ids of each text up to its last ``shared`` characters, as the tokenizer gives them where ``follows`` comes after it.

    If a token of this joint text lies across that place, the tokens are those of the text alone.
    """
    out: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        part = slice(start, start + CHUNK)
        joint = [text + rest for text, rest in zip(texts[part], follows[part], strict=True)]
        encodings = backend.encode_batch(joint, add_special_tokens=False)
        for text, whole, size, encoding in zip(texts[part], joint, shared[part], encodings, strict=True):
            stop = len(text) - size
            first = first_token(encoding, stop, len(whole))
            if first is not None and encoding.token_to_chars(first)[0] >= stop:
                ids = encoding.ids[:first]
            else:
                ids = backend.encode(text[:stop], add_special_tokens=False).ids
            head, _ = ends.head_of(text, ids)
            out.append([*head, *ids])
    return out


def _joined(base: TokenizedDataset, prompts: list[list[int]]) -> TokenizedDataset:
    """The ids of ``prompts`` before the response ids of ``base``, example by example."""
    starts, stops = base.offsets[:-1] + base.prompt_lengths, base.offsets[1:]
    parts = []
    for prompt, start, stop in zip(prompts, starts.tolist(), stops.tolist(), strict=True):
        parts += [np.array(prompt, np.int32), base.tokens[start:stop]]
    sizes = np.array([len(prompt) for prompt in prompts], np.int64)
    return replace(
        base,
        tokens=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum(sizes + stops - starts)]),
        prompt_lengths=sizes.astype(np.int32),
        num_truncated=0,
    )


def _refuse_long(reference: TokenizedDataset, config: DataConfig, room: int) -> None:
    """Raises UserError if a reference path is longer than the job or the model allows."""
    limit = min(config.max_reference_tokens or 2 * config.max_tokens, room)
    num_long = int((reference.lengths > limit).sum())
    if num_long:
        longest = int(reference.lengths.argmax())
        length = int(reference.lengths[longest])
        fits = f"set it to {length}" if length <= room else f"the model takes {room}"
        raise UserError(
            f"{num_long} of {len(reference)} reference paths have more than {limit} tokens: the longest, of example "
            f"{int(reference.rows[longest])}, has {length}, and a cut would take its solution away",
            field="data.max_reference_tokens",
            value=config.max_reference_tokens,
            hint=f"{fits}; or shorten data.reference_template or the data",
        )
