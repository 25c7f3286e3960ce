"""From records to batches: what is learnt, what is cut, what is cached, which answer counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fleetune.data import tokenize as tokenize_module
from fleetune.data.batches import IGNORED, NO_EXAMPLE, collate, draw_batches, draw_epochs, eval_prompts, num_tokens
from fleetune.data.config import ColumnMapping, DataConfig
from fleetune.data.records import Examples
from fleetune.data.sources import load_records
from fleetune.data.template import exact_match, extract_answer, render_prompts
from fleetune.data.tokenize import tokenize
from fleetune.training.config import LocalConfig

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "b", "c", "d", "x", "y", "z"]
PAD, BOS, EOS = 0, 1, 2
A, B, C, D, X, Y, Z = range(4, 11)


def word_tokenizer(**changes) -> SimpleNamespace:
    """One token a word: the part of a transformers fast tokenizer that is used."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(WORDS[:4])
    if "bos_token_id" not in changes:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    return SimpleNamespace(backend_tokenizer=backend, **{**special, **changes})


def examples_of(*pairs: tuple[str, str], categories: list[str] | None = None) -> Examples:
    prompts, responses = map(list, zip(*pairs, strict=True))
    columns = {"prompt": prompts, "response": responses, "category": categories or ["all"] * len(pairs)}
    return Examples(columns=columns, has_categories=categories is not None)


def tokens_of(dataset, i: int) -> list[int]:
    return dataset.tokens[dataset.offsets[i] : dataset.offsets[i + 1]].tolist()


@pytest.fixture
def three(tmp_path):
    examples = examples_of(("a b", "x"), ("c", "x y z"), ("a b c d", "y"), categories=["two", "one", "two"])
    return tokenize(examples, tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path)


def test_an_example_is_bos_prompt_response_eos(three):
    assert tokens_of(three, 0) == [BOS, A, B, X, EOS]
    assert tokens_of(three, 1) == [BOS, C, X, Y, Z, EOS]
    assert three.prompt_lengths.tolist() == [3, 2, 5]
    assert three.lengths.tolist() == [5, 6, 7]
    assert three.rows.tolist() == [0, 1, 2]
    assert three.overlaps.tolist() == [0, 0, 0]
    assert (three.tokens.dtype, three.offsets.dtype, three.prompt_lengths.dtype) == (np.int32, np.int64, np.int32)


def test_collate_pads_right_and_learns_the_response_and_its_end(three):
    ids, labels = collate(three, np.array([1, 0]))
    assert ids.tolist() == [[BOS, C, X, Y, Z, EOS], [BOS, A, B, X, EOS, PAD]]
    none = IGNORED
    assert labels.tolist() == [[none, none, X, Y, Z, EOS], [none, none, none, X, EOS, none]]
    assert ids.dtype == labels.dtype == np.int64


def test_loss_on_all_learns_every_token_but_padding(tmp_path):
    dataset = tokenize(
        examples_of(("a", "x"), ("a b", "x")),
        tokenizer=word_tokenizer(),
        config=DataConfig(loss_on="all"),
        cache_dir=tmp_path,
    )
    _, labels = collate(dataset, np.array([0, 1]))
    assert labels.tolist() == [[BOS, A, X, EOS, IGNORED], [BOS, A, B, X, EOS]]


def test_eval_prompts_are_padded_left(three):
    ids, mask = eval_prompts(three, np.array([1, 2, 0]))
    assert ids.tolist() == [[PAD, PAD, PAD, BOS, C], [BOS, A, B, C, D], [PAD, PAD, BOS, A, B]]
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


def test_truncation_cuts_the_beginning_of_the_prompt_and_keeps_the_response(tmp_path):
    """Of 5 tokens, the response x and eos take 2, bos 1: the last 2 of the prompt's 4 words stay.

    A response of 6 words leaves bos alone of its prompt, and loses its own end.
    """
    examples = examples_of(("a b c d", "x"), ("a", "x"), ("a b", "x y z x y z"))
    config = DataConfig(max_tokens=5)
    dataset = tokenize(examples, tokenizer=word_tokenizer(), config=config, cache_dir=tmp_path)
    assert [tokens_of(dataset, i) for i in range(3)] == [
        [BOS, C, D, X, EOS],
        [BOS, A, X, EOS],
        [BOS, X, Y, Z, X],
    ]
    assert dataset.prompt_lengths.tolist() == [3, 2, 1]
    assert dataset.num_truncated == 2


