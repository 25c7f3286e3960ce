"""Prompt and response are one text to the tokenizer: where the response begins, and what begins and ends the text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fleetune.data.batches import IGNORED, collate, eval_prompts
from fleetune.data.config import DataConfig
from fleetune.data.dataset import TokenizedDataset
from fleetune.data.records import Examples
from fleetune.data.tokenize import continuations, tokenize
from fleetune.errors import UserError
from fleetune.models.model import Model
from fleetune.models.submodel import Submodel
from fleetune.training.evaluate import evaluate_rows
from fleetune.training.plan import ClientTask, LocalPlan
from fleetune.training.trainer import train_cohort
from support import random_models as models
from support import runs, text_models, tiny

PAIRS = [
    ("Q: what is 2 + 2?\nA:", "it is 4"),
    ("Añadir ２ and ﬁve...", "42 …"),  # changes its length in NFKD
    ("the sum of 7 and 8 is", "15 🙂"),
    ("A: ", "3"),
    ("say A:\n", "\n2"),
    ("sum", "s are 12"),
]
SEPARATORS = (" ", "\n", "", "\n\n### Answer: ")


def examples_of(pairs: list[tuple[str, str]]) -> Examples:
    prompts, responses = map(list, zip(*pairs, strict=True))
    return Examples({"prompt": prompts, "response": responses, "category": ["all"] * len(pairs)}, has_categories=False)


def built(pairs: list[tuple[str, str]], kind: str, folder: Path, *, adds_bos: bool = True, **config: Any):
    tokenizer = text_models.tokenizer_of(kind, adds_bos=adds_bos)
    return tokenize(examples_of(pairs), tokenizer=tokenizer, config=DataConfig(**config), cache_dir=folder)


def tokens_of(dataset: TokenizedDataset, i: int) -> list[int]:
    return dataset.tokens[dataset.offsets[i] : dataset.offsets[i + 1]].tolist()


def reference(tokenizer: Any, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Ids and labels as a user of transformers makes them: the whole text and its end, a label for each token that ends
    behind the prompt."""
    encoded = tokenizer(text)
    plain = text_models.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.post_processor = None
    ends = [0, *(stop for _, stop in plain.encode(text).offsets)]  # of bos and the text's tokens
    ids = [*encoded.input_ids, tokenizer.eos_token_id]
    labels = [i if stop > len(prompt) else IGNORED for i, stop in zip(ids, [*ends, len(text) + 1], strict=True)]
    return ids, labels


@pytest.mark.parametrize("kind", text_models.KINDS)
@pytest.mark.parametrize("separator", SEPARATORS)
def test_tokens_and_labels_are_those_of_the_joint_text(tmp_path, kind, separator):
    dataset = built(PAIRS, kind, tmp_path, separator=separator)
    tokenizer = text_models.tokenizer_of(kind)
    ids, labels = collate(dataset, np.arange(len(PAIRS)))
    for i, (prompt, response) in enumerate(PAIRS):
        expected_ids, expected_labels = reference(tokenizer, prompt, prompt + separator + response)
        n = len(expected_ids)
        assert (ids[i, :n].tolist(), labels[i, :n].tolist()) == (expected_ids, expected_labels)
        own = tokenizer(prompt).input_ids
        if expected_ids[: len(own)] == own:  # no token on the seam: the prompt's own tokens are what is not learnt
            assert dataset.prompt_lengths[i] == len(own)


def test_a_token_on_the_seam_is_learnt_and_left_to_be_generated(tmp_path):
    """'A: ' and '3' are the tokens A, :, ▁3: the prompt gives A and :, and ' 3' is what should follow."""
    dataset = built([("A: ", "3"), ("A:", " 3")], "byte-level", tmp_path, separator="")
    tokenizer = text_models.tokenizer_of("byte-level")
    assert tokens_of(dataset, 0) == tokens_of(dataset, 1) == [*tokenizer("A: 3").input_ids, tokenizer.eos_token_id]
    assert dataset.overlaps.tolist() == [1, 0]
    prompts, _ = eval_prompts(dataset, np.arange(2))
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in prompts] == ["A:", "A:"]
    examples = examples_of([("A: ", "3"), ("A:", " 3")])
    follows = continuations(examples, dataset, tokenizer=tokenizer, config=DataConfig(separator=""))
    assert follows == [" 3", " 3"]


