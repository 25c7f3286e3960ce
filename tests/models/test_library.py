"""A library is read from PEFT's own folders, whatever their ranks, and what does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.check import tiny_world
from fleetune.errors import UserError
from fleetune.models.config import LoRAConfig, ModelConfig
from fleetune.models.library import content_of, library_content, read_library
from fleetune.models.load import load_base
from fleetune.models.network import Network, linear_sites
from fleetune.models.peft_format import CONFIG, WEIGHTS
from fleetune.models.submodel import Submodel
from support import random_models as models
from support import runs, tiny

ALL = LoRAConfig(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig(base=tiny.model_folder()))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_world.library_folder(), tmp_path / "skills"))


def read(base, *paths, **settings) -> Any:
    return read_library([str(path) for path in paths], base, linear_sites(base, ALL), **settings)


def refused(base, *paths, **settings) -> str:
    with pytest.raises(UserError) as error:
        read(base, *paths, **settings)
    assert error.value.field == "method.adapters"
    return str(error.value)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_s_own_folders_load_whatever_their_ranks(rslora: bool, tmp_path: Path):
    """PEFT saves rank 3 with alpha 5, and rank 2 with alpha 7 for the query of block 1; our network computes PEFT's logits."""
    from peft import LoraConfig, get_peft_model

    base = models.base_of("llama")
    torch.manual_seed(0)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"model.layers.1.self_attn.q_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 7},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    peft = get_peft_model(models.reference("llama"), config).eval()
    peft.save_pretrained(str(tmp_path / "mine"))
    lora = LoRAConfig(rank=4, alpha=1.0, targets=("q_proj", "v_proj"))
    (skill,) = read_library([str(tmp_path / "mine")], base, linear_sites(base, lora))
    assert (skill.name, skill.rank) == ("mine", 3)
    assert skill.tensors["layers.1.self_attn.q_proj.lora_A"].shape[0] == 2
    ids = models.random_ids(2, 9)
    network = Network(base, Submodel.prefix(base.num_layers), lora)
    network.set_adapter({name: t[None] for name, t in skill.pairs(lora.scaling).items()})
    ours = network.logits(network.blocks(network.embed(ids)))
    torch.testing.assert_close(peft(ids).logits, ours, rtol=1e-5, atol=3e-5)
    assert not torch.allclose(peft.get_base_model()(ids).logits, models.reference("llama")(ids).logits, atol=1e-2)


def test_a_library_folder_means_all_in_it_by_name(base, library: Path):
    skills = read(base, library)
    assert [skill.name for skill in skills] == ["skill-0", "skill-1", "skill-2"]
    assert [skill.rank for skill in skills] == [2, 3, 2]
    assert [skill.scaling for skill in skills] == [2.0, 2.0, 2.0]
    assert list(skills[0].tensors)[:2] == ["layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_B"]
    chosen = read(base, library / "skill-2", library / "skill-0")
    assert [skill.name for skill in chosen] == ["skill-2", "skill-0"]
    runs.same_tensors(chosen[1].tensors, skills[0].tensors)


def test_the_content_of_every_file_counts(base, library: Path):
    before = library_content([str(library)])
    assert before == content_of(read(base, library))
    assert set(before) == {f"skill-{i}/{file}" for i in range(3) for file in (CONFIG, WEIGHTS)}
    tensors = load_file(library / "skill-1" / WEIGHTS)
    save_file({name: t + 1 for name, t in tensors.items()}, library / "skill-1" / WEIGHTS)
    after = library_content([str(library)])
    assert {name for name in after if after[name] != before[name]} == {f"skill-1/{WEIGHTS}"}


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def test_pairs_are_rescaled_for_the_job_s_network(base, library: Path):
    """alpha 8 at rank 2 is 4, and the job's scaling 2: B counts twice."""
    set_config(library / "skill-0", lora_alpha=8)
    skill = read(base, library)[0]
    assert skill.scaling == 4.0
    name = "layers.2.mlp.up_proj.lora_B"
    assert torch.equal(skill.pairs(2.0)[name], 2 * skill.tensors[name])
    assert torch.equal(skill.pairs(4.0)[name], skill.tensors[name])