def test_every_run_is_told_what_is_cut_not_only_the_one_that_fills_the_cache(tmp_path, caplog):
    examples, config = examples_of(("a b c d", "x"), ("a", "x")), DataConfig(max_tokens=5)
    for _ in range(2):
        tokenize(examples, tokenizer=word_tokenizer(), config=config, cache_dir=tmp_path)
    assert caplog.text.count("1 of 2 examples are longer than data.max_tokens=5") == 2


def test_without_bos_and_eos_the_text_alone_is_left(tmp_path):
    tokenizer = word_tokenizer(bos_token_id=None, eos_token_id=None)
    dataset = tokenize(examples_of(("a", "x")), tokenizer=tokenizer, config=DataConfig(), cache_dir=tmp_path)
    assert tokens_of(dataset, 0) == [A, X]


def test_a_template_that_writes_bos_itself_gets_no_second_one(tmp_path):
    config = DataConfig(template="<bos> {prompt}")
    examples = examples_of(("a", "x"))
    dataset = tokenize(examples, tokenizer=word_tokenizer(), config=config, cache_dir=tmp_path)
    assert tokens_of(dataset, 0) == [BOS, A, X, EOS]


def test_truncation_switched_on_by_others_does_not_cut_the_data(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    dataset = tokenize(examples_of(("a b", "x")), tokenizer=tokenizer, config=DataConfig(), cache_dir=tmp_path)
    assert tokens_of(dataset, 0) == [BOS, A, B, X, EOS]


def test_the_second_call_reads_the_cache_and_tokenises_nothing(tmp_path, monkeypatch):
    examples = examples_of(("a b", "x"), ("c", "y z"), categories=["one", "two"])
    first = tokenize(examples, tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path)
    (path,) = tmp_path.rglob("*.arrow")
    assert not list(tmp_path.rglob("*.tmp"))

    monkeypatch.setattr(tokenize_module, "_build", lambda *args, **kwargs: pytest.fail("tokenised again"))
    again = tokenize(examples, tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path)
    for name in ("tokens", "offsets", "prompt_lengths", "rows", "overlaps"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    assert list(tmp_path.rglob("*.arrow")) == [path]


@pytest.mark.parametrize(
    ("config", "tokenizer", "response"),
    [
        ({"max_tokens": 64}, {}, "x"),
        ({"template": "c {prompt}"}, {}, "x"),
        ({"loss_on": "all"}, {}, "x"),
        ({"separator": " y "}, {}, "x"),
        ({}, {"eos_token_id": 3}, "x"),
        ({}, {}, "y"),
    ],
)
def test_whatever_changes_the_tokens_changes_the_cache_file(tmp_path, config, tokenizer, response):
    plain = DataConfig()
    tokenize(examples_of(("a", "x")), tokenizer=word_tokenizer(), config=plain, cache_dir=tmp_path)
    other, changed = word_tokenizer(**tokenizer), DataConfig(**config)
    tokenize(examples_of(("a", response)), tokenizer=other, config=changed, cache_dir=tmp_path)
    assert len(list(tmp_path.rglob("*.arrow"))) == 2


def test_a_damaged_cache_file_is_made_anew(tmp_path):
    examples = examples_of(("a b", "x"))
    tokenize(examples, tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path)
    (path,) = tmp_path.rglob("*.arrow")
    path.write_bytes(path.read_bytes()[:100])
    dataset = tokenize(examples, tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path)
    assert tokens_of(dataset, 0) == [BOS, A, B, X, EOS]


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    dataset = tokenize(
        examples_of(("a", "x")), tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path / "file"
    )
    assert tokens_of(dataset, 0) == [BOS, A, X, EOS]


def test_chunks_leave_no_trace(tmp_path, monkeypatch):
    pairs = [("a b"[: 1 + 2 * (i % 2)], "x y z"[: 1 + 2 * (i % 3)]) for i in range(11)]
    whole = tokenize(examples_of(*pairs), tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path / "1")
    monkeypatch.setattr(tokenize_module, "CHUNK", 4)
    parts = tokenize(examples_of(*pairs), tokenizer=word_tokenizer(), config=DataConfig(), cache_dir=tmp_path / "2")
    assert np.array_equal(whole.tokens, parts.tokens)
    assert np.array_equal(whole.offsets, parts.offsets)


def test_batches_go_through_the_shard_before_they_repeat_it():
    """5 steps of 3 are 15 draws: three times through a shard of 5, each example once each time."""
    shard = np.array([10, 20, 30, 40, 50])
    batches = draw_batches(shard, num_steps=5, batch_size=3, seed=7)
    assert batches.shape == (5, 3)
    assert batches.dtype == np.int64
    epochs = batches.reshape(3, 5)
    assert [sorted(epoch) for epoch in epochs.tolist()] == [shard.tolist()] * 3
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    assert np.array_equal(batches, draw_batches(shard, num_steps=5, batch_size=3, seed=7))
    assert not np.array_equal(batches, draw_batches(shard, num_steps=5, batch_size=3, seed=8))
    assert shard.tolist() == [10, 20, 30, 40, 50]


def test_a_shard_smaller_than_a_batch_fills_it_by_repeating():
    batches = draw_batches(np.array([4, 9]), num_steps=1, batch_size=4, seed=0)
    assert sorted(batches[0].tolist()) == [4, 4, 9, 9]


def test_no_batches_come_from_an_empty_shard():
    empty = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match="empty shard"):
        draw_batches(empty, num_steps=1, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="empty shard"):
        draw_epochs(empty, [(0, 1)], batch_size=1, seed=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 2.0, 2.5])
