"""What a source's cells and columns become: every type, what has no text, and columns that nobody asked for."""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fleetune.data.cells import text_of
from fleetune.data.config import ColumnMapping, DataConfig, PartitionConfig
from fleetune.data.partition import partition_keys
from fleetune.data.records import Examples
from fleetune.data.sources import load_records
from fleetune.data.tokenize import tokenize
from fleetune.errors import UserError
from support import text_models

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]},
    {"instruction": "Greet.", "input": "", "output": "Hello", "system": "", "history": []},
]


def jsonl(folder: Path, rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(folder: Path, table: pa.Table) -> str:
    pq.write_table(table, folder / "data.parquet")
    return str(folder / "data.parquet")


def train_of(path: str, **config: Any) -> Examples:
    return load_records(DataConfig(dataset=path, eval_dataset=path, **config), seed=0).train


def test_an_instruction_is_followed_by_its_input_however_the_columns_were_found(tmp_path):
    path = jsonl(tmp_path, ALPACA)
    for columns in ({}, {"prompt": "instruction", "response": "output"}, {"response": "output"}):
        assert train_of(path, columns=ColumnMapping(**columns))["prompt"] == ["Add.\n1 2", "Greet."]
    assert train_of(path, template="{prompt}\nInput: {input}")["prompt"] == ["Add.", "Greet."], "not twice"
    assert train_of(path, columns=ColumnMapping(response="input"))["prompt"] == ["Add."], "not the answer"


def test_columns_that_are_left_out_are_named_once(tmp_path, caplog):
    train_of(jsonl(tmp_path, ALPACA))
    assert caplog.text.count("columns left out") == 1
    assert "columns left out: system, history; data.template can hold any of them" in caplog.text
    caplog.clear()
    train_of(jsonl(tmp_path, ALPACA), template="{system}{history}{prompt}")
    train_of(jsonl(tmp_path, ALPACA[1:] * 2))  # nothing stands in them
    assert "left out" not in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "context": "c", "response": "r"},
        {"question": "q", "context": "c", "answer": "r"},
        {"prompt": "other", "question": "q", "response": "r", "context": "c"},
    ],
)
def test_a_context_is_left_out_aloud(tmp_path, caplog, row):
    columns = ColumnMapping(prompt="question") if "question" in row else ColumnMapping()
    train_of(jsonl(tmp_path, [row]), columns=columns)
    assert "columns left out: " + ("prompt, context" if "prompt" in row else "context") in caplog.text


NOTHING = [None, math.nan, "", " \n", "nan", "null", "NaN", "r"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("role", ["prompt", "response"])
def test_null_nan_and_nothing_are_left_out_alike_and_text_that_says_so_stays(tmp_path, caplog, suffix, role):
    rows = [{"prompt": "p", "response": "r", role: value} for value in NOTHING]
    if suffix == "parquet":
        texts = [None if isinstance(value, float) else value for value in NOTHING]
        other = "prompt" if role == "response" else "response"
        path = parquet(tmp_path, pa.table({role: texts, other: ["x"] * len(texts)}))
    else:
        path = str(tmp_path / f"data.{suffix}")
        Path(path).write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    assert train_of(path)[role] == ["nan", "null", "NaN", "r"]
    assert f"4 of 8 examples left out: blank (4 without a {role}; the first is" in caplog.text


def test_nan_in_a_column_of_numbers_and_a_name_that_is_not_there_are_left_out(tmp_path, caplog):
    path = parquet(tmp_path, pa.table({"prompt": ["p", "q"], "response": [3.0, math.nan]}))
    assert train_of(path)["response"] == ["3.0"]
    path = jsonl(tmp_path, [{"prompt": "p", "response": 3}, {"prompt": "q"}, {"prompt": "s", "response": None}])
    assert train_of(path)["response"] == ["3"]
    assert f"{path}: 2 of 3 examples left out: blank (2 without a response; the first is {path}:2)" in caplog.text
    path = tmp_path / "data.csv"
    path.write_text("prompt,response\np,\nq,nan\n")
    assert train_of(str(path))["response"] == ["nan"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("3", "3"),
        (3, "3"),
        (2**80, str(2**80)),
        (3.0, "3.0"),
        (0.1, "0.1"),
        (True, "true"),
        (None, ""),
        (math.nan, ""),
        (Decimal("1E+2"), "100"),
        (Decimal("3.10"), "3.10"),
        (date(2024, 2, 29), "2024-02-29"),
        (datetime(2024, 2, 29, 12, tzinfo=UTC), "2024-02-29T12:00:00+00:00"),
        ("é".encode(), "é"),
        (["a", b"b"], "a\nb"),
        ([1, None, math.nan], "[1, null, null]"),
        ({"text": [b"a"], "on": date(2024, 1, 1)}, '{"text": ["a"], "on": "2024-01-01"}'),
    ],
)
def test_each_type_has_one_text(value, text):
    assert text_of(value) == text


def test_parquets_types_are_json_s(tmp_path):
    rows = [{"prompt": "p", "response": True, "number": 3, "share": 3.0, "list": ["a", "b"], "struct": {"x": 1}}]
    template = "{number} {share} {list} {struct}"
    first = train_of(parquet(tmp_path, pa.Table.from_pylist(rows)), template=template)
    assert first.columns == train_of(jsonl(tmp_path, rows), template=template).columns
    assert (first["response"], first["struct"]) == (["true"], ['{"x": 1}'])


def test_floats_of_half_a_width_keep_their_own_digits(tmp_path):
    table = {"prompt": ["p", "q", "r"], "response": pa.array([0.1, 3.0, None], pa.float32())}
    assert train_of(parquet(tmp_path, pa.table(table)))["response"] == ["0.1", "3.0"]


