"""The problems of micro-reasoning as numbers: steps, their results, and which side of the split each is on.

A problem is a start value and a chain of steps, each one exercising a *skill*. Every value lies in 1..99, so
that the arithmetic fits a model of a few million parameters. Words are a separate matter: ``micro_wording``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from fleetune.errors import UserError, unknown_name

SKILLS = ("gain", "lose", "groups", "share", "double", "part", "compare", "rate")
"""Add; subtract; n groups of m; divide evenly; two or three times as many; a half or a third; more or fewer
than another; n days of m each."""

REMAINDERS = ("rest", "whole")
"""Skills that the base model has not learnt: what is left over of groups of m, and how many whole groups there are."""

BASICS = ("gain", "lose")  # what surrounds the skill that a problem is about
FIRST, LAST = ("groups",), ("share", "compare")  # only as the first step, only as the last
MAX_VALUE = 99  # two digits
TEST_FRACTION = 1 / 8


@dataclass(frozen=True)
class Step:
    """One step: ``amount`` things are gained, lost, …; ``times`` days or groups of them (1 for other skills).

    ``share``, ``double`` and ``part`` divide or multiply by ``amount``; ``compare`` has a signed amount. ``rest`` and ``whole``
    are remainder and quotient of a division by ``amount``.
    """

    skill: str
    amount: int
    times: int = 1

    def apply(self, value: int) -> int | None:
        """The value after this step; None if it is not an integer."""
        if self.skill in ("gain", "compare"):
            return value + self.amount
        if self.skill == "lose":
            return value - self.amount
        if self.skill in ("groups", "rate"):
            return value + self.times * self.amount
        if self.skill == "double":
            return value * self.amount
        if self.skill == "rest":
            return value % self.amount
        if self.skill == "whole":
            return value // self.amount
        return value // self.amount if value % self.amount == 0 else None


@dataclass(frozen=True)
class Problem:
    """A start value (0 where groups come first) and steps; ``values`` holds the start and every result."""

    start: int
    steps: tuple[Step, ...]
    values: tuple[int, ...]

    @property
    def answer(self) -> int:
        """The value after the last step."""
        return self.values[-1]

    @property
    def split(self) -> str:
        """The side this problem is on, by a hash of its numbers and skills: no wording can move it across."""
        text = f"{self.start}|" + "|".join(f"{s.skill} {s.times} {s.amount}" for s in self.steps)
        bucket = hashlib.blake2b(text.encode(), digest_size=4).digest()
        return "test" if int.from_bytes(bucket, "little") < TEST_FRACTION * 2**32 else "train"


def parse_skill(name: str) -> tuple[str, ...]:
    """``"gain"``, or a composition ``"double+share"``, as a tuple. An unknown name raises UserError."""
    parts = tuple(name.split("+"))
    for part in parts:
        if part not in SKILLS:
            raise unknown_name("skill", part, SKILLS, field="skills")
    if any(len(set(parts) & set(place)) > 1 for place in (FIRST, LAST)) or len(set(parts)) < len(parts):
        raise UserError("these skills exclude one another in one problem", field="skills", value=name)
    return parts


def draw_problem(random: Random, *, skill: str, num_steps: int, split: str) -> Problem:
    """A random problem on the given side with the skill (or both of ``"a+b"``) among ``num_steps`` steps."""
    parts = parse_skill(skill)
    while True:
        chain = _draw_chain(random, parts, max(num_steps, len(parts)))
        problem = _draw_numbers(random, chain)
        if problem is not None and problem.split == split:
            return problem


def draw_any_problem(random: Random, *, skill: str, num_steps: int) -> Problem:
    """A random problem with the skill among ``num_steps`` steps, of either split."""
    while True:
        problem = _draw_numbers(random, _draw_chain(random, (skill,), num_steps))
        if problem is not None:
            return problem


def _draw_chain(random: Random, parts: Sequence[str], num_steps: int) -> list[str]:
    """The skills in order: the given ones in random order, basics between them."""
    middle = [p for p in parts if p not in FIRST + LAST]
    middle += [random.choice(BASICS) for _ in range(num_steps - len(parts))]
    random.shuffle(middle)
    return [p for p in parts if p in FIRST] + middle + [p for p in parts if p in LAST]


def _draw_numbers(random: Random, chain: list[str]) -> Problem | None:
    """Numbers for a chain; None if a value leaves 1..99 or a division has a remainder."""
    start = 0 if chain[0] in FIRST else random.randint(3, 60)
    values, steps = [start], []
    for skill in chain:
        step = _draw_step(random, skill, values[-1])
        value = step.apply(values[-1])
        if value is None or not 1 <= value <= MAX_VALUE:
            return None
        steps.append(step)
        values.append(value)
    return Problem(start, tuple(steps), tuple(values))


def _draw_step(random: Random, skill: str, value: int) -> Step:
    if skill in ("gain", "lose"):
        return Step(skill, random.randint(2, 30))
    if skill == "compare":
        return Step(skill, random.choice((-1, 1)) * random.randint(2, 30))
    if skill in ("double", "part"):
        return Step(skill, random.choice((2, 3)))
    if skill == "share":
        divisors = [n for n in range(2, 10) if value % n == 0 and 2 <= value // n <= 12]
        return Step(skill, random.choice(divisors) if divisors else 2)
    if skill in REMAINDERS:
        return Step(skill, random.randint(2, 9))
    return Step(skill, random.randint(2, 9), random.randint(2, 9))
