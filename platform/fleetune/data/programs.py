"""Programs as answers: expressions over integers, computed by walking their syntax tree. Nothing is ever executed.

A program has numbers, + - * // % and parentheses. What a model generated may be anything, so everything has a bound: the length
of the text, the depth and number of operations, and the size of every number on the way.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence

import numpy as np

MARK = ">>>"
"""Stands before a program in a response."""
PATTERN = rf"{MARK}[ \t]*([^\n]+)"
"""Where a response's program stands: the rest of the line after the mark."""
MAX_LENGTH, MAX_OPERATIONS, MAX_SIZE = 200, 50, 10**12

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ALLOWED = re.compile(r"[\d+\-*/%() ]+")


def value_of_program(text: str) -> int | None:
    """The number that a program gives; None if it is no program, divides by zero, or leaves a bound."""
    text = text.strip()
    if len(text) > MAX_LENGTH or _ALLOWED.fullmatch(text) is None or not text.isascii():
        return None
    try:
        tree = ast.parse(text, mode="eval")
        if sum(isinstance(node, (ast.BinOp, ast.UnaryOp)) for node in ast.walk(tree)) > MAX_OPERATIONS:
            return None
        return _value(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int:
    """The value of a node. Raises ValueError for what is no part of a program, and beyond the bound."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError("no part of a program")
    if abs(value) > MAX_SIZE:
        raise ValueError("too large")
    return value


def execution_match(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """True where the first program of a prediction gives the same number as the reference's, bool (n,)."""
    values = [[_first_value(text) for text in texts] for texts in (predictions, references)]
    return np.array([a is not None and a == b for a, b in zip(*values, strict=True)], dtype=bool)


def _first_value(text: str) -> int | None:
    found = re.search(PATTERN, text)
    return value_of_program(found[1]) if found else None
