"""Names of base models: a built-in one, a folder, or a hub id that is read from the hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fleetune.models.config import ModelConfig
from fleetune.models.folder import base_files, find_base, is_hub_id
from fleetune.models.load import load_base, load_tokenizer
from fleetune.models.outline import outline_base
from support import random_models as models
from support import tiny
from support.model_folders import refused

HUB_IDS = [
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen2-7B-Instruct",
    "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-2-7b-hf",
    "meta-llama/Meta-Llama-3.1-8B-Instruct",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "TinyLlama/TinyLlama_v1.1",
    "mistralai/Mistral-7B-v0.1",
    "HuggingFaceTB/SmolLM2-135M",
    "JackFram/llama-68m",
    "lmsys/vicuna-7b-v1.5",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "01-ai/Yi-1.5-6B",
    "h2oai/h2o-danube3.1-500m.safetensors",
]


def cached(cache: Path, hub_id: str, source: str) -> Path:
    """A model in an offline hub cache: a ref, a snapshot, and its files as links to blobs."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in Path(source).iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(repository / "blobs" / file.name)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("hub_id", HUB_IDS)
def test_a_hub_id_is_read_from_the_offline_cache(cache: Path, hub_id: str):
    """A dot in it is no file's suffix. The adapter names the id as its base, so that PEFT finds it elsewhere."""
    snapshot = cached(cache, hub_id, tiny.model_folder())
    base = load_base(ModelConfig(base=hub_id))
    assert (base.name, base.folder) == (hub_id, hub_id)
    assert base.num_layers == 4
    assert load_tokenizer(base.folder)("7").input_ids == load_tokenizer(tiny.model_folder())("7").input_ids
    assert {path.parent for path in base_files(hub_id)} == {snapshot}


def test_a_plan_reads_a_hub_model_that_is_in_the_cache(cache: Path):
    cached(cache, "someone/none-that-ships-1.5", tiny.model_folder())
    assert outline_base(ModelConfig(base="someone/none-that-ships-1.5")).num_layers == 4


def test_a_hub_id_that_is_nowhere_is_refused(cache: Path):
    refused("Qwen/Qwen2.5-0.5B", "no folder here, not in the hub's cache", "give a folder")


@pytest.mark.parametrize(
    "name", ["./a/b", "../a", "/a/b", "~/a", "a/b/c", "a/b/", "C:\\models\\a", "C:/a", "a b/c", "a/-b", "a/b..c", "a"]
)
def test_a_path_is_no_hub_id(name: str):
    assert not is_hub_id(name)
    refused(name, "neither built-in nor a folder")


def test_a_folder_that_is_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models.folder_of("llama"), tmp_path / "Qwen" / "Qwen2.5-0.5B")
    assert load_base(ModelConfig(base="Qwen/Qwen2.5-0.5B")).config["model_type"] == "llama"
    assert find_base("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "model.gguf").write_text("")
    refused("model.gguf", "a file, and a model is a folder")
