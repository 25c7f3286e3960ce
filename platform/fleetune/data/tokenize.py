"""Tokenised examples as flat arrays, built once and read from an Arrow file afterwards.

One example is ``<bos>`` + (prompt, separator and response, tokenised as one text) + ``<eos>``. The response begins with the
first token that holds a character of the separator or the response, also where that token holds some of the prompt's end.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fleetune.data.config import DataConfig
from fleetune.data.dataset import TokenizedDataset, read_arrow, write_arrow
from fleetune.data.ends import Ends, ends_of
from fleetune.data.records import Examples
from fleetune.data.template import render_prompts
from fleetune.errors import UserError
from fleetune.files import default_cache_dir

log = logging.getLogger(__name__)

FORMAT = 2  # of the cache files; raised whenever the tokens for the same text change
CHUNK = 8_192  # examples tokenised at once: bounds the memory for Python lists (assumed)

NO_RESPONSE = "no token of the response"
NO_PROMPT = "no token of the prompt"
NO_ROOM = "a separator that fills data.max_tokens"


def tokenize(
    examples: Examples, *, tokenizer: Any, config: DataConfig, cache_dir: Path | None = None
) -> TokenizedDataset:
    """The examples' tokens, from the cache if it has them. ``tokenizer``: a fast one of transformers.

    An example without a token of its prompt or of its response is left out. Raises UserError if none is left.
    """
    backend = plain_backend(tokenizer)
    ends = ends_of(backend, tokenizer, config)
    # `ends` adds its tokens instead; it would also trim blanks, after which tokens no longer map to characters.
    backend.post_processor = None
    prompts, responses = texts_of(examples, config, ends)
    settings = json.dumps([FORMAT, config.max_tokens, config.loss_on, config.separator, ends, tokenizer.pad_token_id])
    key = _content_hash([backend.to_str(), settings], prompts, responses)

    path = Path(cache_dir or default_cache_dir()) / "tokens" / f"{key}.arrow"
    dataset = read_arrow(path)
    if dataset is None:
        pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
        dataset = _build(prompts, responses, backend=backend, ends=ends, pad=pad, config=config)
        try:
            write_arrow(path, dataset)
        except OSError as error:
            log.warning("tokenised data is not cached: %s", error)
    _tell(examples, dataset, config)
    return dataset


def continuations(examples: Examples, dataset: TokenizedDataset, *, tokenizer: Any, config: DataConfig) -> list[str]:
    """The text that should be generated after each prompt of ``dataset``, the examples' tokens, special tokens left out.

    That is the separator and the response, and before them the end of a prompt that shares a token with them.
    """
    prompts = render_prompts(config.template, examples.columns)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    texts = []
    for row, overlap in zip(dataset.rows.tolist(), dataset.overlaps.tolist(), strict=True):
        text = prompts[row][len(prompts[row]) - overlap :] + config.separator + examples["response"][row]
        for mark in special:
            text = text.replace(mark, "")
        texts.append(text)
    return texts


def plain_backend(tokenizer: Any) -> Any:
    """A copy of the ``tokenizers.Tokenizer`` inside, without the padding and truncation that others may have switched on."""
    from tokenizers import Tokenizer

    if getattr(tokenizer, "backend_tokenizer", None) is None:
        hint = "use a model with a tokenizer.json; a slow tokenizer does not tell which token holds which character"
        raise UserError("the model's tokenizer is not a fast one", field="model.base", hint=hint)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**content, "padding": None, "truncation": None}))


def texts_of(examples: Examples, config: DataConfig, ends: Ends) -> tuple[list[str], list[str]]:
    """Prompts and responses, without a bos that would be another one."""
    columns = ends.without_inner_bos(examples.columns, config.template)
    return [ends.once(prompt) for prompt in render_prompts(config.template, columns)], columns["response"]


def _content_hash(*texts: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for group in texts:
        digest.update(f"{len(group)}:".encode())
        for text in group:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _tell(examples: Examples, dataset: TokenizedDataset, config: DataConfig) -> None:
    """Warn of examples that were left out or cut. Every run logs this, not only the one that filled the cache."""
    if dataset.left_out:
        num_left_out = sum(dataset.left_out.values())
        reasons = ", ".join(f"{count} with {reason}" for reason, count in dataset.left_out.items())
        if len(dataset) == 0:
            hint = "set data.columns, data.template, data.separator or data.max_tokens so that both give tokens"
            rule = f"no example is left: {reasons}"
            raise UserError(rule, field=examples.field, value=examples.source, hint=hint)
        log.warning("%s: %d of %d examples left out: %s", examples.source, num_left_out, len(examples), reasons)
    if dataset.num_truncated:
        truncated = f"{dataset.num_truncated} of {len(dataset)}"
        log.warning("%s examples are longer than data.max_tokens=%d and were cut", truncated, config.max_tokens)


class _Pieces(NamedTuple):
    """The tokens of one example."""

    prompt: list[int]
    response: list[int]
    num_fixed: int
    """Tokens at the prompt's beginning that are never cut: its bos."""
    num_separator: int
    """Tokens of the response before the first that holds a character of the response itself."""
    overlap: int
    """Characters of the prompt's end in the response's first token."""


