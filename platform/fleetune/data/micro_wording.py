"""The problems of micro-reasoning in words: two wordings of the question, three styles of the chain."""

from __future__ import annotations

from random import Random
from typing import Literal, TypeVar

from fleetune.data.micro_problems import Problem, Step
from fleetune.data.programs import MARK

Entry = TypeVar("Entry")
Turns = Literal["zipf", "evenly", "first"]

WORDINGS = ("story", "plain")
STYLES = ("equations", "words", "terse")

NAMES = (
    "Ann",
    "Ben",
    "Carla",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hanna",
    "Ivan",
    "Jill",
    "Karl",
    "Lea",
    "Mia",
    "Noah",
    "Olga",
    "Paul",
)
ITEMS = (
    "apples",
    "books",
    "cards",
    "coins",
    "eggs",
    "flowers",
    "keys",
    "lamps",
    "marbles",
    "nuts",
    "pens",
    "plates",
    "shells",
    "stamps",
    "toys",
    "tickets",
)

START = {
    "plain": ("{name} has {start} {items}.",),
    "story": (
        "There are {start} {items} in the bag of {name}.",
        "At first {name} counts {start} {items}.",
        "{start} {items} belong to {name}.",
    ),
}

# What a step says. {n} is the amount, {t} the number of groups or days; "skill:k" is for the amount k alone.
EVENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "plain": {
        "gain": ("{name} gets {n} more.",),
        "lose": ("{name} loses {n}.",),
        "groups": ("{name} has {t} boxes with {n} {items} in each.",),
        "double:2": ("Then {name} has 2 times as many.",),
        "double:3": ("Then {name} has 3 times as many.",),
        "part:2": ("Then {name} keeps 1 of every 2.",),
        "part:3": ("Then {name} keeps 1 of every 3.",),
        "rate": ("For {t} days {name} gets {n} a day.",),
        "rest": ("{name} fills boxes of {n} and keeps the rest.",),
        "whole": ("{name} fills boxes of {n} and counts the boxes.",),
        "share": ("{name} shares them with {n} friends. How many does each get?",),
        "compare:+": ("{other} has {n} more than {name}. How many does {other} have?",),
        "compare:-": ("{other} has {n} fewer than {name}. How many does {other} have?",),
    },
    "story": {
        "gain": (
            "{other} brings another {n}.",
            "A pack of {n} comes in the mail.",
            "{name} picks up {n} on the way home.",
            "The shop sends {n} along.",
        ),
        "lose": (
            "{n} of them break.",
            "{other} borrows {n}.",
            "A thief takes {n}.",
            "{name} sells {n} at the fair.",
        ),
        "groups": (
            "{name} fills {t} jars, {n} {items} to a jar.",
            "On {t} shelves of {name} stand {n} {items} apiece.",
            "{t} rows by {n} is how {name} lays out the {items}.",
        ),
        "double:2": ("Overnight the stock doubles.", "{other} adds the same number again."),
        "double:3": ("Overnight the stock triples.", "{other} adds the same number twice over."),
        "part:2": ("Half of it is thrown out.", "A fire spares only one half."),
        "part:3": ("A third of it remains.", "A fire spares only one third."),
        "rate": (
            "{t} aunts bring {n} each.",
            "Every week {n} are bought, {t} weeks in a row.",
            "It grows by {n} on each of {t} mornings.",
        ),
        "share": (
            "They are split evenly between {n} baskets. What does one basket hold?",
            "{n} children divide the lot. What is the part of a child?",
            "Packed into {n} equal bundles, what is the size of a bundle?",
        ),
        "compare:+": (
            "{other} beats {name} by {n}. What is the count of {other}?",
            "{name} is {n} short of {other}. What is the count of {other}?",
        ),
        "compare:-": (
            "{name} beats {other} by {n}. What is the count of {other}?",
            "{other} is {n} short of {name}. What is the count of {other}?",
        ),
    },
}

QUESTION = {
    "plain": ("How many {items} does {name} have now?",),
    "story": ("What number of {items} is left in the end?", "With what count does {name} end up?"),
}