def test_every_pass_sees_each_example_once(batch_size: int, epochs: float):
    """Shards of 1 to 40 examples: whole passes see each example once, one in part sees different ones; only the last batch
    of a pass is short, and what fills it up stands at its end."""
    local = LocalConfig(epochs=epochs, batch_size=batch_size)
    for n in range(1, 41):
        shard = np.random.default_rng(n).permutation(1000)[:n]
        rows = draw_epochs(shard, local.passes(n), batch_size=batch_size, seed=n)
        sizes = (rows != NO_EXAMPLE).sum(axis=1)
        assert rows.shape == (sum(times for _, times in local.batches(n)), batch_size)
        assert sorted(sizes) == sorted(size for size, times in local.batches(n) for _ in range(times))
        assert all((row[size:] == NO_EXAMPLE).all() for row, size in zip(rows, sizes, strict=True))
        for size, times in local.passes(n):
            for _ in range(times):
                seen, rows = rows[: -(-size // batch_size)], rows[-(-size // batch_size) :]
                examples = seen[seen != NO_EXAMPLE].tolist()
                assert len(set(examples)) == len(examples) == size
                assert set(examples) <= set(shard.tolist())
        assert not len(rows)
        again = [draw_epochs(shard, local.passes(n), batch_size=batch_size, seed=s) for s in (n, n, n + 1)]
        assert np.array_equal(again[0], again[1])
    assert not np.array_equal(again[1], again[2])


def test_what_fills_up_a_batch_is_padding_and_is_not_learnt(three):
    ids, labels = collate(three, np.array([1, NO_EXAMPLE]))
    alone, _ = collate(three, np.array([1]))
    assert np.array_equal(ids[:1], alone)
    assert (ids[1] == three.pad_token_id).all()
    assert (labels[1] == IGNORED).all()
    assert num_tokens(three, np.array([NO_EXAMPLE, 1, NO_EXAMPLE])).tolist() == [0, three.lengths[1], 0]


def test_a_template_is_filled_from_any_column():
    columns = {"prompt": ["2+2", "3+3"], "hint": ["add", "sum"]}
    assert render_prompts("{{{hint}}} Q: {prompt}\nA:", columns) == ["{add} Q: 2+2\nA:", "{sum} Q: 3+3\nA:"]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = 24 clips.\n#### 72", "72"),
        ("#### 1,234,567", "1234567"),
        ("#### -5.50.", "-5.50"),
        ("#### $18", "18"),
        ("#### 3\n#### 4", "3"),
        ("the answer is 72", None),
        ("#### none", None),
    ],
)
def test_the_answer_is_the_number_after_the_hashes(text, answer):
    assert extract_answer(text, DataConfig().answer_pattern) == answer


