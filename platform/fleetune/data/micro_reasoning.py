"""micro-reasoning: generated word problems with a chain of reasoning and an answer, in several skills.

The default task words its questions as stories, which the base model ``micro-llama`` has hardly seen in
pretraining; it knows the same skills from plainly worded questions. What is generated depends on the
arguments alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Literal, TypedDict

from fleetune.data.micro_problems import SKILLS, draw_problem, parse_skill
from fleetune.data.micro_wording import STYLES, WORDINGS, Turns, question, solution
from fleetune.errors import UserError, unknown_name
from fleetune.seeds import seed_of

CATEGORIES = SKILLS
"""The categories of the default task: the skill that a problem is about."""

REFERENCE_STYLE = {"equations": "words", "words": "equations", "terse": "words"}


class Example(TypedDict):
    """``prompt + " " + response`` is the text to learn, ``reference`` the same solution in other words."""

    prompt: str
    response: str
    reference: str
    answer: str
    category: str
    skill: str
    style: str


def micro_reasoning(
    *,
    split: Literal["train", "test"],
    num_examples: int,
    seed: int = 0,
    skills: Sequence[str] | None = None,
    style: str = "default",
    wording: str = "story",
    num_steps: Sequence[int] = (2, 3),
) -> list[Example]:
    """``num_examples`` problems of one side; train and test share none, whatever the seed, wording or style.

    ``skills``: from ``SKILLS``, or compositions such as ``"double+share"``; all of ``SKILLS`` by default.
    ``style``: the wording of the chain, from ``STYLES`` (``default`` is ``equations``). ``wording``: of the
    question, ``story`` or ``plain``. ``num_steps``: lengths of the chain, drawn evenly; a composition has at
    least its own.
    """
    style = "equations" if style == "default" else style
    if style not in STYLES:
        raise unknown_name("style", style, [*STYLES, "default"], field="style")
    if wording not in WORDINGS:
        raise unknown_name("wording", wording, WORDINGS, field="wording")
    if split not in ("train", "test"):
        raise unknown_name("split", split, ["train", "test"], field="split")
    if not skills and skills is not None:
        raise UserError("at least one skill is needed", field="skills", hint=f"known: {', '.join(SKILLS)}")
    chosen = tuple(skills or SKILLS)
    for name in chosen:
        parse_skill(name)
    random = Random(seed_of(seed, f"micro-reasoning/{split}"))
    return [
        _example(random, split, random.choice(chosen), style, wording, random.choice(num_steps))
        for _ in range(num_examples)
    ]


def _example(
    random: Random,
    split: str,
    skill: str,
    style: str,
    wording: str,
    num_steps: int,
    turns: Turns = "zipf",
) -> Example:
    problem = draw_problem(random, skill=skill, num_steps=num_steps, split=split)
    return Example(
        prompt=question(random, problem, wording=wording, turns=turns),
        response=solution(problem, style=style),
        reference=solution(problem, style=REFERENCE_STYLE[style]),
        answer=str(problem.answer),
        category=skill,
        skill=skill,
        style=style,
    )


def pretraining_text(*, seed: int, story_fraction: float, unsolved_fraction: float) -> Iterator[Example]:
    """Train-side problems for the base model without end: plain questions of one to three steps, half terse.

    A fraction ``story_fraction`` are stories with only the first turn of phrase of each kind of step. A
    fraction ``unsolved_fraction`` are stories in every turn of phrase, without a solution: the base model reads
    the words, what they do to the numbers is left to fine-tuning. Such a prompt ends with the question; its
    response is empty.
    """
    random = Random(seed_of(seed, "micro-reasoning/pretraining"))
    while True:
        kind = random.random()
        skill, num_steps = random.choice(SKILLS), random.choice((1, 2, 2, 3))
        style = random.choice(("terse", "terse", "equations", "words"))
        if kind < story_fraction:
            yield _example(random, "train", skill, style, "story", num_steps, turns="first")
        elif kind < story_fraction + unsolved_fraction:
            example = _example(random, "train", skill, style, "story", num_steps, turns="evenly")
            example["prompt"], example["response"] = example["prompt"].removesuffix("\nA:"), ""
            yield example
        else:
            yield _example(random, "train", skill, style, "plain", num_steps, turns="first")
