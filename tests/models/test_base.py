"""Base models of other people: names, configurations, weights and tokenizers are read as transformers reads them, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.errors import UserError
from fleetune.models.config import LoRAConfig, ModelConfig
from fleetune.models.family import attention_window
from fleetune.models.folder import base_files, find_base, is_hub_id
from fleetune.models.load import load_base, load_config, load_tokenizer
from fleetune.models.network import Network
from fleetune.models.outline import outline_base
from fleetune.models.submodel import Submodel
from support import random_models as models
from support import tiny

Folder = Callable[..., Path]

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


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A copy of a tiny model with fields of its config.json changed; a field of None is taken out."""

    def make(architecture: str = "llama", **fields: Any) -> Path:
        path = tmp_path / architecture
        shutil.copytree(models.folder_of(architecture), path)
        change(path, **fields)
        return path

    return make


def change(path: Path, **fields: Any) -> None:
    values = {**json.loads((path / "config.json").read_text()), **fields}
    kept = {name: value for name, value in values.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))


def refused(path: Path | str, *said: str) -> None:
    """In one sentence that names the field, the model and what is wrong."""
    with pytest.raises(UserError) as caught:
        load_base(ModelConfig(base=str(path)))
    assert (caught.value.field, caught.value.value) == ("model.base", str(path))
    for part in said:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def logits(path: Path | str, ids: torch.Tensor) -> torch.Tensor:
    base = load_base(ModelConfig(base=str(path)))
    network = Network(base, Submodel.prefix(base.num_layers), LoRAConfig())
    return network.logits(network.blocks(network.embed(ids)))


def same_as_transformers(path: Path, num_tokens: int = 11) -> None:
    """Logits, of the model as AutoModelForCausalLM loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = models.random_ids(2, num_tokens)
    with torch.no_grad():
        torch.testing.assert_close(logits(path, ids), model(ids).logits, rtol=1e-4, atol=1e-4)


# -- names --------------------------------------------------------------------------------------------------------------
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


# -- configurations -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act: relu"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "proportional"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, "rope"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "su"),
        ({"is_causal": False}, "is_causal"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"num_attention_heads": 4.5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"hidden_size": 2**30, "head_dim": None}, "head_dim"),
        ({"model_type": "gpt2"}, "architecture 'gpt2'"),
        ({"model_type": None}, "architecture None"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ],
    ids=str,
)
def test_arithmetic_that_is_not_supported_is_refused(folder: Folder, fields: dict[str, Any], said: str):
    path = folder(**fields)
    refused(path, said)
    with pytest.raises(UserError, match=r"model\.base"):
        outline_base(ModelConfig(base=str(path)))


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "swish"},
        {"rms_norm_eps": 0.3},
        {"pretraining_tp": 2, "use_cache": False, "torch_dtype": "bfloat16", "_name_or_path": "x/y"},
        {"rope_parameters": None, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "mscale": 2.0}},
        {"sliding_window": 4},
        {"head_dim": None},
    ],
    ids=str,
)
def test_what_is_supported_is_as_transformers(folder: Folder, fields: dict[str, Any]):
    """Old and new names of rotary settings, a head size that follows, a window that Llama does not read."""
    same_as_transformers(folder(**fields))


@pytest.mark.parametrize("field", ["attention_multiplier", "clip_qkv", "rope_interleaved", "unsloth_version"])
def test_a_field_that_transformers_ignores_is_ignored(folder: Folder, field: str):
    same_as_transformers(folder(**{field: 0.25}))


def test_a_field_that_nobody_here_knows_is_held_against_transformers(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """A later transformers whose Llama halves its logits at the word of a new field."""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * getattr(self.config, "logits_divided_by", 1.0)
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", halved)
    refused(folder(logits_divided_by=0.5), "change what the model computes", "logits_divided_by")


@pytest.mark.parametrize("architecture", models.EXTRA)
@pytest.mark.parametrize("seed", range(3))
def test_random_configurations_are_as_transformers(architecture: str, seed: int, tmp_path: Path):
    """Biases, head sizes, groups, tied heads, epsilons and rotary scalings as they come, of every family."""
    same_as_transformers(models.random_folder(architecture, seed, tmp_path))


@pytest.mark.parametrize(
    ("architecture", "fields", "window"),
    [
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": None}, 4096),
        ("llama", {"sliding_window": 16}, None),
        ("qwen2", {"sliding_window": 16}, None),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None}, 16),
        (
            "qwen2",
            {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3, "layer_types": None},
            None,
        ),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 16),
    ],
)
def test_the_window_is_that_of_the_blocks_that_have_one(
    folder: Folder, architecture: str, fields: dict[str, Any], window: int | None
):
    """A Mistral that names none has transformers' default, 4,096; Qwen's blocks have one only from max_window_layers on."""
    assert attention_window(load_config(ModelConfig(base=str(folder(architecture, **fields))))) == window


# -- weights ------------------------------------------------------------------------------------------------------------
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


# -- tokenizers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", models.EXTRA)
def test_the_tokenizer_is_that_of_autotokenizer(folder: Folder, architecture: str):
    """Whatever class the folder names: Qwen's splits digits and spaces in its own way, whatever tokenizer.json says."""
    from transformers import AutoTokenizer

    path = folder(architecture)
    for file in Path(tiny.model_folder()).glob("*token*"):
        shutil.copy(file, path)
    ours, theirs = load_tokenizer(str(path)), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    texts = ["Ann has 1234 eggs.\n\nA:  #### 7", " 'tis\tso", "Straße 東京"]
    assert ours(texts).input_ids == theirs(texts).input_ids
    special = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    assert [getattr(ours, name) for name in special] == [getattr(theirs, name) for name in special]


@pytest.mark.parametrize("content", ["", "{", '{"added_tokens": 1}'])
def test_a_damaged_tokenizer_is_refused(folder: Folder, content: str):
    path = folder()
    for file in Path(tiny.model_folder()).glob("*token*"):
        shutil.copy(file, path)
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load_tokenizer(str(path))
