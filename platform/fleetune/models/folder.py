"""Finds the folder of a base model: a built-in name, a folder, or a hub id whose files are in the hub's cache."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from fleetune.errors import UserError, nearest
from fleetune.models.architectures import ARCHITECTURES

ASSETS = Path(__file__).parent.parent / "assets"
BUILT_IN = {
    "micro-llama": "a Llama of 16 layers trained by jobs/pretrain_micro_llama.py, shipped with the package",
}

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# The files that tokenizers of all kinds are read from.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)


def is_hub_id(name: str) -> bool:
    """True if a name can be that of a hub repository, ``owner/name``. A dot in it does not make it a file's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def is_cached(hub_id: str) -> bool:
    """True if the configuration of a hub model is in the hub's cache on this machine."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, "config.json"), str)


def find_base(name: str) -> str:
    """The folder of a built-in or local model, or the hub id itself. A folder of that name comes before a hub id.

    Raises UserError if a name is none of the three.
    """
    if name in BUILT_IN:
        return str(ASSETS / name)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise refusal(name, "a file, and a model is a folder", "name the folder that holds config.json")
    if not is_hub_id(name):
        guess = nearest(name, BUILT_IN)
        hint = f"did you mean {guess!r}? " if guess else ""
        if name in ARCHITECTURES:
            hint = "an architecture without weights: cost it with cost.model, or plan for it with `fleetune plan`; "
        rule = "no such model: neither built-in nor a folder"
        raise refusal(name, rule, f"{hint}built-in: {', '.join(BUILT_IN)}; or a folder, or a hub id like org/name")
    return name


def base_folder(name: str, *, with_weights: bool = True) -> Path:
    """The folder that a base is read from; the files that are needed of a hub model are fetched into the hub's cache.

    ``name`` as in ``model.base``, or the result of `find_base`. Without ``with_weights`` no weights are fetched.
    """
    found = find_base(name)
    folder = (
        Path(found) if Path(found).is_dir() else _snapshot(found, ["config.json", INDEX, ADAPTER, *TOKENIZER_FILES])
    )
    if not (folder / "config.json").is_file():
        raise refusal(name, "the folder holds no config.json", _what_it_is(folder))
    if (folder / ADAPTER).is_file():  # transformers would load the base that it names, and adapt that
        raise refusal(name, "the folder holds an adapter beside the model", _what_it_is(folder))
    if with_weights and not Path(found).is_dir() and not (folder / WEIGHTS).is_file():
        shards = _shards(folder / INDEX, name) if (folder / INDEX).is_file() else [WEIGHTS]
        folder = _snapshot(found, shards)
    return folder


def base_files(name: str) -> list[Path]:
    """Every file that decides what a base computes and how text becomes its tokens: configuration, index, weights, tokenizer."""
    folder = base_folder(name)
    index = [folder / INDEX] if not (folder / WEIGHTS).is_file() else []
    tokenizer = [folder / file for file in TOKENIZER_FILES if (folder / file).is_file()]
    return [folder / "config.json", *index, *weight_files(folder, name), *tokenizer]


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors that transformers reads: ``model.safetensors``, else those that the index names, and no others.

    Raises UserError with the name of a file that is not there.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        files = [folder / shard for shard in _shards(folder / INDEX, name)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            rule = f"{INDEX} names files that are not there: {_some(missing)}"
            raise refusal(name, rule, "copy or download them again")
        return files
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    beside = f"; it holds {_some(others)}" if others else ""
    raise refusal(name, f"the folder holds neither {WEIGHTS} nor {INDEX}{beside}", _what_it_is(folder))


def read_json(path: Path, name: str) -> dict:
    """The object in a JSON file of the model ``name``. Raises UserError if the file cannot be read or holds no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(name, f"{path.name} cannot be read: {one_line(error)}", "copy or download it again") from None
    if not isinstance(values, dict):
        raise refusal(name, f"{path.name} must hold an object, this is a {type(values).__name__}")
    return values


def refusal(name: str, rule: str, hint: str | None = None) -> UserError:
    """The error for a model that cannot be used."""
    return UserError(rule, field="model.base", value=name, hint=hint)


def one_line(error: BaseException) -> str:
    """The text of another library's error, in one line of bounded length."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def _shards(index: Path, name: str) -> list[str]:
    places = read_json(index, name).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    # A file beside the index, and no path that leads out of the folder.
    if not names or not all(isinstance(file, str) and file == Path(file).name for file in names):
        raise refusal(name, f"{index.name} has no weight_map of tensors to files beside it")
    return sorted(set(names))


def _snapshot(hub_id: str, files: list[str]) -> Path:
    """The hub's folder with these of its files, from its cache where the hub is out of reach."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=files))
    except Exception as error:  # the hub client raises its own, its transport's, OSErrors and ValueErrors alike
        rule = "no folder here, not in the hub's cache, and the hub did not give it"
        raise refusal(hub_id, rule, f"offline, give a folder that holds the model; {one_line(error)}") from error


def _what_it_is(folder: Path) -> str:
    """A hint for a folder that holds something else."""
    if (folder / ADAPTER).is_file():
        return "it holds a PEFT adapter: name its base model, or merge the two and save the result"
    if next(folder.glob("*.gguf"), None):
        return "it holds GGUF files, which are not read: name the model that they were made from"
    if next(folder.glob("pytorch_model*.bin"), None):
        return "it holds pytorch_model.bin, and only safetensors are read: model.save_pretrained(folder) converts it"
    return "save the model with model.save_pretrained(folder) and its tokenizer beside it"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
