"""Weights of other people's models: the files that belong to the model are read, and damaged ones are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.models.config import ModelConfig
from fleetune.models.folder import base_files
from fleetune.models.load import load_base
from support.model_folders import Folder, refused, same_as_transformers


def shard(path: Path, *, index: bool = True) -> None:
    """Two files and their index instead of one."""
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = list(weights)
    places = {}
    for n, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{n + 1}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, file))
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def test_the_index_says_which_files_are_read(folder: Folder):
    """Another file beside, as Mistral's consolidated one, is not; nor is a file of the model that the index does not name."""
    path = folder("mistral")
    shard(path)
    save_file({"model.norm.weight": torch.zeros(32), "layers.0.wq": torch.zeros(3)}, path / "consolidated.safetensors")
    same_as_transformers(path)
    assert [file.name for file in base_files(str(path))] == [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_whole_file_goes_before_an_index(folder: Folder):
    path = folder()
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "lost.safetensors"}}')
    same_as_transformers(path)


def test_a_missing_shard_is_named(folder: Folder):
    path = folder()
    shard(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    refused(path, "model-00002-of-00002.safetensors", "not there")


def test_files_without_an_index_are_refused(folder: Folder):
    path = folder()
    shard(path, index=False)
    refused(path, "neither model.safetensors nor model.safetensors.index.json", "model-00001-of-00002.safetensors")


def test_biases_that_are_not_asked_for_are_ignored(folder: Folder):
    path = folder()
    rewrite(path, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    same_as_transformers(path)


def test_a_decoder_saved_without_its_head_is_read(folder: Folder):
    """LlamaModel.save_pretrained leaves out `model.`; the head is tied."""
    path = folder()

    def strip(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)

    rewrite(path, strip)
    same_as_transformers(path)


def test_a_tied_head_that_is_stored_otherwise_is_kept(folder: Folder):
    """As transformers does; one that is stored alike is one tensor, and one that stands alone is the embedding too."""
    path = folder()
    rewrite(path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in load_base(ModelConfig(base=str(path))).weights
    rewrite(path, lambda w: w["lm_head.weight"].mul_(-1.5))
    same_as_transformers(path)
    rewrite(path, lambda w: w.pop("model.embed_tokens.weight"))
    same_as_transformers(path)


@pytest.mark.parametrize(
    ("name", "weight", "said"),
    [
        ("model.norm.weight", None, "lack model.norm.weight"),
        ("model.norm.weight", torch.ones(31), "model.norm.weight as 31"),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(48, 32).to(torch.float8_e4m3fn), "as F8_E4M3"),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(48, 32, dtype=torch.int8), "as I8"),
        ("model.layers.1.mlp.up_proj.weight", torch.ones(768, 1, dtype=torch.uint8), "as U8"),
    ],
    ids=lambda value: None if isinstance(value, torch.Tensor) else str(value),
)
def test_a_weight_that_is_missing_or_other_is_refused(folder: Folder, name: str, weight: Any, said: str):
    path = folder()
    rewrite(path, lambda w: w.pop(name) if weight is None else w.update({name: weight}))
    refused(path, said)


def damage(path: Path, file: str, content: bytes | None) -> None:
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.safetensors", b"", "model.safetensors cannot be read"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        ("model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "model.safetensors cannot be read"),
        ("model.safetensors", None, "neither model.safetensors nor"),
        ("config.json", b"", "config.json cannot be read"),
        ("config.json", b"{", "config.json cannot be read"),
        ("config.json", b"\xff\xfe", "config.json cannot be read"),
        ("config.json", b"[" * 100_000, "config.json cannot be read"),
        ("config.json", b"[]", "must hold an object"),
        ("config.json", b"{}", "architecture None"),
        ("config.json", b'{"model_type": "llama"}', ""),
        ("config.json", b'{"model_type": ["llama"]}', "architecture ['llama']"),
        ("config.json", None, "no config.json"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_file_s_name(folder: Folder, file: str, content: bytes | None, said: str):
    path = folder()
    damage(path, file, content)
    refused(path, said)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_damaged_index_is_refused(folder: Folder, content: str):
    path = folder()
    damage(path, "model.safetensors", None)
    (path / "model.safetensors.index.json").write_text(content)
    refused(path, "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("file", "said"),
    [("adapter_config.json", "PEFT adapter"), ("model.Q4_K_M.gguf", "GGUF"), ("pytorch_model.bin", "safetensors")],
)
def test_a_folder_of_another_kind_is_told_what_it_is(tmp_path: Path, file: str, said: str):
    (tmp_path / file).write_text("{}")
    refused(tmp_path, said)


def test_a_base_beside_an_adapter_is_refused(folder: Folder):
    """transformers would put the adapter on it, and take another base that its file names."""
    path = folder()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    refused(path, "PEFT adapter")
