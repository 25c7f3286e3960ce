"""micro-reasoning: right answers, disjoint sides, one seed one dataset."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from fleetune.data.micro_problems import MAX_VALUE, SKILLS, Problem, Step, draw_problem
from fleetune.data.micro_reasoning import CATEGORIES, micro_reasoning, pretraining_text
from fleetune.data.micro_wording import STYLES, question, solution
from fleetune.errors import UserError

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def numbers_of(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def test_a_problem_and_its_solutions_word_for_word():
    """4 boxes of 6 make 24; 10 are lost, 14 stay; half of them is 7."""
    problem = Problem(0, (Step("groups", 6, 4), Step("lose", 10), Step("part", 2)), (0, 24, 14, 7))
    text = question(Random(0), problem, wording="plain")
    assert re.fullmatch(
        r"Q: (\w+) has 4 boxes with 6 (\w+) in each\. \1 loses 10\. Then \1 keeps 1 of every 2\. "
        r"How many \2 does \1 have now\?\nA:",
        text,
    )
    assert solution(problem, style="equations") == "Groups: 4 * 6 = 24. Loss: 24 - 10 = 14. Part: 14 / 2 = 7. #### 7"
    assert solution(problem, style="terse") == "4 * 6 = 24; 24 - 10 = 14; 14 / 2 = 7; #### 7"
    assert solution(problem, style="words") == (
        "4 groups of 6 make 24. 24 without 10 leaves 14. 14 cut into 2 parts is 7. #### 7"
    )


def test_steps_by_hand():
    assert Step("gain", 7).apply(5) == 12
    assert Step("compare", -3).apply(5) == 2
    assert Step("rate", 4, 3).apply(5) == 17
    assert Step("double", 3).apply(5) == 15
    assert Step("share", 4).apply(12) == 3
    assert Step("share", 5).apply(12) is None


@pytest.mark.parametrize("style", STYLES)
def test_every_chain_holds_together(style):
    """Every equation is true, the last result is the answer, the reference says the same in other words."""
    examples = micro_reasoning(split="train", num_examples=400, style=style)
    for example in examples:
        chain, _, answer = example["response"].partition(" #### ")
        for left, sign, right, result in EQUATION.findall(chain):
            assert COMPUTE[sign](int(left), int(right)) == int(result)
        assert answer == example["answer"] == example["reference"].partition(" #### ")[2]
        assert numbers_of(chain)[-1] == int(answer) <= MAX_VALUE
        assert example["reference"] != example["response"]
        if "More" not in chain and "Fewer" not in chain and style == "equations":
            assert sorted(numbers_of(chain)) == sorted(numbers_of(example["reference"].partition(" ####")[0]))


def test_the_question_holds_the_numbers_of_the_chain():
    """What the chain starts from can be read in the question: its first number, unless it is in words."""
    for example in micro_reasoning(split="test", num_examples=400, skills=["gain", "lose", "groups"]):
        asked = set(numbers_of(example["prompt"]))
        assert set(numbers_of(example["response"])[:2]) <= asked


def test_train_and_test_share_no_problem():
    """Neither with other seeds nor in another wording: the sides differ in numbers, not in words."""

    def keys(split: str, **options) -> set[str]:
        return {e["response"] for e in micro_reasoning(split=split, num_examples=1500, **options)}

    plain = {"wording": "plain", "seed": 1}
    train = keys("train") | keys("train", **plain) | keys("train", num_steps=(1,))
    test = keys("test") | keys("test", **plain) | keys("test", num_steps=(1,))
    assert len(train) > 2500
    assert len(test) > 2000
    assert not train & test


def test_pretraining_never_sees_a_test_problem():
    train = {e["response"] for e in micro_reasoning(split="train", num_examples=1500, num_steps=(1,))}
    test = {e["response"] for e in micro_reasoning(split="test", num_examples=1500, num_steps=(1,))}
    seen = {e["response"] for e in islice(pretraining_text(seed=0, story_fraction=0.3, unsolved_fraction=0), 4000)}
    assert seen & train
    assert not seen & test


def test_what_pretraining_tells_of_stories():
    """Solved ones say "another 7" or "7 break", never "a thief takes 7", which is only read without a solution."""
    examples = list(islice(pretraining_text(seed=0, story_fraction=0.2, unsolved_fraction=0.1), 3000))
    solved = [e for e in examples if e["response"]]
    unsolved = [e for e in examples if not e["response"]]
    assert 0.07 < len(unsolved) / len(examples) < 0.13
    assert all(e["prompt"].endswith(("?", ".")) for e in unsolved)
    assert any("A thief takes" in e["prompt"] for e in unsolved)
    assert any("of them break" in e["prompt"] for e in solved)
    assert not any("A thief takes" in e["prompt"] for e in solved)


def test_common_turns_of_phrase_are_common():
    """Gains have four turns of phrase of weights 1, 1/2, 1/3, 1/4: shares 0.48, 0.24, 0.16, 0.12."""
    examples = micro_reasoning(split="train", num_examples=3000, skills=["gain"], num_steps=(1,))
    marks = ("brings another", "in the mail", "picks up", "sends")
    shares = [sum(mark in e["prompt"] for e in examples) / len(examples) for mark in marks]
    assert shares == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.03)


def test_about_an_eighth_of_all_problems_is_for_testing():
    random = Random(0)
    sides = [draw_problem(random, skill="lose", num_steps=2, split=s) for s in ("train", "test") for _ in range(5)]
    assert [p.split for p in sides] == ["train"] * 5 + ["test"] * 5
    pairs = [Problem(a, (Step("gain", b),), (a, a + b)) for a in range(3, 61) for b in range(2, 31)]
    assert 0.10 < sum(p.split == "test" for p in pairs) / len(pairs) < 0.15


def test_one_seed_one_dataset():
    first = micro_reasoning(split="train", num_examples=50, seed=3)
    assert first == micro_reasoning(split="train", num_examples=50, seed=3)
    assert first == micro_reasoning(split="train", num_examples=80, seed=3)[:50]
    assert first != micro_reasoning(split="train", num_examples=50, seed=4)
    mix = {"seed": 3, "story_fraction": 0.1, "unsolved_fraction": 0.1}
    assert list(islice(pretraining_text(**mix), 20)) == list(islice(pretraining_text(**mix), 20))


def test_every_category_comes_up_evenly():
    examples = micro_reasoning(split="train", num_examples=1600)
    counts = {c: sum(e["category"] == c for e in examples) for c in CATEGORIES}
    assert set(counts) == set(SKILLS)
    assert all(140 < n < 260 for n in counts.values())


def test_two_skills_in_one_problem():
    """A composition uses both: groups are made first, what is shared is shared last."""
    for example in micro_reasoning(split="test", num_examples=50, skills=["groups+share"]):
        steps = re.findall(r"[A-Z]\w+(?=:)", example["response"])
        assert (steps[0], steps[-1]) == ("Groups", "Share")
        assert example["category"] == "groups+share"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"skills": ["gian"]}, "did you mean 'gain'"),
        ({"skills": []}, "at least one skill"),
        ({"skills": ["share+compare"]}, "exclude one another"),
        ({"style": "word"}, "did you mean 'words'"),
        ({"wording": "tale"}, "no such wording"),
        ({"split": "dev"}, "no such split"),
    ],
)
def test_what_is_not_known_is_named(options, rule):
    with pytest.raises(UserError, match=rule):
        micro_reasoning(**{"split": "train", "num_examples": 1, **options})
