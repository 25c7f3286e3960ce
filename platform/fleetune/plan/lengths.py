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
from dataclasses import dataclass, replace
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
    reference: np.ndarray | None = None  # (n,) int64: tokens of each example's reference path, if the method has one

    def dataset(self) -> TokenizedDataset:
        """A dataset of examples of these lengths, without tokens."""
        base = self._of(self.tokens, self.prompt)
        if self.reference is None:
            return base
        return replace(base, reference=self._of(self.reference, self.reference - self.tokens + self.prompt))

    def _of(self, tokens: np.ndarray, prompt: np.ndarray) -> TokenizedDataset:
        return TokenizedDataset(
            tokens=np.empty(0, np.int32),
            offsets=np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64),
            prompt_lengths=prompt.astype(np.int32),
            rows=np.arange(len(tokens)),
            overlaps=np.zeros(len(tokens), np.int32),
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
            reference = arrays.get("reference")
            return Lengths(arrays["tokens"], arrays["prompt"], arrays["keys"], spec.data.loss_on, reference=reference)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):  # a zip has checksums of its own
        pass
    found = _tokenised(spec, base, cache_dir)
    _write(path, found)
    return found


def _tokenised(spec: RunSpec, base: BaseModel, cache_dir: Path | None) -> Lengths:
    from fleetune.problem import load_inputs

    inputs = load_inputs(spec, base=base, cache_dir=cache_dir)
    train = inputs.train
    return Lengths(
        train.lengths, train.prompt_lengths.astype(np.int64), inputs.keys, train.loss_on,
        reference=None if train.reference is None else train.reference.lengths,
    )  # fmt: skip


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
    tokens = np.full(num_examples, data.max_tokens, np.int64)
    if not spec.method.traits.references:
        return Lengths(tokens, zero, zero, "all", tuple(notes))
    notes.append("the reference path of every example is taken to be as long")
    return Lengths(tokens, zero, zero, "all", tuple(notes), reference=tokens)


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
    facts = [data, partition, spec.seed, spec.method.traits.references]
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for path in files:
        with contextlib.suppress(OSError):  # the error is raised, with the file's name, when the data is read
            digest.update(f"{path.resolve()} {file_digest(path)}".encode())
    for source in sorted(Path(fleetune.data.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _write(path: Path, found: Lengths) -> None:
    """Write the cache; if that fails, the next plan computes the lengths again."""
    with contextlib.suppress(OSError), files.replacing(path) as scratch, scratch.open("wb") as file:
        arrays = {"tokens": found.tokens, "prompt": found.prompt, "keys": found.keys}
        if found.reference is not None:
            arrays["reference"] = found.reference
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes any keyword for allow_pickle


def without_partition(spec: RunSpec) -> RunSpec:
    """The spec with its examples dealt evenly, for data whose columns are not known."""
    if spec.data.partition.kind in ("iid", "quantity"):
        return spec
    partition = spec.data.partition.model_copy(update={"kind": "iid"})
    return spec.model_copy(update={"data": spec.data.model_copy(update={"partition": partition})})
