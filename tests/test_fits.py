"""A model and its data: ids that the embedding lacks, answers that leave the window, are refused before any work begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fleetune.data.batches import collate, eval_prompts
from fleetune.engine.execution.executor import SerialExecutor
from fleetune.errors import UserError
from fleetune.models.config import LoRAConfig, ModelConfig
from fleetune.models.load import load_base
from fleetune.models.network import Network
from fleetune.models.submodel import Submodel
from fleetune.problem import build_problem, load_inputs
from fleetune.training.generate import generate
from support import random_models as models
from support import runs, tiny

VOCABULARY = 721  # of micro-llama's tokenizer


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a padding token added to its tokenizer, and the model not resized."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("padded") / "model"
    shutil.copytree(tiny.model_folder(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    tokenizer.save_pretrained(folder)
    return str(folder)


def sums(path: Path, marked: int | None = None, column: str = "prompt") -> str:
    """Twenty sums, one of them with the padding token in its text."""
    with path.open("w") as file:
        for n in range(20):
            row = {"prompt": f"Q: {n} + 1\nA:", "response": f"#### {n + 1}"}
            if n == marked:
                row[column] += " [PAD]"
            file.write(json.dumps(row) + "\n")
    return str(path)


def test_a_padding_token_beyond_the_embedding_is_masked(padded: str):
    """It trains and generates as the model with its own padding token does."""
    overrides = {"rounds.num_rounds": 1, "evaluation.every": 1}
    found = {}
    for base in (padded, tiny.model_folder()):
        spec = tiny.spec({"model.base": base, **overrides})
        inputs = load_inputs(spec)
        rows = torch.arange(8).numpy()
        assert collate(inputs.train, rows)[0].max() < VOCABULARY
        assert eval_prompts(inputs.evaluation.data, rows)[0].max() < VOCABULARY
        problem = build_problem(spec, inputs)
        executor, method = SerialExecutor(problem), problem.method
        model = method.evaluated(method.start(), lambda: iter([]))
        found[base] = executor.evaluate(model, [rows]).sums()
    assert found[padded] == found[tiny.model_folder()]


@pytest.mark.parametrize("column", ["prompt", "response"])
@pytest.mark.parametrize("what", ["training", "held-out"])
def test_a_token_that_matters_beyond_the_embedding_is_refused_with_its_row(
    padded: str, tmp_path: Path, what: str, column: str
):
    good, bad = sums(tmp_path / "good.jsonl"), sums(tmp_path / "bad.jsonl", 7, column)
    train, held_out = (bad, good) if what == "training" else (good, bad)
    spec = tiny.spec(
        {"model.base": padded, "data.dataset": train, "data.eval_dataset": held_out, "data.num_eval_examples": 20}
    )
    with pytest.raises(UserError, match=rf"example 7 of the {what} examples has the token '\[PAD\]', id {VOCABULARY}"):
        load_inputs(spec)


def limited(tmp_path: Path, **fields: Any) -> str:
    folder = tmp_path / "limited"
    shutil.copytree(tiny.model_folder(), folder)
    values = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, "attention window of 32"),
        ({"max_position_embeddings": 32}, "32 positions"),
    ],
    ids=["window", "positions"],
)
def test_new_tokens_count_for_windows_and_positions(tmp_path: Path, fields: dict[str, Any], said: str):
    """The last new token is not fed back: prompts of n tokens leave room for 33 - n new ones."""
    longest = int(runs.inputs(tiny.spec()).evaluation.data.prompt_lengths.max())
    settings = {"model.base": limited(tmp_path, **fields), "data.max_tokens": 32}
    load_inputs(tiny.spec({**settings, "evaluation.max_new_tokens": 33 - longest}))
    load_inputs(tiny.spec({**settings, "evaluation.max_new_tokens": 99, "evaluation.generate": False}))
    with pytest.raises(UserError, match=said) as caught:
        load_inputs(tiny.spec({**settings, "evaluation.max_new_tokens": 34 - longest}))
    assert caught.value.field == "evaluation.max_new_tokens"
    assert f"at most {33 - longest} fit" in str(caught.value)


def test_at_the_window_generation_is_that_of_transformers(tmp_path: Path):
    """Prompts of 7 tokens and 8 new ones under a window of 14."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "windowed"
    shutil.copytree(models.folder_of("mistral"), folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "sliding_window": 14}))
    base = load_base(ModelConfig(base=str(folder)))
    network = Network(base, Submodel.prefix(base.num_layers), LoRAConfig())
    ids = models.random_ids(6, 7, seed=2)
    mask = torch.ones_like(ids)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = reference.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=96
    )[:, 7:]
    ours = generate(network, ids, mask, max_new_tokens=8, end=96, padding=0)
    assert torch.equal(ours[:, : expected.shape[1]], expected)
