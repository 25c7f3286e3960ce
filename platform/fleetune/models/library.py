"""Reads a library of skill adapters: LoRA adapters that exist already, from folders, from folders of such folders, or from a hub.

PEFT's own folders are read, whoever wrote them: any rank, ``rank_pattern``, ``alpha_pattern``, rank-stabilised scaling. What
fleetune adds beside them (`SKILL`) says what an adapter can do and what it was trained on. Only safetensors are read: a pickle
could run code. PEFT's format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fleetune import files
from fleetune.digests import content_digest, file_digest
from fleetune.errors import UserError
from fleetune.models.base import BaseModel
from fleetune.models.folder import is_hub_id, one_line, weight_files
from fleetune.models.peft_format import CONFIG, OWN_CONFIG, PREFIX, WEIGHTS
from fleetune.tensors import Tensors

log = logging.getLogger(__name__)

SKILL = "fleetune_skill.json"
"""Beside an adapter: what it can do, how well, and what it was trained on. PEFT does not look at it."""
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl", "adapter_model.ckpt")
FIELD = "method.adapters"
# What PEFT can add to a pair that a pair cannot express: value of adapter_config.json that means "not there".
NOT_THERE: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
}
_PAIR = re.compile(r"(?P<site>layers\.\d+\.(?:self_attn|mlp)\.\w+)\.(?P<factor>lora_[AB])")


@dataclass(frozen=True, eq=False)
class Skill:
    """An adapter of the library, for all blocks of its base model."""

    name: str
    """Its folder's name, or that of the folder above if it is called ``adapter``, as a run's is. Unique in a library."""
    tensors: Tensors
    """``layers.3.self_attn.q_proj.lora_A`` (r, in) and ``…lora_B`` (out, r), fp32. r may differ from matrix to matrix."""
    rank: int
    """The largest r."""
    scaling: float
    """s in dW = s B A, one for all matrices: where the file has another for some, B holds the ratio of the two."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What `SKILL` says, such as ``skill``, ``data``, ``quality``; empty for an adapter from elsewhere without it."""
    content: dict[str, str] = field(default_factory=dict)
    """File -> digest of what was read."""

    def pairs(self, scaling: float) -> Tensors:
        """The same adapter for a network that multiplies every product by ``scaling``: B holds the ratio of the two."""
        return rescaled(self.tensors, self.scaling / scaling)


class Broken(UserError):
    """An adapter that cannot be read: damaged, not whole, or of a kind that is no pair of factors."""


def read_library(
    paths: Sequence[str],
    base: BaseModel,
    sites: Mapping[str, tuple[int, int]],
    *,
    broken: Literal["refuse", "skip"] = "refuse",
    needed: int = 1,
    field: str = FIELD,
) -> list[Skill]:
    """The adapters in these folders, in the order of ``paths``, those of a library's folder by name.

    ``sites``: {site: (in, out)} of all matrices that the job adapts; an adapter must be for just these. ``broken``: whether a
    broken adapter ends the job or is left out with a warning. Raises UserError if there are fewer than ``needed``, if an
    adapter was made for another base or other matrices, or with pickle, or if two have one name.
    """
    out: dict[str, Skill] = {}
    for name, folder in find_adapters(paths, field=field).items():
        try:
            skill = read_skill(folder, name, field=field)
        except Broken as error:
            if broken == "refuse":
                raise
            log.warning("left out: %s", error)
            continue
        check_base(skill, folder, base, field=field)
        check_sites(skill, folder, sites, field=field)
        # In the order of the job's own adapter, as stacks and sums go by it.
        tensors = {f"{site}.{part}": skill.tensors[f"{site}.{part}"] for site in sites for part in ("lora_A", "lora_B")}
        out[name] = replace(skill, tensors=tensors)
    if len(out) < needed:
        raise UserError(
            f"holds {len(out)} adapter{'s' * (len(out) != 1)} that can be used, and this method needs {needed}",
            field=field,
            value=list(paths),
            hint="name further adapters; `fleetune adapters list FOLDER` shows what a folder holds",
        )
    return list(out.values())