def test_exact_match_compares_answers_not_wordings():
    pattern = DataConfig().answer_pattern
    predictions = ["so #### 18.0", "#### 19", "18", "no idea", "#### 1,000"]
    references = ["9 * 2 = 18 #### 18", "#### 18", "#### 18", "#### 18", "1000"]
    assert exact_match(predictions, references, pattern=pattern).tolist() == [True, False, True, False, True]
    assert exact_match(["(b)"], [" (b) "], pattern=pattern).tolist() == [True]
    assert exact_match(["it is B."], ["so it is B"], pattern=r"is ([A-E])").tolist() == [True]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [
    {"question": f"what is {i}?", "answer": f"#### {i}", "topic": "even" if i % 2 == 0 else "odd"} for i in range(20)
]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_records(tmp_path, suffix):
    path = tmp_path / f"data.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, ROWS)
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        lines = [list(ROWS[0]), *(row.values() for row in ROWS)]
        path.write_text("\n".join(("\t" if suffix == "tsv" else ",").join(line) for line in lines) + "\n")
    records = load_records(DataConfig(dataset=str(path)), seed=3)
    assert (len(records.train), len(records.eval)) == (18, 2)
    assert sorted(records.train["prompt"] + records.eval["prompt"]) == sorted(row["question"] for row in ROWS)
    together = zip(records.train["prompt"], records.train["response"], records.train["category"], strict=True)
    assert set(together) <= {(row["question"], row["answer"], row["topic"]) for row in ROWS}


def test_quotes_and_line_breaks_in_csv_and_bom_are_read(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,response\r\n"one, ""two""\nthree",1\r\nfour,2\r\n')
    records = load_records(DataConfig(dataset=str(path), eval_dataset=str(path)), seed=0)
    assert records.train["prompt"] == ['one, "two"\nthree', "four"]


def test_instructions_carry_their_input_and_blank_examples_are_left_out(tmp_path, caplog):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hello"},
        {"instruction": "Say nothing.", "input": "", "output": " "},
    ]
    path = write_jsonl(tmp_path / "alpaca.jsonl", rows)
    records = load_records(DataConfig(dataset=path, eval_dataset=path), seed=0)
    assert records.train["prompt"] == ["Add.\n1 2", "Greet."]
    assert "1 of 3 examples left out" in caplog.text


def test_named_columns_win_over_the_usual_ones(tmp_path):
    rows = [{"question": "q", "answer": "b", "rationale": "because", "options": ["a", "b"], "level": 3}] * 2
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    columns = ColumnMapping(response="rationale", category="level")
    train = load_records(DataConfig(dataset=path, columns=columns), seed=0).train
    assert (train["prompt"], train["response"], train["category"]) == (["q"], ["because"], ["3"])
    assert train["options"] == ["a\nb"]


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", ROWS)
    config = DataConfig(dataset=path, num_examples=6, eval_fraction=0.5, num_eval_examples=4)
    one, same, other = (load_records(config, seed=seed) for seed in (1, 1, 2))
    assert (len(one.train), len(one.eval)) == (6, 4)
    assert (one.train.digest(), one.eval.digest()) == (same.train.digest(), same.eval.digest())
    assert one.train.digest() != other.train.digest()
    assert not set(one.train["prompt"]) & set(one.eval["prompt"])


def test_micro_reasoning_becomes_tokens_of_micro_llama(tmp_path):
    """The prompt ends where the base model's pretraining has it end, and no digit is lost on the way."""
    transformers = pytest.importorskip("transformers")
    import fleetune

    assets = Path(fleetune.__file__).parent / "assets" / "micro-llama"
    tokenizer = transformers.AutoTokenizer.from_pretrained(assets)
    config = DataConfig(num_examples=50, num_eval_examples=20)
    records = load_records(config, seed=0)
    assert (len(records.train), len(records.eval)) == (50, 20)
    assert not set(records.train["prompt"]) & set(records.eval["prompt"])
    dataset = tokenize(records.train, tokenizer=tokenizer, config=config, cache_dir=tmp_path)
    assert dataset.num_truncated == 0
    for i in range(50):
        prompt, response = records.train["prompt"][i], records.train["response"][i]
        ids = tokens_of(dataset, i)
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{prompt} {response}"
        assert tokenizer.decode(ids[: dataset.prompt_lengths[i]], skip_special_tokens=True) == prompt
    assert exact_match(records.train["response"], records.train["answer"], pattern=config.answer_pattern).all()


@pytest.mark.skipif("FLEETUNE_TEST_DATA" not in os.environ, reason="FLEETUNE_TEST_DATA names no folder")
def test_gsm8k_as_its_authors_publish_it():
    folder = Path(os.environ["FLEETUNE_TEST_DATA"]) / "gsm8k"
    config = DataConfig(
        dataset=str(folder / "train.jsonl"), eval_dataset=str(folder / "test.jsonl"), num_eval_examples=2_000
    )
    records = load_records(config, seed=0)
    assert (len(records.train), len(records.eval)) == (7_473, 1_319)
    answers = [extract_answer(text, config.answer_pattern) for text in records.eval["response"]]
    assert answers[0] == "18"
    assert None not in answers
