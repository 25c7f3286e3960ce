"""Tokenised examples as flat arrays, built once and read from an Arrow file afterwards.

One example is ``<bos>`` + prompt + (separator and response) + ``<eos>``. The texts are tokenised apart, so
that a response's tokens do not depend on its prompt. A tokenizer without bos or eos leaves it out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.data.config import DataConfig
from fleetune.data.dataset import TokenizedDataset, read_arrow, write_arrow
from fleetune.data.records import Examples, category_codes
from fleetune.data.template import render_prompts
from fleetune.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1  # of the cache files; raised whenever the tokens for the same text change
CHUNK = 8_192  # examples tokenised at once: bounds the memory for Python lists (assumed)
MAX_CATEGORIES = np.iinfo(np.int16).max


def default_cache_dir() -> Path:
    """Where tokenised data is kept: ``$FLEETUNE_CACHE``, or ``~/.cache/fleetune``."""
    return Path(os.environ.get("FLEETUNE_CACHE") or "~/.cache/fleetune").expanduser()


def tokenize(
    examples: Examples, *, tokenizer: Any, config: DataConfig, cache_dir: Path | None = None
) -> TokenizedDataset:
    """The examples' tokens, from the cache if they are there. ``tokenizer``: a fast one of transformers."""
    prompts = render_prompts(config.template, examples.columns)
    responses = [config.separator + response for response in examples["response"]]
    categories = examples["category"]
    backend = _backend_json(tokenizer)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    settings = json.dumps([FORMAT, config.max_tokens, config.loss_on, config.template, special])
    key = _content_hash([backend, settings], prompts, responses, categories)

    path = Path(cache_dir or default_cache_dir()) / "tokens" / f"{key}.arrow"
    dataset = read_arrow(path)
    if dataset is None:
        dataset = _build(prompts, responses, categories, tokenizer=tokenizer, backend=backend, config=config)
        try:
            write_arrow(path, dataset)
        except OSError as error:
            log.warning("tokenised data is not cached: %s", error)
    if dataset.num_truncated:
        share = f"{dataset.num_truncated} of {len(dataset)}"
        log.warning("%s examples are longer than data.max_tokens=%d and were cut", share, config.max_tokens)
    return dataset


def _backend_json(tokenizer: Any) -> str:
    """The tokenizer's file content, without the padding and truncation that others may have switched on."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        hint = "use a model with a tokenizer.json"
        raise UserError("the model's tokenizer is not a fast one", field="model.base", hint=hint)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**content, "padding": None, "truncation": None})


def _content_hash(*texts: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for group in texts:
        digest.update(f"{len(group)}:".encode())
        for text in group:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _build(
    prompts: list[str], responses: list[str], categories: list[str], *,
    tokenizer: Any, backend: str, config: DataConfig,
) -> TokenizedDataset:  # fmt: skip
    from tokenizers import Tokenizer

    codes, names = category_codes(categories)
    if len(names) > MAX_CATEGORIES:
        rule = f"{len(names)} categories are more than {MAX_CATEGORIES}"
        raise UserError(rule, field="data.columns.category", hint="to keep users apart, set data.partition.key")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if tokenizer.bos_token and config.template.startswith(tokenizer.bos_token):
        bos = None  # the template writes it itself
    encode = Tokenizer.from_str(backend).encode_batch_fast
    parts = []
    for start in range(0, len(prompts), CHUNK):
        rows = slice(start, start + CHUNK)
        prompt_ids = [encoding.ids for encoding in encode(prompts[rows], add_special_tokens=False)]
        response_ids = [encoding.ids for encoding in encode(responses[rows], add_special_tokens=False)]
        parts.append(_assemble(prompt_ids, response_ids, bos=bos, eos=eos, max_tokens=config.max_tokens))
    tokens, lengths, prompt_lengths, cut = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if (prompt_lengths == 0).any():
        rule = f"the prompt of example {int(np.argmin(prompt_lengths))} has no token"
        raise UserError(rule, field="data.template", hint="put some text beside the column")
    pad = next(i for i in (tokenizer.pad_token_id, eos, 0) if i is not None)
    return TokenizedDataset(
        tokens=tokens, offsets=np.concatenate([[0], np.cumsum(lengths)]), prompt_lengths=prompt_lengths,
        category=codes.astype(np.int16), category_names=tuple(names), loss_on=config.loss_on,
        pad_token_id=pad, num_truncated=int(cut.sum()),
    )  # fmt: skip


def _assemble(
    prompt_ids: list[list[int]],
    response_ids: list[list[int]],
    *,
    bos: int | None,
    eos: int | None,
    max_tokens: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Join the parts of n examples: tokens ``(total,)``, lengths, prompt lengths and whether cut ``(n,)``.

    What is too long loses the beginning of its prompt, but for one token; what is still too long, its end.
    """
    prompt_sizes, prompt_flat = _flatten(prompt_ids)
    tail = [] if eos is None else [eos]
    response_sizes, response_flat = _flatten([ids + tail for ids in response_ids])
    num_bos = 0 if bos is None else 1

    full_prompt = prompt_sizes + num_bos
    kept_prompt = np.minimum(full_prompt, np.maximum(max_tokens - response_sizes, 1))
    kept_response = np.minimum(response_sizes, max_tokens - kept_prompt)
    lengths = kept_prompt + kept_response

    pool = np.concatenate([np.array([bos] if num_bos else [], dtype=np.int32), prompt_flat, response_flat])
    prompt_ends = num_bos + np.cumsum(prompt_sizes)
    response_starts = num_bos + len(prompt_flat) + np.cumsum(response_sizes) - response_sizes
    starts = np.stack([np.zeros_like(prompt_ends), prompt_ends - (kept_prompt - num_bos), response_starts], axis=1)
    sizes = np.stack([np.full_like(prompt_ends, num_bos), kept_prompt - num_bos, kept_response], axis=1)
    tokens = pool[_ranges(starts.ravel(), sizes.ravel())]
    cut = lengths < full_prompt + response_sizes
    return tokens, lengths, kept_prompt.astype(np.int32), cut


def _flatten(ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
    return sizes, np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=int(sizes.sum()))


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``[s0, s0+1, …, s1, s1+1, …]``: for every start, as many consecutive numbers as its size."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(sizes.sum())
