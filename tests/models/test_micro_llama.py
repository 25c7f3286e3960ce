"""micro-llama: what ships loads, knows what its recipe says, and its job runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fleetune
from fleetune.data.answers import AnswerReader
from fleetune.data.micro_reasoning import micro_reasoning
from fleetune.models.config import ModelConfig
from fleetune.models.family import SIZES
from fleetune.models.folder import find_base
from fleetune.models.load import load_config, load_tokenizer
from support import REPOSITORY

ASSET = Path(fleetune.__file__).parent / "assets" / "micro-llama"
JOBS = REPOSITORY / "jobs"
MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def job():
    sys.path.insert(0, str(JOBS))
    import micro_llama_training

    yield micro_llama_training
    sys.path.remove(str(JOBS))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def recipe():
    return json.loads((ASSET / "RECIPE.json").read_text())


def test_it_is_read_as_transformers_reads_it(tokenizer, model):
    """The short cuts around its import: the same configuration where anything is read of it, the same texts and tokens."""
    config = load_config(ModelConfig())
    theirs = model.config.to_dict()
    assert {name: config[name] for name in SIZES} == {name: theirs[name] for name in SIZES}
    ours = load_tokenizer(find_base("micro-llama"))
    texts = [
        example["prompt"] + example["response"] for example in micro_reasoning(split="test", num_examples=40, seed=0)
    ]
    ids = tokenizer(texts, padding=True).input_ids
    assert ours(texts, padding=True).input_ids == ids
    reader = AnswerReader.of(ours)
    assert reader.end == tokenizer.eos_token_id
    assert reader.texts(np.array(ids)) == tokenizer.batch_decode(ids, skip_special_tokens=True) == texts


def test_it_is_a_small_deep_llama(model, recipe):
    assert model.config.model_type == "llama"
    assert len(model.model.layers) == 16
    assert 2e6 < model.num_parameters() == recipe["num_parameters"] < 4e6
    assert (ASSET / "model.safetensors").stat().st_size <= 8 * MEBIBYTE
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_digits_are_single_tokens_and_any_text_comes_back(tokenizer):
    assert tokenizer.tokenize("1234 + 56") == ["1", "2", "3", "4", "Ġ+", "Ġ5", "6"]
    for text in ("Ann has 7 eggs.\nA: #### 7", "Straße, 東京 🙂", "{'x':  1}\n\n\t#"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("7").input_ids[0] == tokenizer.bos_token_id
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert special == ("<pad>", "<bos>", "<eos>", "<unk>")


def test_the_default_task_fits_its_limit_of_tokens(tokenizer):
    """data.max_tokens is 128 by default."""
    for style in ("equations", "words"):
        examples = micro_reasoning(split="train", num_examples=200, style=style)
        texts = [e["prompt"] + " " + e["response"] + tokenizer.eos_token for e in examples]
        assert max(len(ids) for ids in tokenizer(texts).input_ids) <= 112


def test_prompt_and_response_are_tokenised_alike_alone_and_together(tokenizer):
    for e in micro_reasoning(split="train", num_examples=100):
        together = tokenizer(e["prompt"] + " " + e["response"]).input_ids
        response = tokenizer(" " + e["response"], add_special_tokens=False).input_ids
        assert tokenizer(e["prompt"]).input_ids + response == together


def test_it_knows_plain_questions_and_leaves_stories_to_learn(job, model, tokenizer, recipe):
    """What RECIPE.json says of 400 problems, checked on others.

    48 plain ones and 48 stories are within four standard errors (at most 0.25).
    """
    claimed = recipe["evaluation"]["exact_match"]
    assert 0.15 <= claimed["default"] <= 0.40
    assert claimed["plain"] >= 0.80
    plain = micro_reasoning(split="test", num_examples=48, seed=1, wording="plain")
    story = micro_reasoning(split="test", num_examples=48, seed=1)
    assert job.exact_match(model, tokenizer, plain) == pytest.approx(claimed["plain"], abs=0.25)
    assert job.exact_match(model, tokenizer, story) == pytest.approx(claimed["default"], abs=0.25)


def test_fewer_layers_still_work(job, model, tokenizer):
    """The first eight layers, and eight or four evenly spaced, predict: chance is log 716 = 6.6 nats."""
    examples = micro_reasoning(split="test", num_examples=32, wording="plain")
    batch = job.Batches(tokenizer, len(examples))
    tensors = batch.collate([batch.encode(e) for e in examples])
    with torch.no_grad():
        full = job.loss_of(model, tensors).item()
        assert job.loss_of(model, tensors, range(16)).item() == full
        for layers in (range(8), job.evenly_spaced(8, 16), job.evenly_spaced(4, 16)):
            assert job.loss_of(model, tensors, layers).item() < 1.0
    assert full < 0.25


def test_the_job_s_forward_pass_is_the_model_s(job, model, tokenizer):
    ids = tokenizer("Q: Ann has 7 eggs.\nA:", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(job.forward(model, ids), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_which_layers_a_step_runs(job):
    """Four of sixteen, evenly spaced: 0, 4, 8, 12. Drawn ones: a prefix, or one of each group in order."""
    from random import Random

    assert job.evenly_spaced(4, 16) == [0, 4, 8, 12]
    random = Random(0)
    draws = [job.draw_layers(random, 16, full_fraction=0.5) for _ in range(400)]
    partial = [d for d in draws if d != list(range(16))]
    assert 150 < len(partial) < 250
    assert {len(d) for d in partial} == {4, 8, 12}
    assert all(d == sorted(set(d)) and d[-1] < 16 for d in partial)
    assert list(range(8)) in partial


def test_growing_keeps_the_function(job, model):
    """A shallow model of layers 0, 4, 8, 12 and the one grown from it give the same logits."""
    grown = job.copy_of(model)
    job.grow(grown)
    ids = torch.tensor([[1, 70, 80, 90]])
    with torch.no_grad():
        shallow = job.forward(model, ids, [0, 4, 8, 12])
        torch.testing.assert_close(job.forward(grown, ids), shallow)
        for a, b in zip(grown.model.layers[4].parameters(), grown.model.layers[7].parameters(), strict=True):
            assert torch.equal(a, b) or not b.any()


def test_muon_orthogonalises(job):
    """Singular values 3 and 0.1 both come near 1 (between 0.5 and 1.5), also of a tall matrix."""
    left, _ = torch.linalg.qr(torch.randn(4, 2, generator=torch.Generator().manual_seed(0)))
    tall = left @ torch.diag(torch.tensor([3.0, 0.1]))
    for matrix in (tall, tall.T):
        singular = torch.linalg.svdvals(job.Muon([]).orthogonalise(matrix[None])[0])
        assert singular.min() > 0.5
        assert singular.max() < 1.5


def test_training_runs_and_repeats_itself(job, tokenizer):
    """Four steps, two of them shallow, twice: the same weights to the bit, and a loss near log 716 = 6.6 nats."""
    import pretrain_micro_llama

    text = "--out unused --steps 4 --batch-size 2 --save-every 3"
    args = pretrain_micro_llama.parse_arguments(text.split())

    def run():
        torch.manual_seed(0)
        model = pretrain_micro_llama.make_model(tokenizer)
        return list(pretrain_micro_llama.fit(model, tokenizer, args))

    (_, _), (first, curve) = run()
    second, _ = run()[-1]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert (curve[-1]["step"], curve[0]["num_layers"], curve[-1]["num_layers"]) == (4, 4, 16)
    assert 5.0 < curve[0]["loss"] < 8.0


def test_the_tokenizer_is_trained_on_any_examples(job):
    """Few words, yet every byte has a token: digits stay single, what was never seen comes back."""
    import pretrain_micro_llama

    tokenizer = pretrain_micro_llama.train_tokenizer(micro_reasoning(split="train", num_examples=50))
    assert tokenizer.tokenize(" 12") == ["Ġ1", "2"]
    assert tokenizer.decode(tokenizer("Ωmega").input_ids, skip_special_tokens=True) == "Ωmega"