def library_content(paths: Sequence[str], *, field: str = FIELD) -> dict[str, str]:
    """``<adapter>/<file>`` -> digest, for every file that `read_library` would read. Raises UserError if a folder is gone."""
    out = {}
    for name, folder in find_adapters(paths, field=field).items():
        for file in (CONFIG, WEIGHTS, SKILL):
            if (folder / file).is_file():
                out[f"{name}/{file}"] = file_digest(folder / file)
    return out


def content_of(skills: Iterable[Skill]) -> dict[str, str]:
    """As `library_content`, for what was read: the same while nobody changes a file."""
    return {f"{skill.name}/{file}": digest for skill in skills for file, digest in skill.content.items()}


# -- folders --------------------------------------------------------------------------------------------------------------
def find_adapters(paths: Sequence[str], *, field: str = FIELD) -> dict[str, Path]:
    """Name -> folder of every adapter. A path is an adapter's folder, a folder of such folders, a run's folder, or a hub id.

    Raises UserError if a path is none of these, if nothing is in it, or if two adapters would have one name.
    """
    out: dict[str, Path] = {}
    for path in paths:
        for name, folder in _named_folders(path, field):
            if name in out:
                raise UserError(
                    f"two adapters are called {name!r}: {out[name]} and {folder}",
                    field=field,
                    value=path,
                    hint="name each adapter once, and rename one of two folders of the same name",
                )
            out[name] = folder
    return out


def _named_folders(path: str, field: str) -> list[tuple[str, Path]]:
    """The name and folder of each adapter that a path leads to."""
    folder = Path(path).expanduser().absolute()
    if folder.is_file():
        what = "made by pickle, which can run code when it is read" if _is_pickle(folder) else "a file"
        raise UserError(
            f"{what}, and an adapter is a folder with {CONFIG} and {WEIGHTS}",
            field=field,
            value=path,
            hint="save it with PEFT's save_pretrained, and name the folder",
        )
    if not folder.is_dir():
        return [(path.rpartition("/")[2], _from_hub(path, field))]
    if _is_adapter(folder):
        return [(folder.parent.name if folder.name == "adapter" else folder.name, folder)]
    if _is_adapter(folder / "adapter"):
        return [(folder.name, folder / "adapter")]
    found = [
        (child.name, child / "adapter" if _is_adapter(child / "adapter") else child)
        for child in sorted(folder.iterdir())
        if not child.name.startswith(".") and (_is_adapter(child) or _is_adapter(child / "adapter"))
    ]
    if not found:
        pickled = sorted(file.name for file in folder.iterdir() if _is_pickle(file))
        also = f"; {pickled[0]} is made by pickle, which can run code and is not read" if pickled else ""
        raise UserError(
            f"holds no adapter: neither {CONFIG} nor folders that hold one{also}",
            field=field,
            value=path,
            hint="`fleetune adapters train` makes adapters, and PEFT's save_pretrained does",
        )
    return found


def _is_adapter(folder: Path) -> bool:
    """True if a folder is meant to be an adapter, whole or not."""
    return any((folder / name).is_file() for name in (CONFIG, OWN_CONFIG, WEIGHTS, SKILL, *PICKLES))