# What one step of reasoning says in each style: {x} the value before, {y} after, {z} = {t} * {n}; {q}, {m}, {r} the whole groups
# of {n} in {x}, what is in them, and what is left over.
CHAINS: dict[str, dict[str, str]] = {
    "equations": {
        "gain": "Gain: {x} + {n} = {y}.",
        "lose": "Loss: {x} - {n} = {y}.",
        "groups": "Groups: {t} * {n} = {y}.",
        "share": "Share: {x} / {n} = {y}.",
        "double": "Times: {x} * {n} = {y}.",
        "part": "Part: {x} / {n} = {y}.",
        "compare:+": "More: {x} + {n} = {y}.",
        "compare:-": "Fewer: {x} - {n} = {y}.",
        "rate": "Days: {t} * {n} = {z}. Gain: {x} + {z} = {y}.",
        "rest": "Boxes: {q} * {n} = {m}. Rest: {x} - {m} = {y}.",
        "whole": "Boxes: {y} * {n} = {m}. Rest: {x} - {m} = {r}. Full: {y}.",
    },
    "words": {
        "gain": "{x} and {n} make {y}.",
        "lose": "{x} without {n} leaves {y}.",
        "groups": "{t} groups of {n} make {y}.",
        "share": "{x} shared by {n} is {y} each.",
        "double": "{x} taken {n} times is {y}.",
        "part": "{x} cut into {n} parts is {y}.",
        "compare:+": "{n} above {x} is {y}.",
        "compare:-": "{n} below {x} is {y}.",
        "rate": "{t} groups of {n} make {z}. {x} and {z} make {y}.",
        "rest": "{q} groups of {n} make {m}. {x} without {m} leaves {y}.",
        "whole": "{y} groups of {n} make {m}. {x} without {m} leaves {r}. {y} are full.",
    },
    "terse": {
        "gain": "{x} + {n} = {y};",
        "lose": "{x} - {n} = {y};",
        "groups": "{t} * {n} = {y};",
        "share": "{x} / {n} = {y};",
        "double": "{x} * {n} = {y};",
        "part": "{x} / {n} = {y};",
        "compare:+": "{x} + {n} = {y};",
        "compare:-": "{x} - {n} = {y};",
        "rate": "{t} * {n} = {z}; {x} + {z} = {y};",
        "rest": "{q} * {n} = {m}; {x} - {m} = {y};",
        "whole": "{y} * {n} = {m}; {x} - {m} = {r}; {y};",
    },
}


def question(random: Random, problem: Problem, *, wording: str, turns: Turns = "zipf") -> str:
    """The question in one wording, ``"Q: …\\nA:"``: names, things and turns of phrase are drawn.

    ``turns``: how often each of a step's turns of phrase comes up: the k-th with weight 1 / k (``zipf``, as words do
    in language), all ``evenly``, or ``first``, only the first.
    """
    name, other = random.sample(NAMES, 2)
    words = {"name": name, "other": other, "items": random.choice(ITEMS)}
    sentences = [random.choice(START[wording]).format(start=problem.start, **words)] if problem.start else []
    for step in problem.steps:
        turn = _draw_turn(random, _look_up(EVENTS[wording], step), turns)
        sentences.append(turn.format(n=abs(step.amount), t=step.times, **words))
    if problem.steps[-1].skill not in ("share", "compare"):
        sentences.append(random.choice(QUESTION[wording]).format(**words))
    return "Q: " + " ".join(sentences) + "\nA:"


def solution(problem: Problem, *, style: str) -> str:
    """The chain of reasoning in one style, and the answer after ``####`` (the convention of GSM8K)."""
    lines = []
    for step, x, y in zip(problem.steps, problem.values, problem.values[1:], strict=False):
        sentence = _look_up(CHAINS[style], step)
        n = abs(step.amount)
        lines.append(
            sentence.format(x=x, y=y, n=n, t=step.times, z=step.times * step.amount, q=x // n, m=x // n * n, r=x % n)
        )
    return " ".join([*lines, f"#### {problem.answer}"])


# How an expression goes on with a step: {e} is the expression before it.
OPERATIONS = {
    "gain": "{e} + {n}",
    "lose": "{e} - {n}",
    "groups": "{t} * {n}",
    "share": "{e} // {n}",
    "double": "{e} * {n}",
    "part": "{e} // {n}",
    "compare:+": "{e} + {n}",
    "compare:-": "{e} - {n}",
    "rate": "{e} + {t} * {n}",
    "rest": "{e} % {n}",
    "whole": "{e} // {n}",
}


def program(problem: Problem) -> str:
    """The solution as one expression after a mark (`programs.MARK`), its parts in parentheses, such as ``>>> (12 + 5) // 2``."""
    text = str(problem.start)
    for position, step in enumerate(problem.steps):
        before = f"({text})" if position and step.skill != "groups" else text
        text = _look_up(OPERATIONS, step).format(e=before, n=abs(step.amount), t=step.times)
    return f"{MARK} {text}"


def _draw_turn(random: Random, choices: tuple[str, ...], turns: Turns) -> str:
    if turns == "zipf":
        return random.choices(choices, [1 / k for k in range(1, len(choices) + 1)])[0]
    return random.choice(choices if turns == "evenly" else choices[:1])


def _look_up(table: dict[str, Entry], step: Step) -> Entry:
    """A step's entry: by skill, or by skill and amount (``double:2``) or sign (``compare:-``)."""
    sign = "+" if step.amount > 0 else "-"
    return table.get(step.skill) or table.get(f"{step.skill}:{step.amount}") or table[f"{step.skill}:{sign}"]
