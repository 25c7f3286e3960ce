"""The recording of golden.py finds what changed, reads names as they were renamed, and is refused on another machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import golden


def test_equal_facts_do_not_differ():
    facts = {"tensors": ["state/a float32 (2,) 1f"], "rounds": {"train_loss": [0.5, None]}}
    assert list(golden.differences(facts, json.loads(json.dumps(facts)))) == []


def test_the_last_digit_of_one_number_is_found():
    before, after = {"rounds": {"train_loss": [0.5, 0.25]}}, {"rounds": {"train_loss": [0.5, 0.25 + 2**-54]}}
    assert list(golden.differences(before, after)) == ["rounds / train_loss / 1: was 0.25, is 0.25000000000000006"]


def test_columns_that_come_and_go_are_found_unless_they_are_named(monkeypatch: pytest.MonkeyPatch):
    before, after = {"num_lots": [2], "old": [1]}, {"num_workers": [2], "new": [1]}
    assert len(list(golden.differences(before, after))) == 4
    monkeypatch.setattr(golden, "RENAMED", {"num_lots": "num_workers"})
    monkeypatch.setattr(golden, "ADDED", {"new"})
    monkeypatch.setattr(golden, "GONE", {"old"})
    assert list(golden.differences(before, after)) == []
    assert list(golden.differences({"num_lots": [2]}, {"num_workers": [3]})) == ["num_workers / 0: was 2, is 3"]


def test_a_field_is_given_under_the_name_that_the_tree_has():
    assert golden._field("execution.workers", {"hosts", "threads"}) == "execution.hosts"
    assert golden._field("execution.workers", {"workers", "threads"}) == "execution.workers"
    assert golden._field("local.steps", set()) == "local.steps"


def test_rounds_are_counted_from_the_first():
    assert golden._from_first("round", [1, 1, 2]) == golden._from_first("round", [0, 0, 1]) == [0, 0, 1]
    assert golden._from_first("depth", [1, 2]) == [1, 2]


def test_a_recording_of_another_machine_is_refused(tmp_path: Path):
    recorded = {"machine": {**golden.machine(), "torch": "1.0"}, "commit": "abc", "cases": {}}
    (tmp_path / "golden.json").write_text(json.dumps(recorded))
    with pytest.raises(SystemExit, match="record it here with --at abc"):
        golden.check(tmp_path, {})
