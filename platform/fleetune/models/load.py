"""Reading a base model: its configuration, checked, its weights and its tokenizer, as transformers would read them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fleetune.digests import file_digest, file_digests
from fleetune.errors import UserError
from fleetune.models import architectures as shapes
from fleetune.models.base import BaseModel
from fleetune.models.checkpoint import HEAD, read_weights
from fleetune.models.config import ModelConfig
from fleetune.models.family import HARMLESS, SIZES, check_config, check_stored, unknown_fields
from fleetune.models.folder import base_files, base_folder, find_base, one_line, read_json, refusal


def load_config(config: ModelConfig) -> dict[str, Any]:
    """The architecture of the base model, without its weights: the values of a complete config.json.

    Raises UserError if the decoder would not compute the same as transformers' model of this configuration.
    """
    name = config.base
    folder = base_folder(name, with_weights=False)
    stored = read_json(folder / "config.json", name)
    check_stored(stored, name)
    values = stored if _is_complete(stored) else _completed(folder, name)
    check_config(values, name)
    _check_rotary(values, name)
    if unknown := unknown_fields(stored):
        from fleetune.models.verify import check_against_transformers

        check_against_transformers(values, unknown, name)
    return values


def _is_complete(values: dict[str, Any]) -> bool:
    """True if a config.json leaves nothing to the defaults and rules of transformers, whose import takes seconds."""
    needed = SIZES | {"hidden_act"}
    allowed = needed | HARMLESS | {"model_type", "mlp_bias", "attention_dropout"}
    if values["model_type"] != "llama" or not needed <= values.keys() <= allowed:
        return False
    rope = values["rope_parameters"]
    return isinstance(rope, dict) and rope.keys() == {"rope_type", "rope_theta"} and rope["rope_type"] == "default"


def _completed(folder: Path, name: str) -> dict[str, Any]:
    """The configuration as transformers understands it, with the defaults of its family."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # strict dataclasses, validators of every family, KeyErrors of rope
        raise refusal(name, f"transformers does not take its config.json: {one_line(error)}") from error


def _check_rotary(values: dict[str, Any], name: str) -> None:
    """Raises UserError if scaled rotary embeddings cannot be computed from this configuration, or are not finite."""
    from fleetune.models.decoder import Rotary

    try:
        rotary = Rotary(BaseModel(name, values, {}, "none", ""))
        is_finite = bool(rotary.inv_freq.isfinite().all()) and math.isfinite(rotary.attention_scaling)
    except Exception as error:  # transformers' own functions: KeyErrors, TypeErrors, divisions by zero
        rule = f"its rotary embeddings cannot be computed: {type(error).__name__} {one_line(error)}"
        raise refusal(name, rule, "see rope_parameters in its config.json") from error
    if not is_finite:
        raise refusal(name, "its rotary embeddings are not finite", "see rope_parameters in its config.json")


def load_base(config: ModelConfig) -> BaseModel:
    """Read the weights (safetensors only), in fp32 or quantised as the job file says.

    Raises UserError if a file changes meanwhile.
    """
    name = config.base
    settings = base_folder(name, with_weights=False) / "config.json"
    first = {settings.name: file_digest(settings)}
    values = load_config(config)  # what is not supported is refused before gigabytes are fetched, or read
    content = {**base_content(name), **first}
    shape = shapes.ModelShape.from_values(values)
    weights = read_weights(base_folder(name), name, shape, config.quantization)
    if HEAD in weights:
        values = {**values, "tie_word_embeddings": False}
    base = BaseModel(name, values, weights, config.quantization, find_base(name), content)
    check_unchanged(base)
    return base


def base_content(name: str) -> dict[str, str]:
    """File -> digest, for all files of a model and its tokenizer. ``name`` as in ``model.base``."""
    try:
        return file_digests(base_files(name))
    except OSError as error:
        raise refusal(name, f"{error.filename} cannot be read: {error.strerror}") from None


def check_unchanged(base: BaseModel) -> None:
    """Raises UserError if a file has changed since the weights were read."""
    now = base_content(base.folder) if base.content else {}
    changed = sorted(name for name in {*now, *base.content} if now.get(name) != base.content.get(name))
    if changed:
        rule = f"{changed[0]} was changed while the model was read"
        raise refusal(base.name, rule, "try again when nobody writes to the folder")


def load_tokenizer(folder: str) -> Any:
    """The base model's own tokenizer, as AutoTokenizer picks it. ``folder``: `BaseModel.folder`."""
    files = base_folder(folder, with_weights=False)
    try:
        if _is_generic_tokenizer(files):
            from transformers.tokenization_utils_tokenizers import TokenizersBackend

            return TokenizersBackend.from_pretrained(files)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(files, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"the tokenizer cannot be read: {one_line(error)}",
            field="model.base",
            value=folder,
            hint="save it beside the model: tokenizer.save_pretrained(folder)",
        ) from error


def _is_generic_tokenizer(folder: Path) -> bool:
    """True if AutoTokenizer would take tokenizer.json as it is, by a Llama's files; importing AutoTokenizer takes seconds."""
    try:
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(tokenizer, dict) or not isinstance(model, dict) or "auto_map" in tokenizer:
        return False
    generic = tokenizer.get("tokenizer_class") == "TokenizersBackend" and model.get("model_type") == "llama"
    return generic and (folder / "tokenizer.json").is_file()
