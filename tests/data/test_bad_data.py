"""Broken data: every fault names the file, the line and the way out, and is the user's (exit status 2)."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from fleetune.data.config import ColumnMapping, DataConfig
from fleetune.data.sources import load_records
from fleetune.errors import UserError

GOOD = '{"prompt": "p", "response": "r"}\n'


def fault_of(path, content: bytes | str, **config) -> UserError:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        load_records(DataConfig(dataset=str(path), **config), seed=0)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", GOOD + "\n" + '{"prompt": "p", "resp\n', "a.jsonl:3: broken JSON"),
        ("a.jsonl", GOOD + "[1, 2]\n", "a.jsonl:2: each line must be an object, this is a list"),
        (
            "a.jsonl",
            GOOD + '{"prompt": "p", "prompt": "q"}\n',
            "a.jsonl:2: broken JSON: an object has the name 'prompt' twice",
        ),
        ("a.jsonl", GOOD + '{"a": {"b": 1, "b": 2}}\n', "a.jsonl:2: broken JSON: an object has the name 'b' twice"),
        (
            "a.jsonl",
            GOOD + r'{"prompt": "\ud83d", "response": "r"}',
            r"a.jsonl:2: broken JSON: \ud83d is half of a surrogate",
        ),
        ("a.jsonl", GOOD + r'{"\udc00": 1}', r"a.jsonl:2: broken JSON: \udc00 is half of a surrogate"),
        (
            "a.jsonl",
            GOOD + '{"a": ' + "[" * 9_999 + "]" * 9_999 + "}",
            "a.jsonl:2: broken JSON: nested more than 100 levels",
        ),
        (
            "a.jsonl",
            GOOD + '{"a": ' + '{"b":' * 101 + "1" + "}" * 102,
            "a.jsonl:2: broken JSON: nested more than 100 levels",
        ),
        ("a.jsonl", GOOD + '{"a": ' + "1" * 100_000 + "}", "a.jsonl:2: broken JSON: a number of 100,000 digits"),
        ("a.jsonl", GOOD + '{"a": -1e999}', "a.jsonl:2: broken JSON: a number beyond 1.8e308"),
        ("a.jsonl", GOOD + '{"prompt": "\0"}', "a.jsonl:2: a NUL byte"),
        ("a.jsonl", '[{"prompt": "p"},\n{"prompt": "q"}]', "a JSON list, not one object per line? name the file .json"),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "\xe9"}\n', "a.jsonl:2: not UTF-8 (byte 0xe9)"),
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", " \n\n", "the file is empty"),
        ("a.jsonl", GOOD, "one example is too few"),
        ("a.jsonl", '{"prompt": "p", "response": ""}\n', "every example has a blank prompt or response"),
        ("a.json", '[\n{"prompt": "p"},\n{"prompt" "q"}]', "a.json:3: broken JSON"),
        ("a.json", GOOD + GOOD, "one object per line? name the file .jsonl"),
        ("a.json", '{"prompt": "p"}', "must be a list of objects, this is an object"),
        ("a.json", '[{"prompt": "p"}, null]', "item 2 must be an object, this is null"),
        ("a.json", '{"data": [{"prompt": "p"}]}', "save the list under 'data' as a file of its own"),
        ("a.json", "[\n{}," + r'{"prompt": "\ud83d"}]', r"a.json:2: broken JSON: \ud83d is half of a surrogate"),
        (
            "a.json",
            '[{},\n{"a": ' + "[" * 9_999 + "]" * 9_999 + "}]",
            "a.json:2: broken JSON: nested more than 100 levels",
        ),
        ("a.json", "[{},\n\n" + '{"a": ' + "1" * 100_000 + "}]", "a.json:3: broken JSON: a number of 100,000 digits"),
        ("a.json", '[{"prompt": "p"}\n{"prompt": "q"}]', "a.json:2: broken JSON: Expecting ',' delimiter, column 1"),
        ("a.json", '[{"prompt": "p"},\n]', "a.json:2: broken JSON: Expecting value"),
        ("a.json", '[{"prompt": "p"}', "a.json:1: broken JSON: Expecting ',' delimiter"),
        ("a.json", "[]", "holds no examples"),
        ("a.csv", "prompt,response\n", "holds no examples"),
        ("a.csv", "prompt,response\np,r\np,r,s\n", "a.csv:3: 3 fields, the header has 2"),
        ("a.csv", 'prompt,response\n"p\nq",r\np\n', "a.csv:4: 1 field, the header has 2"),
        ("a.csv", 'prompt,response\np,"r\n', "a.csv:2: broken row"),
        ("a.csv", "prompt,prompt\np,r\n", "a.csv:1: the header names a column twice"),
        ("a.csv", b"prompt,response\np,r\np,\0\n", "a.csv:3: a NUL byte"),
        ("a.csv", "prompt,response\np,r\n".encode("utf-16"), "a.csv:1: not UTF-8 (byte 0xff)"),
        ("a.tsv", "Who is it?\tme\nAnd now?\tyou\n", "Who is it?, me; the first line must be a header"),
        ("a.parquet", "PAR1 nothing else", "not a Parquet file"),
        ("a.txt", "p r", "not a known format"),
    ],
)
def test_a_broken_file_is_reported_where_it_is_broken(tmp_path, name, content, said):
    fault = fault_of(tmp_path / name, content)
    assert said in str(fault)
    assert len(str(fault)) < 500
    assert fault.field is not None
    assert fault.field.startswith("data.")


def test_a_missing_column_is_reported_with_those_there_and_the_nearest(tmp_path):
    fault = fault_of(tmp_path / "a.csv", "question,anwser\nq,r\n", columns=ColumnMapping(response="answer"))
    assert fault.field == "data.columns.response"
    assert "did you mean 'anwser'" in str(fault)
    fault = fault_of(tmp_path / "a.csv", "question,notes\nq,r\n")
    assert fault.field == "data.columns.response"
    assert "name one of: question, notes" in str(fault)


CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"prompt": "p", "response": ["4", "four"]}, {}, "a.jsonl:1: 'response' is a list of 2, not a text"),
        ({"prompt": "p", "answers": {"text": ["4"]}}, {"response": "answers"}, "'answers' is an object with text, not"),
        ({"prompt": {"q": "p"}, "response": "4"}, {}, "'prompt' is an object with q, not a text"),
        ({"messages": CHAT}, {}, "name one of: messages; chats are not read; write what the user says"),
        ({"messages": CHAT}, {"prompt": "messages", "response": "messages"}, "chats are not read"),
        (
            {"conversations": [{"from": "human", "value": "2"}], "text": "t"},
            {"response": "conversations"},
            "chats are not",
        ),
    ],
)
def test_lists_and_objects_are_no_texts_and_the_way_out_is_told(tmp_path, row, columns, said):
    fault = fault_of(tmp_path / "a.jsonl", json.dumps(row) + "\n", columns=ColumnMapping(**columns))
    assert said in str(fault)


def test_a_template_with_a_wrong_column_names_the_nearest(tmp_path):
    from fleetune.data.template import render_prompts

    with pytest.raises(UserError, match=r"data\.template='promt': no such column.*did you mean 'prompt'"):
        render_prompts("{promt}", {"prompt": ["p"], "response": ["r"]})


@pytest.mark.parametrize("template", ["no column", "{", "{}", "{prompt:>10}", "{prompt!r}"])
def test_a_template_that_cannot_be_filled_is_refused(template):
    with pytest.raises(ValidationError, match="template"):
        DataConfig(template=template)


@pytest.mark.parametrize("field", ["template", "separator"])
def test_half_a_surrogate_pair_is_no_text_of_a_job_either(field):
    with pytest.raises(ValidationError, match=r"half of a surrogate pair|parse raw data as a unicode string"):
        DataConfig(**{field: "{prompt}\ud83d"})


def test_an_answer_pattern_must_compile():
    with pytest.raises(ValidationError, match="not a regular expression"):
        DataConfig(answer_pattern="####(")


def fault_of_name(name: str, **config) -> UserError:
    with pytest.raises(UserError) as caught:
        load_records(DataConfig(dataset=name, **config), seed=0)
    return caught.value


def test_a_path_that_is_not_there_names_the_nearest_file(tmp_path):
    (tmp_path / "train.jsonl").write_text(GOOD)
    assert "did you mean 'train.jsonl'" in str(fault_of_name(str(tmp_path / "trian.jsonl")))
    assert "there is no folder" in str(fault_of_name(str(tmp_path / "nowhere" / "train.jsonl")))
    assert "a folder; name one file in it (it holds train.jsonl)" in str(fault_of_name(str(tmp_path)))


def test_a_misspelt_built_in_name_is_told_without_asking_the_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fault = fault_of_name("micro-resoning")
    assert fault.field == "data.dataset"
    assert "did you mean 'micro-reasoning'" in str(fault)
    assert "data.split='tset'" in str(fault_of_name("micro-reasoning", split="tset"))


def fake_hub(monkeypatch, answer) -> None:
    def load_dataset(hub_id, config):
        if isinstance(answer, Exception):
            raise answer
        assert (hub_id, config) == ("openai/gsm8k", "main")
        return answer

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def hub_split(*rows: str) -> SimpleNamespace:
    columns = {"question": list(rows), "answer": [f"#### {row}" for row in rows]}
    return SimpleNamespace(to_dict=lambda: columns)


def test_an_unreachable_hub_is_the_users_to_know(monkeypatch):
    fake_hub(monkeypatch, ConnectionError("Couldn't reach the hub\nlong traceback"))
    fault = fault_of_name("somebody/some-data")
    assert fault.value == "somebody/some-data"
    assert "neither a built-in dataset, nor a local file" in str(fault)
    assert "built in: micro-reasoning" in str(fault)
    assert "ConnectionError: Couldn't reach the hub" in str(fault)
    assert "traceback" not in str(fault)


def test_a_hub_dataset_gives_its_split_and_its_test_split(monkeypatch):
    fake_hub(monkeypatch, {"train": hub_split("1", "2", "3"), "test": hub_split("8", "9")})
    records = load_records(DataConfig(dataset="openai/gsm8k:main"), seed=0)
    assert records.train["prompt"] == ["1", "2", "3"]
    assert records.eval["response"] == ["#### 8", "#### 9"]
    fault = fault_of_name("openai/gsm8k:main", split="trian")
    assert fault.field == "data.split"
    assert "did you mean 'train'" in str(fault)
