"""Skills of micro-reasoning that adapters learn one by one, and tasks that need two of them at once.

The base model knows none of the three. They stand for the skills that adapter-reuse papers compose (a language, mathematics,
code; Wu et al. 2025, "SmartFed", arXiv 2512.00902, table 4):

        notation      the question's numbers are written in other signs, one for each digit
        arithmetic    the question asks for whole groups and what is left over of them
        program       the answer is an expression, which is computed; a chain of steps with the right result does not count

Problems are those of the default task, plainly worded. No computation is both in training and in test, nor both in a single
skill's problems and in those of a task of several: its expression decides, whatever words it is put in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Literal

from fleetune.data.micro_problems import REMAINDERS, SKILLS, Problem, draw_any_problem
from fleetune.data.micro_reasoning import Example
from fleetune.data.micro_wording import program, question, solution
from fleetune.seeds import seed_of

COMPOSABLE = ("notation", "arithmetic", "program")
"""The skills that an adapter can learn and a task can ask for."""

TEST_FRACTION = 1 / 4
"""Of expressions. A test problem is on the test side of the default task, too, which pretraining has not seen."""

SIGNS = str.maketrans("0123456789", "~!@$^&_|<>")
"""The sign of each digit: none of them stands in a question or in an answer otherwise."""


def composition_task(
    skills: Sequence[str], *, split: Literal["train", "test"], num_examples: int, seed: int = 0
) -> list[Example]:
    """``num_examples`` problems of one side that need all of ``skills``, from `COMPOSABLE`, in any order."""
    name = "+".join(skill for skill in COMPOSABLE if skill in skills)
    random = Random(seed_of(seed, f"micro-reasoning/{name}/{split}"))
    return [_example(random, skills, name, split) for _ in range(num_examples)]


def _example(random: Random, skills: Sequence[str], name: str, split: str) -> Example:
    while True:
        category = random.choice(REMAINDERS if "arithmetic" in skills else SKILLS)
        problem = draw_any_problem(random, skill=category, num_steps=random.choice((2, 3)))
        if problem.split == split and _side(problem) == (split, len(skills) == 1):
            break
    prompt = question(random, problem, wording="plain")
    is_program = "program" in skills
    return Example(
        prompt=prompt.translate(SIGNS) if "notation" in skills else prompt,
        response=program(problem) if is_program else solution(problem, style="equations"),
        reference=solution(problem, style="equations" if is_program else "words"),
        answer=str(problem.answer),
        category=category,
        skill=name,
        style="program" if is_program else "equations",
    )


def _side(problem: Problem) -> tuple[str, bool]:
    """The split of a problem's expression, and whether it is among those of single skills, which are one half of each split."""
    digest = hashlib.blake2b(program(problem).encode(), digest_size=8).digest()
    split = "test" if int.from_bytes(digest[:4], "little") < TEST_FRACTION * 2**32 else "train"
    return split, bool(digest[4] % 2)