def test_binary_columns_are_utf8_or_refused_by_name(tmp_path):
    table = {"prompt": [b"how many?", "é".encode()], "response": ["It is 3.", "4"]}
    assert train_of(parquet(tmp_path, pa.table(table)))["prompt"] == ["how many?", "é"]
    path = parquet(tmp_path, pa.table({**table, "response": [b"It is 3.", b"\xff\xfe"]}))
    with pytest.raises(UserError, match=r"column 'response' cannot be read: its bytes are not UTF-8 \(byte 0xff\)"):
        train_of(path)


def test_a_column_that_no_one_asked_for_is_irrelevant(tmp_path):
    """Pictures, dates beyond Python's, text that is no UTF-8: a fault only where the job asks for the column."""
    far = pa.array([2**62], pa.int64()).cast(pa.timestamp("ms"))
    broken = pa.Array.from_buffers(pa.string(), 1, [None, *pa.array([b"\xff"]).buffers()[1:]])
    columns = {"prompt": ["p"], "response": ["r"], "type": [b"\xff\xd8"], "when": far, "note": broken}
    path = parquet(tmp_path, pa.table(columns))
    assert train_of(path)["response"] == ["r"]
    for asked, said in (
        ({"template": "{note}"}, "'note'"),
        ({"template": "{when}"}, "'when'"),
        ({"template": "{type}"}, "'type'"),
    ):
        with pytest.raises(UserError, match=rf"data\.template: .*column {said} cannot be read"):
            train_of(path, **asked)
    with pytest.raises(UserError, match=r"data\.partition\.key: .*column 'when' cannot be read"):
        train_of(path, partition=PartitionConfig(kind="by_key", key="when"))


def test_any_number_of_categories_is_no_fault(tmp_path):
    path = jsonl(tmp_path, [{"prompt": "p", "response": "r", "topic": str(i)} for i in range(33_992)])
    config = DataConfig(dataset=path, eval_fraction=0.001)
    train = load_records(config, seed=0).train
    by_key = PartitionConfig(kind="by_key")
    assert len(set(partition_keys(train, config=by_key).tolist())) == len(train)
    tokenizer = text_models.tokenizer_of("byte-level")
    assert len(tokenize(train, tokenizer=tokenizer, config=config, cache_dir=tmp_path)) == len(train)


def test_a_parquet_file_in_a_folder_named_like_a_partition_gets_no_column_of_it(tmp_path):
    folder = tmp_path / "category=3"
    folder.mkdir()
    path = parquet(folder, pa.table({"prompt": ["p"], "response": ["r"]}))
    assert not train_of(path).has_categories


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([pa.array(["p"]), pa.array(["q"])], names=["prompt", "prompt"])
    with pytest.raises(UserError, match="the schema names a column twice: prompt, prompt"):
        train_of(parquet(tmp_path, table))


def test_long_csv_fields_are_read(tmp_path):
    long = "x" * 200_000
    for suffix in ("csv", "tsv"):
        path = tmp_path / f"data.{suffix}"
        path.write_text("prompt,response\np,".replace(",", "\t" if suffix == "tsv" else ",") + long + "\n")
        assert train_of(str(path))["response"] == [long]


def test_a_byte_order_mark_inside_of_joined_files_is_skipped(tmp_path):
    row = '{"prompt": "p", "response": "r"}\n'
    path = tmp_path / "data.jsonl"
    path.write_text(f"\ufeff{row}\ufeff{row}", encoding="utf-8")
    assert train_of(str(path))["prompt"] == ["p", "p"]


def test_a_column_named_for_one_role_is_not_found_for_another(tmp_path):
    path = jsonl(tmp_path, [{"question": "what is asked", "text": "t"}])
    train = train_of(path, columns=ColumnMapping(response="question"))
    assert (train["prompt"], train["response"]) == (["t"], ["what is asked"])


def test_examples_that_are_learnt_and_measured_are_told(tmp_path, caplog):
    rows = [{"prompt": f"p{i}", "response": "r"} for i in range(4)]
    one, other = jsonl(tmp_path, rows), jsonl(tmp_path, rows[3:], "test.jsonl")
    load_records(DataConfig(dataset=one, eval_dataset=other), seed=0)
    assert "1 of 1 held-out examples are among the training examples too" in caplog.text


def test_the_digest_tells_columns_apart_and_reads_all_of_them():
    def digest(**columns: list[str]) -> str:
        return Examples({"prompt": ["a", "b"], "response": ["c", "d"], **columns}, has_categories=False).digest()

    different = [
        digest(),
        digest(more=["", ""]),
        digest(more=["x", ""]),
        digest(more=["", "x"]),
        digest(mor=["ex", ""]),
    ]
    assert len(set(different)) == 5
    assert digest(a=["1"] * 2, b=["2"] * 2) == digest(b=["2"] * 2, a=["1"] * 2)


REAL = Path(os.environ.get("FLEETUNE_TEST_DATA", "nowhere"))


@pytest.mark.skipif(not REAL.is_dir(), reason="FLEETUNE_TEST_DATA names no folder")
@pytest.mark.parametrize(
    ("file", "columns", "num_examples"),
    [
        ("alpaca/alpaca_en_demo.json", {"prompt": "instruction", "response": "output"}, 999),
        ("aqua_rat/dev.jsonl", {"response": "rationale"}, 254),
        ("gsm_hard/first40.jsonl", {"prompt": "input", "response": "target"}, 40),
        ("banking77/train.csv", {"prompt": "text", "response": "category"}, 10_003),
    ],
)
def test_published_files_are_read_whole(file, columns, num_examples):
    train = train_of(str(REAL / file), columns=ColumnMapping(**columns))
    assert len(train) == num_examples
    assert all(map(str.strip, train["prompt"]))