def _is_pickle(path: Path) -> bool:
    return path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def _from_hub(path: str, field: str) -> Path:
    """The folder of a hub's adapter in the hub's cache; it is fetched if it is not there."""
    if not is_hub_id(path):
        rule = "no such adapter: neither a folder nor a hub id"
        raise UserError(rule, field=field, value=path, hint="name a folder, or a hub id like org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG, WEIGHTS, SKILL]))
    except Exception as error:  # the hub client raises its own, its transport's, OSErrors and ValueErrors alike
        rule = "no folder here, not in the hub's cache, and the hub did not give it"
        hint = f"offline, name a folder that holds the adapter; {one_line(error)}"
        raise UserError(rule, field=field, value=path, hint=hint) from error


# -- one adapter ----------------------------------------------------------------------------------------------------------
def read_skill(folder: Path, name: str, *, field: str = FIELD) -> Skill:
    """The adapter in a folder, fp32. Raises `Broken` with what is wrong, UserError for one that only pickle could read."""
    pickles = [file for file in PICKLES if (folder / file).is_file()]
    if pickles and not (folder / WEIGHTS).is_file():
        raise UserError(
            f"holds {pickles[0]}, made by pickle, which can run code when it is read; only {WEIGHTS} is read",
            field=field,
            value=str(folder),
            hint="load it with PEFT where you trust it, and save it with save_pretrained(folder, safe_serialization=True)",
        )
    content: dict[str, str] = {}
    config = _json(folder, CONFIG, content, field)
    _check_kind(config, folder, field)
    stored = _weights(folder, content, field)
    pairs, ranks = _pairs(stored, folder, field)
    scalings = {site: _scaling(config, site, rank, folder, field) for site, rank in ranks.items()}
    scaling = max(scalings.values(), key=list(scalings.values()).count)  # that of most matrices
    for site, own in scalings.items():
        if own != scaling:
            pairs[f"{site}.lora_B"] = pairs[f"{site}.lora_B"] * (own / scaling)
    metadata = _json(folder, SKILL, content, field) if (folder / SKILL).is_file() else {}
    metadata.setdefault("base", config.get("base_model_name_or_path"))
    return Skill(name, pairs, max(ranks.values()), scaling, metadata, content)


def rescaled(tensors: Tensors, ratio: float) -> Tensors:
    """The pairs with every B multiplied by ``ratio``; the very tensors if it is 1."""
    if ratio == 1.0:
        return dict(tensors)
    return {name: t * ratio if name.endswith(".lora_B") else t for name, t in tensors.items()}


def _broken(folder: Path, rule: str, field: str, hint: str = "copy or make it again, or set broken=skip") -> Broken:
    return Broken(rule, field=field, value=str(folder), hint=hint)


def _read(folder: Path, file: str, content: dict[str, str], field: str) -> bytes:
    """A file's bytes, whose digest is noted."""
    try:
        data = files.read(folder / file, holds="an adapter")
    except FileNotFoundError:
        raise _broken(folder, f"lacks {file}", field) from None
    except files.Damaged as error:
        raise _broken(folder, f"{file} {error.rule}", field) from None
    content[file] = content_digest(data)
    return data


def _json(folder: Path, file: str, content: dict[str, str], field: str) -> dict[str, Any]:
    data = _read(folder, file, content, field)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _broken(folder, f"{file} is no JSON: {one_line(error)}", field) from None
    if not isinstance(values, dict):
        raise _broken(folder, f"{file} must hold an object, this is a {type(values).__name__}", field)
    return values


def _check_kind(config: dict[str, Any], folder: Path, field: str) -> None:
    """Raises `Broken` for what is no plain LoRA, or changes the model beside its pairs."""
    hint = "adapters of this kind cannot be composed: train a plain LoRA, or set broken=skip"
    if config.get("peft_type") != "LORA":
        raise _broken(folder, f"is of PEFT's type {config.get('peft_type')}, and only LORA is read", field, hint)
    for name, absent in NOT_THERE.items():
        if config.get(name) not in absent:
            raise _broken(folder, f"sets {name}={config[name]!r}, which a pair of factors does not hold", field, hint)
    # PiSSA, OLoRA, CorDA and LoftQ begin with pairs that were taken out of the base, which PEFT changes to make up for it.
    start = config.get("init_lora_weights", True)
    taken = isinstance(start, str) and start.partition("_")[0].lower() in ("pissa", "olora", "corda", "loftq")
    if taken:
        raise _broken(folder, f"was begun by {start}, and belongs to a base that was changed with it", field, hint)


def _weights(folder: Path, content: dict[str, str], field: str) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = _read(folder, WEIGHTS, content, field)
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _broken(folder, f"{WEIGHTS} cannot be read: {one_line(error)}", field) from None


def _pairs(stored: Tensors, folder: Path, field: str) -> tuple[Tensors, dict[str, int]]:
    """The pairs in fp32 under our names, A before B, and {site: rank}, sites by block; every number is finite."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        match = _PAIR.fullmatch(name.removeprefix(PREFIX).removesuffix(".weight"))
        if match is None:
            raise _broken(folder, f"holds {name}, which is no factor of a block's matrix", field)
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise _broken(folder, f"{name} is no matrix of floating-point numbers", field)
        found.setdefault(match["site"], {})[match["factor"]] = tensor.to(torch.float32)
    out: Tensors = {}
    ranks: dict[str, int] = {}
    for site in sorted(found, key=_in_order):
        factors = found[site]
        if len(factors) < 2:
            raise _broken(folder, f"lacks one factor of {site}", field)
        a, b = factors["lora_A"], factors["lora_B"]
        if a.shape[0] != b.shape[1] or not a.shape[0]:
            raise _broken(folder, f"the factors of {site} have ranks {a.shape[0]} and {b.shape[1]}", field)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise _broken(folder, f"{site} holds numbers that are not finite", field)
        out[f"{site}.lora_A"], out[f"{site}.lora_B"], ranks[site] = a, b, a.shape[0]
    if not out:
        raise _broken(folder, "holds no pair", field)
    return out, ranks


def _in_order(site: str) -> tuple[int, str]:
    _, block, rest = site.split(".", 2)
    return int(block), rest


def _scaling(config: dict[str, Any], site: str, rank: int, folder: Path, field: str) -> float:
    """alpha / r of one matrix, or alpha / sqrt r if it is rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732)."""
    alpha = _pattern(config.get("alpha_pattern"), site, config.get("lora_alpha", 8))
    noted = _pattern(config.get("rank_pattern"), site, config.get("r", 8))
    if noted != rank:
        raise _broken(folder, f"{site} has rank {rank}, and {CONFIG} says {noted}", field)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise _broken(folder, f"{CONFIG} has no usable lora_alpha for {site}: {alpha!r}", field)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, site: str, default: Any) -> Any:
    """The value of the first pattern that ends a module's name, as PEFT matches them."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", f"model.{site}"):
            return value
    return default


