"""Reads weights from a folder's safetensors, one tensor at a time, so that a large model is never in memory twice.

As transformers reads them: the index says which files, the configuration says which tensors; others are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fleetune.models.architectures import ModelShape
from fleetune.models.folder import one_line, refusal, weight_files
from fleetune.models.quantize import quantize_linears
from fleetune.tensors import Tensors

log = logging.getLogger(__name__)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# The types in which a weight may be stored; codes of a quantised one mean nothing without their scales.
STORED = ("F64", "F32", "F16", "BF16")


def tensor_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """The name and size of every tensor of a model, as the Hugging Face checkpoint has them."""
    h = shape.hidden_size
    out: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, h), "model.norm.weight": (h,)}
    if not shape.tied_embeddings:
        out[HEAD] = (shape.vocab_size, h)
    for layer in range(shape.num_layers):
        start = f"model.layers.{layer}."
        for name, (num_in, num_out) in shape.linears.items():
            part = "self_attn" if name in ATTENTION else "mlp"
            out[f"{start}{part}.{name}.weight"] = (num_out, num_in)
            if name in shape.biased:
                out[f"{start}{part}.{name}.bias"] = (num_out,)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{start}{norm}.weight"] = (h,)
        for norm in ("q_norm", "k_norm") if shape.qk_norm else ():
            out[f"{start}self_attn.{norm}.weight"] = (shape.head_dim,)
    return out


def read_weights(folder: Path, name: str, shape: ModelShape, quantization: str) -> Tensors:
    """The tensors of a model (`tensor_sizes`) in fp32, blocks' matrices quantised as they are read.

    If the configuration ties the head to the embedding but the file stores another head, that head is used, as in transformers.
    Raises UserError if a tensor is missing or of another size or type, or if a file is damaged.
    """
    sizes = tensor_sizes(shape)
    with ExitStack() as stack:
        stored = _Stored([stack.enter_context(_opened(file, name)) for file in weight_files(folder, name)])
        places = {wanted: stored.name_of(wanted) for wanted in (*sizes, HEAD)}
        if shape.tied_embeddings and places[EMBEDDING] is None:
            places[EMBEDDING] = places[HEAD]
        missing = [wanted for wanted in sizes if places[wanted] is None]
        if missing:
            shown = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
            raise refusal(
                name, f"its weights lack {shown}", "the files belong to another configuration, or are not whole"
            )
        if shape.tied_embeddings and places[HEAD] not in (None, places[EMBEDDING]):
            sizes = {**sizes, HEAD: sizes[EMBEDDING]}
        for wanted, size in sizes.items():
            stored.check(str(places[wanted]), size, name)
        out: Tensors = {}
        for wanted in sizes:
            weight = stored.read(str(places[wanted]), name)
            if wanted == HEAD and shape.tied_embeddings and torch.equal(weight, out[EMBEDDING]):
                continue
            out.update({wanted: weight} if quantization == "none" else quantize_linears({wanted: weight}, quantization))
    if shape.tied_embeddings and HEAD in out:
        log.warning("%s ties its head to the embedding but stores another head, which is used", name)
    return out


class _Stored:
    """The tensors of open safetensors files, by name. If two files hold the same name, the later file's tensor counts."""

    def __init__(self, files: list[tuple[Path, Any]]):
        self.files = {tensor: (path, file) for path, file in files for tensor in file.keys()}  # noqa: SIM118

    def name_of(self, tensor: str) -> str | None:
        """The name under which a tensor is stored, or None. A decoder saved without its head lacks the prefix ``model.``."""
        return next((n for n in (tensor, tensor.removeprefix("model.")) if n in self.files), None)

    def check(self, tensor: str, size: tuple[int, ...], name: str) -> None:
        path, file = self.files[tensor]
        part = file.get_slice(tensor)
        if part.get_dtype() not in STORED:
            rule = f"{path.name} stores {tensor} as {part.get_dtype()}: quantised weights are not read"
            raise refusal(name, rule, "name the model that it was made from; model.quantization quantises that")
        if tuple(part.get_shape()) != size:
            shown = " x ".join(map(str, part.get_shape()))
            rule = f"{path.name} stores {tensor} as {shown}, config.json says {' x '.join(map(str, size))}"
            raise refusal(name, rule, "the files belong to another configuration")

    def read(self, tensor: str, name: str) -> Tensor:
        path, file = self.files[tensor]
        try:
            # Copied, because the tensor that is read is a view of the file: a later write to the file would change this run.
            return file.get_tensor(tensor).to(torch.float32, copy=True)
        except Exception as error:
            raise _damaged(path, name, error) from error


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[Path, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise _damaged(path, name, error) from error
    with file:
        yield path, file


def _damaged(path: Path, name: str, error: Exception) -> Exception:
    try:
        with path.open("rb") as file:
            is_pointer = file.read(23) == b"version https://git-lfs"
    except OSError:
        is_pointer = False
    if is_pointer:
        return refusal(name, f"{path.name} is a pointer of Git LFS, not the weights", "fetch them: git lfs pull")
    return refusal(name, f"{path.name} cannot be read: {one_line(error)}", "copy or download it again")
