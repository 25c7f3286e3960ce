"""Skills and the tasks that need several: right answers, no problem shared, programs computed and never executed."""

from __future__ import annotations

import hashlib
import json

import pytest

from fleetune.data.config import DataConfig
from fleetune.data.micro_problems import Problem, Step
from fleetune.data.micro_reasoning import micro_reasoning
from fleetune.data.micro_skills import SIGNS, composition_task
from fleetune.data.micro_wording import program, solution
from fleetune.data.programs import execution_match, value_of_program

TASKS = [
    ("notation",),
    ("arithmetic",),
    ("program",),
    ("notation", "arithmetic"),
    ("notation", "program"),
    ("arithmetic", "program"),
]


def test_a_problem_as_a_chain_and_as_a_program_word_for_word():
    """17 in boxes of 5: 3 boxes hold 15 and 2 are left over; 2 and 4 make 6."""
    rest = Problem(17, (Step("rest", 5), Step("gain", 4)), (17, 2, 6))
    assert solution(rest, style="equations") == "Boxes: 3 * 5 = 15. Rest: 17 - 15 = 2. Gain: 2 + 4 = 6. #### 6"
    assert program(rest) == ">>> (17 % 5) + 4"
    whole = Problem(0, (Step("groups", 6, 4), Step("whole", 5)), (0, 24, 4))
    assert solution(whole, style="terse") == "4 * 6 = 24; 4 * 5 = 20; 24 - 20 = 4; 4; #### 4"
    assert program(whole) == ">>> (4 * 6) // 5"
    assert "Ann has 140 of 5.".translate(SIGNS) == "Ann has !^~ of &."


@pytest.mark.parametrize("skills", TASKS, ids="+".join)
def test_every_answer_is_right_and_sides_share_no_problem(skills: tuple[str, ...]):
    train, test = (composition_task(skills, split=split, num_examples=60) for split in ("train", "test"))
    for example in [*train, *test]:
        mark = ">>> " if "program" in skills else "#### "
        assert str(value_of_program(example["response"].rpartition(mark)[2])) == example["answer"]
        assert any(sign in example["prompt"] for sign in "0123456789") != ("notation" in skills)
    assert not {e["response"] for e in train} & {e["response"] for e in test}
    assert composition_task(tuple(reversed(skills)), split="test", num_examples=60) == test


def test_a_skill_s_problems_are_never_a_task_s():
    """By their numbers, whatever names and things stand in the prompt: the chain with its numbers is the problem."""
    chains = {
        skills: {e["response"] for e in composition_task(skills, split="train", num_examples=400)}
        for skills in (("arithmetic",), ("notation", "arithmetic"), ("program",), ("notation", "program"))
    }
    assert not chains["arithmetic",] & chains["notation", "arithmetic"]
    assert not chains["program",] & chains["notation", "program"]


def test_the_default_task_keeps_its_texts():
    """A digest of 500 examples, taken before there were skills to compose."""
    rows = json.dumps(micro_reasoning(split="train", num_examples=500)).encode()
    assert hashlib.sha256(rows).hexdigest()[:16] == "0b89deb397cf6f51"


PROGRAMS = {
    "1 + 2 * 3": 7,
    "((12 + 5) - 3) // 4": 3,
    "-7 % 3": 2,
    " 17 % 5 ": 2,
    "2 ** 9": None,
    "7 / 2": None,
    "7 // 0": None,
    "9 % 0": None,
    "1 +": None,
    "": None,
    "(" * 100 + "1" + ")" * 100: None,
    "9" * 13: None,
    "999999999 * 999999999": None,
    "1" + " + 1" * 51: None,
    "1" + " + 1" * 40: 41,
    "__import__('os')": None,
    "1 if 2 else 3": None,
    "1_0": None,
    "0x10": None,
    "1.5": None,
    "(1, 2)": None,
    "٣ + 1": None,
    "5 (3)": None,
    "1\n+ 2": None,
}


@pytest.mark.parametrize("text", PROGRAMS)
def test_programs_are_computed_within_bounds(text: str):
    assert value_of_program(text) == PROGRAMS[text]


def test_a_chain_with_the_right_result_is_no_program():
    references = [">>> (17 % 5) + 4"] * 5
    predictions = [">>> 2 + 4", " >>> 17 - 11", "Rest: 17 - 15 = 2. #### 6", ">>> 6 6", ">>> 1 / 0\n>>> 6"]
    assert execution_match(predictions, references).tolist() == [True, True, False, False, False]


def test_skills_belong_to_the_generated_task_and_score_programs_by_value():
    assert not DataConfig(skills=["notation", "arithmetic"]).is_executed
    assert DataConfig(skills=["program", "notation"]).is_executed
    assert not DataConfig(skills=["program"], scored_by="text").is_executed
    assert DataConfig(dataset="mine.jsonl", scored_by="execution").is_executed
    for wrong, rule in (
        ({"skills": ["notation"], "dataset": "mine.jsonl"}, "are those of micro-reasoning"),
        ({"skills": ["notation", "notation"]}, "names a skill twice"),
        ({"skills": ["spelling"]}, "Input should be 'notation', 'arithmetic' or 'program'"),
    ):
        with pytest.raises(ValueError, match=rule):
            DataConfig(**wrong)
