"""The reference path: the same response ids after a prompt that also holds the solution."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.data.batches import IGNORED, collate
from fleetune.data.config import DataConfig
from fleetune.data.dataset import TokenizedDataset
from fleetune.data.records import Examples
from fleetune.data.references import with_references
from fleetune.data.sources import load_records
from fleetune.data.tokenize import tokenize
from fleetune.errors import UserError
from fleetune.problem import load_inputs
from support import text_models, tiny

TRIPLES = [
    ("so what is 2 + 2?\nA:", "it is 4", "2 + 2 is 4"),
    ("A: ", "3", "the sum is 3"),  # with no separator a token of the byte-level kind lies on the seam
    ("say A:\n", "\n2", "42 is 15"),
    ("sum", "s are 12", "add"),
]


def paths(
    kind: str, folder: Path, triples: list[tuple[str, str, str]] = TRIPLES, room: int = 999, **config: Any
) -> TokenizedDataset:
    prompts, responses, references = map(list, zip(*triples, strict=True))
    columns = {"prompt": prompts, "response": responses, "reference": references, "category": ["all"] * len(triples)}
    examples, settings = Examples(columns, has_categories=False), DataConfig(**config)
    tokenizer = text_models.tokenizer_of(kind)
    dataset = tokenize(examples, tokenizer=tokenizer, config=settings, cache_dir=folder)
    return with_references(dataset, examples, tokenizer=tokenizer, config=settings, room=room)


def tokens_of(dataset: TokenizedDataset, i: int) -> list[int]:
    return dataset.tokens[dataset.offsets[i] : dataset.offsets[i + 1]].tolist()


def decoded(kind: str, ids: list[int]) -> str:
    """The text of ids, without bos and eos. Bytes are special tokens of these tokenizers, and must not be skipped."""
    tokenizer = text_models.tokenizer_of(kind)
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=False)


@pytest.mark.parametrize("kind", text_models.KINDS)
@pytest.mark.parametrize("separator", [" ", "", "\n"])
def test_both_paths_carry_the_same_response_ids(tmp_path, kind, separator):
    """Labels are equal, token by token, and what stands before them makes the text that the template says, not a letter more."""
    base = paths(kind, tmp_path, separator=separator)
    assert base.reference is not None
    rows = np.arange(len(TRIPLES))
    (_, labels), (_, other) = collate(base, rows), collate(base.reference, rows)
    for i, (prompt, response, reference) in enumerate(TRIPLES):
        assert labels[i][labels[i] != IGNORED].tolist() == other[i][other[i] != IGNORED].tolist()
        text = f"{reference}\n{prompt}{separator}{response}"
        assert decoded(kind, tokens_of(base.reference, i)) == (text.lower() if kind == "lowercase" else text)


def test_a_seam_without_a_token_across_it_is_that_of_the_joint_text(tmp_path):
    """Then the whole path is what the tokenizer makes of its text: as a model saw such texts in pretraining."""
    base = paths("byte-level", tmp_path, TRIPLES[:1])
    prompt, response, reference = TRIPLES[0]
    tokenizer = text_models.tokenizer_of("byte-level")
    joint = [*tokenizer(f"{reference}\n{prompt} {response}").input_ids, tokenizer.eos_token_id]
    assert tokens_of(base.reference, 0) == joint  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace", "byte-level"])
def test_a_reference_prompt_that_ends_otherwise_stays_whole(tmp_path, kind):
    """The base path's ids stand after it, also where the first of them holds the end of the base path's prompt."""
    base = paths(kind, tmp_path, reference_template="{prompt} {reference} so", separator="")
    assert base.reference is not None
    for i, (prompt, _, reference) in enumerate(TRIPLES):
        ids, length = tokens_of(base.reference, i), int(base.reference.prompt_lengths[i])
        assert ids[length:] == tokens_of(base, i)[base.prompt_lengths[i] :]
        assert decoded(kind, ids[:length]) == f"{prompt} {reference} so"


def test_a_long_reference_path_is_refused(tmp_path):
    """The job's limit, and the model's."""
    reference = paths("byte-level", tmp_path).reference
    assert reference is not None
    longest = int(reference.lengths.max())
    with pytest.raises(
        UserError, match=f"1 of 4 reference paths have more than {longest - 1} tokens: the longest, of"
    ) as error:
        paths("byte-level", tmp_path, max_reference_tokens=longest - 1)
    assert (error.value.field, error.value.value) == ("data.max_reference_tokens", longest - 1)
    assert f"set it to {longest}" in str(error.value.hint)
    with pytest.raises(UserError, match=f"more than {longest - 1} tokens") as error:
        paths("byte-level", tmp_path, room=longest - 1)
    assert f"the model takes {longest - 1}" in str(error.value.hint)


def test_a_missing_reference_is_refused(tmp_path):
    with pytest.raises(
        UserError, match="1 of 2 examples have no reference in column 'reference', the first is example 1"
    ):
        paths("byte-level", tmp_path, [TRIPLES[0], ("a", "b", "  ")])
    examples = Examples({"prompt": ["a"], "response": ["2"], "category": ["all"]}, has_categories=False)
    tokenizer = text_models.tokenizer_of("byte-level")
    for columns, rule in ({}, "no column is named like one"), ({"reference": "solutoin"}, "no such column"):
        config = DataConfig(columns=columns)
        dataset = tokenize(examples, tokenizer=tokenizer, config=config, cache_dir=tmp_path)
        with pytest.raises(UserError, match=rule) as error:
            with_references(dataset, examples, tokenizer=tokenizer, config=config, room=4096)
        assert error.value.field == "data.columns.reference"


def test_a_template_without_the_solution_is_refused():
    with pytest.raises(ValueError, match=r"does not name \{reference\}"):
        DataConfig(reference_template="{prompt}")


def test_the_prompt_of_the_reference_is_the_templates(tmp_path):
    """`{prompt}` in it is what `data.template` makes of the question."""
    base = paths("byte-level", tmp_path, template="Question: {prompt}\nAnswer:")
    assert (
        decoded("byte-level", tokens_of(base.reference, 0))
        == "2 + 2 is 4\nQuestion: so what is 2 + 2?\nA:\nAnswer: it is 4"
    )


def test_micro_reasoning_gives_a_differently_worded_chain():
    settings = {"data.dataset": "micro-reasoning", "data.max_tokens": 128, "data.num_examples": 50}
    spec = tiny.spec({**settings, "model.base": "micro-llama"}, method="lesft")  # the tiny model has too few positions
    inputs = load_inputs(spec)
    reference = inputs.train.reference
    assert reference is not None
    assert inputs.evaluation.data.reference is None  # nobody sees the solution when it is asked
    assert inputs.reader is not None
    text, other = (inputs.reader.texts(np.array([tokens_of(each, 0)]))[0] for each in (inputs.train, reference))
    assert other.endswith(text)
    assert other.split("####")[1].split()[0] == text.split("####")[1].split()[0]  # the same answer in both wordings
    assert load_inputs(tiny.spec()).train.reference is None


LOCAL = {
    "gsm8k": ("gsm8k/train.jsonl", {"response": "answer", "reference": "answer"}, "{question}"),
    "commonsenseqa": (
        "commonsenseqa/dev_rand_split.jsonl",
        {"prompt": "question", "response": "answerKey", "reference": "answerKey"},
        "{prompt}",
    ),
    "aqua_rat": ("aqua_rat/dev.jsonl", {"response": "rationale", "reference": "correct"}, "{question}\n{options}"),
}


@pytest.mark.skipif(
    "FLEETUNE_TEST_DATA" not in os.environ, reason="needs the published data files (FLEETUNE_TEST_DATA)"
)
@pytest.mark.parametrize("name", LOCAL)
def test_published_files_give_paths_by_column_name(tmp_path, name):
    file, columns, template = LOCAL[name]
    path = Path(os.environ["FLEETUNE_TEST_DATA"]) / file
    config = DataConfig(dataset=str(path), columns=columns, template=template, max_tokens=4096, num_examples=100)
    records = load_records(config, seed=0)
    tokenizer = text_models.tokenizer_of("byte-level")
    dataset = tokenize(records.train, tokenizer=tokenizer, config=config, cache_dir=tmp_path)
    both = with_references(dataset, records.train, tokenizer=tokenizer, config=config, room=4096)
    assert len(both.reference) == len(both)  # type: ignore[arg-type]
    assert (both.reference.lengths > both.lengths).all()  # type: ignore[union-attr]