# -- against the job ------------------------------------------------------------------------------------------------------
def check_base(skill: Skill, folder: Path, base: BaseModel, *, field: str = FIELD) -> None:
    """Raises UserError if an adapter was made for another base model.

    The digests of the base's weights decide if they are known. Otherwise the name does, or its last part for a folder: models
    of one architecture have adapters of the same sizes, so a wrong one would give wrong numbers in silence.
    """
    noted = skill.metadata.get("base")
    hint = "name adapters of the job's base, or set model.base to theirs"
    digests = skill.metadata.get("base_weights") or _weights_of(noted)
    own = {name: digest for name, digest in base.content.items() if name.endswith(".safetensors")}
    if isinstance(digests, dict) and digests and own:
        if digests != own:
            rule = f"was made for other weights than those of {base.name}"
            raise UserError(rule, field=field, value=str(folder), hint=hint)
        return
    names = {Path(str(name)).name.lower() for name in (base.name, base.folder)}
    if noted is not None and Path(str(noted)).name.lower() not in names:
        rule = f"was made for {noted}, and the job's base is {base.name}"
        again = f"; if they are the same model, correct base_model_name_or_path in its {CONFIG}"
        raise UserError(rule, field=field, value=str(folder), hint=hint + again)


def _weights_of(noted: Any) -> dict[str, str] | None:
    """File -> digest of the weights of a base that lies in a folder of this machine; None if it does not."""
    if not isinstance(noted, str) or not Path(noted).is_dir():
        return None
    try:
        return {file.name: file_digest(file) for file in weight_files(Path(noted), noted)}
    except (UserError, OSError):
        return None


def check_sites(skill: Skill, folder: Path, sites: Mapping[str, tuple[int, int]], *, field: str = FIELD) -> None:
    """Raises UserError if an adapter is not for just the matrices that the job adapts, or not of their sizes."""
    own = {name.removesuffix(".lora_A") for name in skill.tensors if name.endswith(".lora_A")}
    if own != set(sites):
        kinds = sorted({site.rpartition(".")[2] for site in own})
        wrong = sorted(own - set(sites)) or sorted(set(sites) - own)
        what = "adapts" if own - set(sites) else "does not adapt"
        rule = f"{what} {wrong[0]}{' and others' if len(wrong) > 1 else ''}, unlike the job"
        hint = f"it adapts {', '.join(kinds)} of {len({_in_order(s)[0] for s in own})} blocks: see model.lora.targets"
        raise UserError(rule, field=field, value=str(folder), hint=hint)
    for site, (num_in, num_out) in sites.items():
        sizes = (skill.tensors[f"{site}.lora_A"].shape[1], skill.tensors[f"{site}.lora_B"].shape[0])
        if sizes != (num_in, num_out):
            rule = f"was made for a {site} of {sizes[1]} x {sizes[0]}, and the job's base has {num_out} x {num_in}"
            raise UserError(rule, field=field, value=str(folder), hint="name adapters of the job's base")