def _build(
    prompts: list[str], responses: list[str], *, backend: Any, ends: Ends, pad: int, config: DataConfig
) -> TokenizedDataset:
    parts = []
    reasons: Counter[str] = Counter()
    for start in range(0, len(prompts), CHUNK):
        pairs = list(zip(prompts[start : start + CHUNK], responses[start : start + CHUNK], strict=True))
        texts = [prompt + config.separator + response for prompt, response in pairs]
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        rows, pieces = [], []
        for row, ((prompt, response), encoding) in enumerate(zip(pairs, encodings, strict=True), start):
            found = _cut(encoding, prompt, response, config=config, ends=ends)
            if isinstance(found, str):
                reasons[found] += 1
            else:
                rows.append(row)
                pieces.append(found)
        parts.append((*_assemble(pieces, config.max_tokens), np.array(rows, dtype=np.int64)))
    tokens, lengths, prompt_lengths, cut, overlaps, rows_kept = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    return TokenizedDataset(
        tokens=tokens, offsets=np.concatenate([[0], np.cumsum(lengths)]), prompt_lengths=prompt_lengths,
        rows=rows_kept, overlaps=overlaps, loss_on=config.loss_on, pad_token_id=pad,
        num_truncated=int(cut.sum()), left_out=dict(sorted(reasons.items())),
    )  # fmt: skip


def _cut(encoding: Any, prompt: str, response: str, *, config: DataConfig, ends: Ends) -> _Pieces | str:
    """The joint text's tokens, cut at the beginning of the response; or the reason why the example cannot be learnt."""
    ids, seam = encoding.ids, len(prompt)
    stop = seam + len(config.separator) + len(response)
    own = first_token(encoding, stop - len(response), stop)  # not the separator's
    if own is None or ends.is_end_alone(response):
        return NO_RESPONSE
    begins = first_token(encoding, seam, stop - len(response))
    first = own if begins is None else begins
    head, num_fixed = ends.head_of(prompt, ids)
    pieces = _Pieces(
        prompt=[*head, *ids[:first]],
        response=[*ids[first:], *ends.tail_of(response)],
        num_fixed=num_fixed,
        num_separator=own - first,
        overlap=max(seam - encoding.token_to_chars(first)[0], 0),
    )
    if not pieces.prompt:
        return NO_PROMPT
    return NO_ROOM if pieces.num_separator >= config.max_tokens - max(num_fixed, 1) else pieces


def first_token(encoding: Any, start: int, stop: int) -> int | None:
    """Index of the first token with one of the characters start … stop - 1; None if a normalizer has dropped them all."""
    tokens = (encoding.char_to_token(position) for position in range(start, stop))
    return next((token for token in tokens if token is not None), None)


def _assemble(pieces: list[_Pieces], max_tokens: int) -> tuple[np.ndarray, ...]:
    """Join the parts of n examples: tokens ``(total,)``; lengths, prompt lengths, True if cut, and overlaps, ``(n,)`` each.

    An example that is too long loses the beginning of its prompt, except for the bos or one token. If that is not enough it
    loses the end of its response.
    """
    prompt_sizes, prompt_flat = _flatten([piece.prompt for piece in pieces])
    response_sizes, response_flat = _flatten([piece.response for piece in pieces])
    fixed = np.array([piece.num_fixed for piece in pieces], dtype=np.int64)

    room = np.maximum(max_tokens - response_sizes, np.maximum(fixed, 1))
    kept_prompt = np.minimum(prompt_sizes, room)
    kept_response = np.minimum(response_sizes, max_tokens - kept_prompt)
    lengths = kept_prompt + kept_response

    prompt_ends = np.cumsum(prompt_sizes)
    response_starts = len(prompt_flat) + np.cumsum(response_sizes) - response_sizes
    starts = np.stack([prompt_ends - prompt_sizes, prompt_ends - (kept_prompt - fixed), response_starts], axis=1)
    sizes = np.stack([fixed, kept_prompt - fixed, kept_response], axis=1)
    tokens = np.concatenate([prompt_flat, response_flat])[ranges(starts.ravel(), sizes.ravel())]
    cut = lengths < prompt_sizes + response_sizes
    overlaps = np.array([piece.overlap for piece in pieces], dtype=np.int32)
    return tokens, lengths, kept_prompt.astype(np.int32), cut, overlaps


def _flatten(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Sizes ``(n,)`` and all ids end to end ``(total,)``."""
    sizes = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return sizes, np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(sizes.sum()))


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``[s0, s0+1, …, s1, s1+1, …]``: for every start, as many consecutive numbers as its size."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(sizes.sum())