@functools.cache
def problem_of(kind: str, separator: str, folder: Path):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in PAIRS))
    return runs.problem(
        tiny.spec(
            {
                "model.base": text_models.folder_of(kind),
                "data.dataset": str(path),
                "data.eval_dataset": str(path),
                "data.separator": separator,
                "data.max_tokens": 128,
                "data.partition.kind": "iid",
            }
        )
    )


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "metaspace"])
def test_step_ones_loss_is_transformers_on_the_joint_text(tmp_path, kind):
    """The trainer's first step and the evaluation, each with an adapter that does nothing yet."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    problem = problem_of(kind, "\n", tmp_path)
    folder = text_models.folder_of(kind)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    sums, counts = [], []
    for prompt, response in PAIRS:
        ids, labels = (torch.tensor([row]) for row in reference(tokenizer, prompt, f"{prompt}\n{response}"))
        with torch.no_grad():
            counts.append(int((labels[:, 1:] != IGNORED).sum()))
            sums.append(model(ids, labels=labels).loss.item() * counts[-1])
    expected = sum(sums) / sum(counts)

    adapter = models.random_adapter(problem.inputs.base, problem.spec.model.lora)
    adapter = {name: torch.zeros_like(t) if name.endswith("lora_B") else t for name, t in adapter.items()}
    plan = LocalPlan(Model(Submodel.prefix(2)))
    network = runs.worker(problem).network(plan.model)
    rows = np.arange(len(PAIRS))
    first = ClientTask(0, 1.0, rows[None], 0.01, address=(0, 0))
    update = train_cohort(network, plan, adapter, [first], data=problem.inputs.train, local=problem.spec.local)
    assert update.losses[0] == pytest.approx(expected, rel=1e-5)
    held_out = problem.inputs.evaluation
    found = evaluate_rows(
        network, adapter, data=held_out.data, responses=held_out.responses, rows=rows, reader=None,
        max_new_tokens=None, answer_pattern=problem.spec.data.answer_pattern,
    )  # fmt: skip
    assert (found.loss / found.num_tokens, found.num_tokens) == (pytest.approx(expected, rel=1e-5), sum(counts))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "metaspace"])
@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{prompt}", "Q: 2"),
        ("{prompt}", "<s>Q: 2"),
        ("<s>{prompt}", "Q: 2"),
        ("<s>{prompt}", "<s>Q: 2"),
        ("Q: {prompt}", "<s>2"),
        (" <s>{prompt}", "<s>2"),
        ("<s>\nQ: {prompt}", " <s>2"),
        ("{prompt}", "<s> <s>2"),
    ],
)
def test_bos_and_eos_are_there_once_whoever_writes_them(tmp_path, kind, template, prompt):
    template_puts_it = "<s>{" in template or (prompt.startswith("<s>") and template == "{prompt}")
    rules = [(True, "auto"), (False, True), (True, True)] + ([(False, "auto")] if template_puts_it else [])
    for adds_bos, add_bos in rules:
        for response in ("4", "4</s>", "4</s>\n"):
            dataset = built([(prompt, response)], kind, tmp_path, adds_bos=adds_bos, add_bos=add_bos, template=template)
            tokenizer, tokens = text_models.tokenizer_of(kind), tokens_of(dataset, 0)
            assert tokens.count(tokenizer.bos_token_id) == 1
            assert tokens.count(tokenizer.eos_token_id) == 1
            assert tokens[0] == tokenizer.bos_token_id or template.startswith(" ")


def test_bos_is_the_tokenizers_to_put_unless_the_job_says_otherwise(tmp_path):
    """A tokenizer may know a bos and not begin texts with it; transformers then leaves it out, and so do we."""
    pairs = [("Q: 2", "4")]
    bos, eos = (getattr(text_models.tokenizer_of("byte-level"), f"{end}_token_id") for end in ("bos", "eos"))
    plain = text_models.tokenizer_of("byte-level")("Q: 2 4", add_special_tokens=False).input_ids

    def tokens(*, adds_bos: bool, **config: Any) -> list[int]:
        return tokens_of(built(pairs, "byte-level", tmp_path, adds_bos=adds_bos, **config), 0)

    assert tokens(adds_bos=True) == [bos, *plain, eos]
    assert tokens(adds_bos=False) == [*plain, eos]
    assert tokens(adds_bos=False, add_bos=True, add_eos=False) == [bos, *plain]
    assert tokens(adds_bos=True, add_bos=False) == [*plain, eos]


def test_a_bos_that_data_writes_is_kept_where_nothing_else_puts_one(tmp_path):
    dataset = built([("<s>Q: 2", "4</s>")], "byte-level", tmp_path, add_bos=False, add_eos=False)
    ids = text_models.tokenizer_of("byte-level")("<s>Q: 2 4</s>", add_special_tokens=False).input_ids
    assert tokens_of(dataset, 0) == ids
    cut = built([("<s>" + "Q: 2 " * 9, "4</s>")], "byte-level", tmp_path, max_tokens=8)
    assert tokens_of(cut, 0)[0] == ids[0], "the text's own bos is not cut away either"


def test_a_bos_that_marks_turns_stays_in_the_text(tmp_path):
    """Where the tokenizer does not begin texts with it: there the mark of a turn may be called bos."""
    pair, template = ("Q: 2</s>", "<s>it is 4"), "<s>{prompt} "
    dataset = built([pair], "byte-level", tmp_path, adds_bos=False, template=template, separator="")
    bos = text_models.tokenizer_of("byte-level").bos_token_id
    assert tokens_of(dataset, 0).count(bos) == 2


def test_asking_for_a_bos_that_the_tokenizer_has_not_is_refused(tmp_path):
    source = text_models.tokenizer_of("byte-level")
    no_bos = SimpleNamespace(
        backend_tokenizer=source.backend_tokenizer, bos_token_id=None, eos_token_id=2, pad_token_id=None
    )
    with pytest.raises(UserError, match=r"data\.add_bos=True: the model's tokenizer has no bos"):
        tokenize(examples_of([("a", "b")]), tokenizer=no_bos, config=DataConfig(add_bos=True), cache_dir=tmp_path)


def silent() -> Any:
    """A tokenizer that drops zero-width blanks."""
    from transformers import PreTrainedTokenizerFast

    backend = text_models.Tokenizer.from_str(text_models.backend_of("byte-level").to_str())
    backend.normalizer = text_models.normalizers.Replace("\u200b", "")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_responses_without_a_token_are_left_out_and_told(tmp_path, caplog):
    pairs = [("Q: 1", "\u200b\u200b"), ("Q: 2", "4\u200b"), ("Q: 3", "</s>"), ("Q: 4", "\u200b5")]
    for _ in range(2):  # from the cache too
        dataset = tokenize(examples_of(pairs), tokenizer=silent(), config=DataConfig(), cache_dir=tmp_path)
        assert dataset.rows.tolist() == [1, 3]
    assert caplog.text.count("2 of 4 examples left out: 2 with no token of the response") == 2
    with pytest.raises(UserError, match="no example is left: 1 with no token of the response"):
        tokenize(examples_of(pairs[:1]), tokenizer=silent(), config=DataConfig(), cache_dir=tmp_path)


def test_a_prompt_without_a_token_and_a_separator_without_an_end_are_left_out_too(tmp_path, caplog):
    config = DataConfig(add_bos=False)
    dataset = tokenize(
        examples_of([("\u200b", "4"), ("Q: 2", "4")]), tokenizer=silent(), config=config, cache_dir=tmp_path
    )
    assert dataset.rows.tolist() == [1]
    assert "1 with no token of the prompt" in caplog.text
    with pytest.raises(UserError, match="a separator that fills data"):
        built([("Q: 2", "4")], "byte-level", tmp_path, max_tokens=8, separator="\n# what follows is the answer: ")


def test_held_out_texts_and_keys_stay_with_their_tokens(tmp_path):
    """The first of three examples gives no token: the others keep their own answers and categories."""
    folder = Path(text_models.folder_of("byte-level"))
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["normalizer"] = {"type": "Replace", "pattern": {"String": "\u200b"}, "content": ""}
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "tokenizer.json").write_text(json.dumps(backend))
    rows = [("a", "\u200b", "x"), ("b", "4", "y"), ("c", "5</s>", "z")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": r, "category": c}) + "\n" for p, r, c in rows))
    overrides = {"model.base": str(copy), "data.dataset": str(data), "data.eval_dataset": str(data)}
    inputs = runs.inputs(tiny.spec(overrides))
    assert inputs.evaluation.responses == [" 4", " 5"]
    assert inputs.keys.tolist() == [1, 2]
    assert len(inputs.train) == len(inputs.evaluation.data) == 2


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="not a fast one"):
        tokenize(examples_of([("a", "b")]), tokenizer=SimpleNamespace(), config=DataConfig())
