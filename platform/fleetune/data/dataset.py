"""Tokenised examples as flat arrays, and as an Arrow IPC file that is memory-mapped without a copy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fleetune import files


@dataclass(frozen=True)
class TokenizedDataset:
    """All examples' tokens end to end: example i is ``tokens[offsets[i]:offsets[i + 1]]``."""

    tokens: np.ndarray
    """int32 ``(total,)``: token ids"""
    offsets: np.ndarray
    """int64 ``(n + 1,)``: where each example begins in ``tokens``; the last entry is their number"""
    prompt_lengths: np.ndarray
    """int32 ``(n,)``: tokens before the response, bos included"""
    rows: np.ndarray
    """int64 ``(n,)``: index of each among the examples that were tokenised, of which some may be left out"""
    overlaps: np.ndarray
    """int32 ``(n,)``: characters of the prompt's end that the response's first token holds; nearly always 0"""
    loss_on: str
    """``response`` or ``all``"""
    pad_token_id: int
    num_truncated: int
    """examples that were longer than ``max_tokens``"""
    left_out: dict[str, int] = field(default_factory=dict)
    """reason -> number of examples that were left out for it"""
    categories: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64 ``(n,)``: each example's category, from 0; empty if nobody asked for them. They are not in the file."""
    reference: TokenizedDataset | None = None
    """The reference path of every example, in the same order: another prompt before the same response ids. None if the method
    has no such path (`data.references`). It is not in the file."""

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def with_categories(self, keys: np.ndarray) -> TokenizedDataset:
        """The same examples with categories, numbered in the order of their keys ``(n,)``."""
        return replace(self, categories=np.unique(keys, return_inverse=True)[1])

    @property
    def num_categories(self) -> int:
        """Categories of the examples, at least one."""
        return int(self.categories.max()) + 1 if len(self.categories) else 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example, int64 ``(n,)``."""
        return np.diff(self.offsets)


def write_arrow(path: Path, dataset: TokenizedDataset) -> None:
    """Write the file in one step: readers see all of it or none."""
    import pyarrow as pa

    header = {
        "loss_on": dataset.loss_on,
        "pad_token_id": dataset.pad_token_id,
        "num_truncated": dataset.num_truncated,
        "left_out": dataset.left_out,
    }
    columns = [
        pa.LargeListArray.from_arrays(pa.array(dataset.offsets), pa.array(dataset.tokens)),
        pa.array(dataset.prompt_lengths),
        pa.array(dataset.rows),
        pa.array(dataset.overlaps),
    ]
    schema = pa.schema(
        [("tokens", columns[0].type), ("prompt_length", pa.int32()), ("row", pa.int64()), ("overlap", pa.int32())],
        metadata={"fleetune": json.dumps(header), "checksum": files.BLANK},
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    files.write(path, memoryview(sink.getvalue()), lasting=False)


def read_arrow(path: Path) -> TokenizedDataset | None:
    """The dataset in the file, its arrays mapped from it; None if there is no file or it is damaged."""
    import pyarrow as pa

    try:
        files.read(path, holds="a cached dataset", must_be_sealed=True)
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        batch = reader.get_batch(0)
        header = json.loads(reader.schema.metadata[b"fleetune"])
        tokens = batch.column("tokens")
        return TokenizedDataset(
            tokens=_array(tokens.values),
            offsets=_array(tokens.offsets),
            prompt_lengths=_array(batch.column("prompt_length")),
            rows=_array(batch.column("row")),
            overlaps=_array(batch.column("overlap")),
            loss_on=header["loss_on"],
            pad_token_id=header["pad_token_id"],
            num_truncated=header["num_truncated"],
            left_out=header["left_out"],
        )
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):  # damage shows as any of them
        return None


def _array(column: object) -> np.ndarray:
    return column.to_numpy(zero_copy_only=True)  # type: ignore[attr-defined]
