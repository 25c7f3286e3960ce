"""The lengths of a job's training examples: costs depend on nothing else of a dataset. They have a cache of their own.

Data on this machine (built in, or a local file, with the model's own tokenizer) is tokenised once, exactly as a run does it.
Otherwise every example is assumed to have ``data.max_tokens`` tokens, all of them learnt: the most that it can cost.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import fleetune.data
from fleetune import files
from fleetune.data.config import DataConfig
from fleetune.data.dataset import TokenizedDataset
from fleetune.data.files import looks_like_a_file
from fleetune.data.sources import DATASETS
from fleetune.digests import file_digest
from fleetune.files import default_cache_dir
from fleetune.models.base import BaseModel
from fleetune.spec import RunSpec

EXAMPLES_PER_CLIENT = 200  # assumed if the data is not on this machine: as in the built-in dataset and fleet


@dataclass(frozen=True)
class Lengths:
    """The lengths of n training examples, and the keys by which they are dealt to clients."""

    tokens: np.ndarray  # (n,) int64
    prompt: np.ndarray  # (n,) int64: tokens before the response
    keys: np.ndarray  # (n,) int64: `data.partition` deals by these
    loss_on: str  # response or all, as in `data.loss_on`
    assumed: tuple[str, ...] = ()  # assumptions about the data, in words

    def dataset(self) -> TokenizedDataset:
        """A dataset of examples of these lengths, without tokens."""
        return TokenizedDataset(
            tokens=np.empty(0, np.int32),
            offsets=np.concatenate([[0], np.cumsum(self.tokens)]).astype(np.int64),
            prompt_lengths=self.prompt.astype(np.int32),
            rows=np.arange(len(self.tokens)),
            overlaps=np.zeros(len(self.tokens), np.int32),
            loss_on=self.loss_on,
            pad_token_id=0,
            num_truncated=0,
        )


def load_lengths(spec: RunSpec, base: BaseModel, *, cache_dir: Path | None = None) -> Lengths:
    """The lengths of a job's training examples, from the cache, from the data, or assumed."""
    files = _files(spec.data, base)
    if files is None:
        return _assumed(spec, base)
    path = Path(cache_dir or default_cache_dir()) / "lengths" / f"{_key(spec, files)}.npz"
    try:
        with np.load(path) as arrays:
            return Lengths(arrays["tokens"], arrays["prompt"], arrays["keys"], spec.data.loss_on)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # a zip has checksums of its own
        pass
    found = _tokenised(spec, base, cache_dir)
    _write(path, found)
    return found


def _tokenised(spec: RunSpec, base: BaseModel, cache_dir: Path | None) -> Lengths:
    from fleetune.problem import load_inputs

    inputs = load_inputs(spec, base=base, cache_dir=cache_dir)
    return Lengths(
        inputs.train.lengths, inputs.train.prompt_lengths.astype(np.int64), inputs.keys, inputs.train.loss_on
    )


def _assumed(spec: RunSpec, base: BaseModel) -> Lengths:
    data = spec.data
    num_examples = data.num_examples or EXAMPLES_PER_CLIENT * spec.fleet.num_clients
    why = f"{data.dataset} is not read by a plan" if has_tokenizer(base) else f"{base.name} comes without a tokenizer"
    notes = [f"{why}: every example is taken to have data.max_tokens={data.max_tokens} tokens, all of them learnt"]
    if data.num_examples is None:
        notes.append(
            f"its size is not known: {num_examples} examples, {EXAMPLES_PER_CLIENT} for each client, are assumed"
        )
    if data.partition.kind not in ("iid", "quantity"):
        notes.append(f"data.partition.kind={data.partition.kind} goes by a column of it: dealt as iid here")
    zero = np.zeros(num_examples, np.int64)
    return Lengths(np.full(num_examples, data.max_tokens, np.int64), zero, zero, "all", tuple(notes))


def _files(data: DataConfig, base: BaseModel) -> list[Path] | None:
    """The files that the lengths depend on; None if the dataset or the tokenizer is not on this machine."""
    names = [name for name in (data.dataset, data.eval_dataset) if name is not None and name not in DATASETS]
    on_hub = any(name.count("/") == 1 and not looks_like_a_file(name) and not Path(name).exists() for name in names)
    if on_hub or not has_tokenizer(base):
        return None
    local = [Path(name).expanduser() for name in names]
    return [*local, Path(base.folder) / "tokenizer.json", Path(base.folder) / "tokenizer_config.json"]


def has_tokenizer(base: BaseModel) -> bool:
    """True if a tokenizer lies beside the model on this machine."""
    return bool(base.folder) and (Path(base.folder) / "tokenizer.json").is_file()


def _key(spec: RunSpec, files: list[Path]) -> str:
    """A hash of all that decides the lengths: settings, files, and the code that reads them."""
    data = spec.data.model_dump(mode="json", exclude={"partition"})
    partition = [spec.data.partition.kind in ("iid", "quantity"), spec.data.partition.key]
    digest = hashlib.blake2b(json.dumps([data, partition, spec.seed], sort_keys=True).encode(), digest_size=16)
    for path in files:
        with contextlib.suppress(OSError):  # the error is raised, with the file's name, when the data is read
            digest.update(f"{path.resolve()} {file_digest(path)}".encode())
    for source in sorted(Path(fleetune.data.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _write(path: Path, found: Lengths) -> None:
    """Write the cache; if that fails, the next plan computes the lengths again."""
    with contextlib.suppress(OSError), files.replacing(path) as scratch, scratch.open("wb") as file:
        np.savez(file, tokens=found.tokens, prompt=found.prompt, keys=found.keys)


def without_partition(spec: RunSpec) -> RunSpec:
    """The spec with its examples dealt evenly, for data whose columns are not known."""
    if spec.data.partition.kind in ("iid", "quantity"):
        return spec
    partition = spec.data.partition.model_copy(update={"kind": "iid"})
    return spec.model_copy(update={"data": spec.data.model_copy(update={"partition": partition})})
