"""Arithmetic formulas in presets, such as "r * (m + n) + m * n / tau", evaluated
without executing other code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from lowrank_comm.errors import ConfigError

_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}


def evaluate(formula: str, values: Mapping[str, int]) -> Fraction:
    """Return the exact value of a formula: whole numbers, names, + - * / //, min, max.

    Args:
        formula: what is evaluated.
        values: name -> number.

    Raises:
        ConfigError: it is no such formula, or a name has no value.

    Example:
        >>> evaluate("r * (m + n) + m * n / tau", {"m": 6, "n": 4, "r": 1, "tau": 12})
        Fraction(12, 1)
    """

    def value_of(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.Name) and node.id in values:
            return Fraction(values[node.id])
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return Fraction(_OPERATIONS[type(node.op)](value_of(node.left), value_of(node.right)))
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _FUNCTIONS
            and node.args
        ):
            return _FUNCTIONS[node.func.id](*map(value_of, node.args))  # type: ignore[no-any-return]
        raise ConfigError(
            f"formula {formula!r}: {ast.unparse(node)!r} is not possible; use whole numbers,"
            f" {', '.join(values)}, + - * / //, min and max."
        )

    try:
        tree = ast.parse(formula, mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"formula {formula!r} is no formula: {error.msg}.") from None
    return value_of(tree.body)