def test_adapters_for_another_base_are_refused(base, library: Path):
    set_config(library / "skill-1", base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    assert "was made for meta-llama/Llama-2-7b-hf, and the job's base is" in refused(base, library)
    set_config(library / "skill-1", base_model_name_or_path=tiny.model_folder())
    assert len(read(base, library)) == 3
    set_config(library / "skill-1", base_model_name_or_path=tiny.model_folder(2))
    assert "was made for other weights" in refused(base, library)


def test_adapters_for_other_matrices_are_refused(base, library: Path):
    sites = linear_sites(base, LoRAConfig(targets=("q_proj",)))
    with pytest.raises(UserError, match=r"adapts layers\.0\.mlp\.down_proj and others, unlike the job"):
        read_library([str(library)], base, sites)
    folder = library / "skill-0"
    tensors = load_file(folder / WEIGHTS)
    fewer = {name: t for name, t in tensors.items() if "k_proj" not in name}
    save_file(fewer, folder / WEIGHTS)
    assert "does not adapt layers.0.self_attn.k_proj and others" in refused(base, library)
    wide = {
        name: torch.zeros(2, 40) if name.endswith("0.self_attn.q_proj.lora_A.weight") else t
        for name, t in tensors.items()
    }
    save_file(wide, folder / WEIGHTS)
    assert "layers.0.self_attn.q_proj of 32 x 40, and the job's base has 32 x 32" in refused(base, library)


BREAKS: dict[str, tuple[Any, str]] = {
    "no configuration": (lambda f: (f / CONFIG).unlink(), "lacks adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "lacks adapter_model.safetensors"),
    "half a file": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:500]), "cannot be read"),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "is no JSON"),
    "another rank": (lambda f: set_config(f, r=5), "has rank 3, and adapter_config.json says 5"),
    "not LoRA": (lambda f: set_config(f, peft_type="LOHA"), "is of PEFT's type LOHA"),
    "DoRA": (lambda f: set_config(f, use_dora=True), "sets use_dora=True"),
    "PiSSA": (lambda f: set_config(f, init_lora_weights="pissa_niter_4"), "belongs to a base that was changed"),
    "not finite": (
        lambda f: save_file({n: t / 0 for n, t in load_file(f / WEIGHTS).items()}, f / WEIGHTS),
        "not finite",
    ),
    "one factor": (
        lambda f: save_file({n: t for n, t in load_file(f / WEIGHTS).items() if "lora_A" in n}, f / WEIGHTS),
        "lacks one factor of layers.0.mlp.down_proj",
    ),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_broken_adapter_is_named_and_refused_or_left_out(case: str, base, library: Path, caplog):
    damage, rule = BREAKS[case]
    damage(library / "skill-1")
    message = refused(base, library)
    assert rule in message
    assert "skill-1" in message
    assert [skill.name for skill in read(base, library, broken="skip")] == ["skill-0", "skill-2"]
    assert rule in caplog.text


def test_pickles_are_refused_by_name(base, library: Path):
    (library / "skill-1" / WEIGHTS).unlink()
    torch.save({}, library / "skill-1" / "adapter_model.bin")
    assert "holds adapter_model.bin, made by pickle" in refused(base, library, broken="skip")
    assert "made by pickle" in refused(base, library / "skill-1" / "adapter_model.bin")
    (library / "other").mkdir()
    torch.save({}, library / "other" / "mine.pt")
    assert "mine.pt is made by pickle" in refused(base, library / "other")


def test_too_few_equal_names_and_no_adapters_are_refused(base, library: Path, tmp_path: Path):
    assert "holds 1 adapter that can be used, and this method needs 2" in refused(base, library / "skill-0", needed=2)
    assert "two adapters are called 'skill-0'" in refused(base, library, library / "skill-0")
    assert "no such adapter" in refused(base, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no adapter" in refused(base, tmp_path / "empty")


def test_a_run_s_folder_is_an_adapter_under_its_name(base, library: Path, tmp_path: Path):
    (tmp_path / "my-run").mkdir()
    (library / "skill-2").rename(tmp_path / "my-run" / "adapter")
    assert [skill.name for skill in read(base, tmp_path / "my-run")] == ["my-run"]
    assert [skill.name for skill in read(base, tmp_path / "my-run" / "adapter")] == ["my-run"]
