"""Filter expressions over a sample's json: `width >= 256 and pwatermark < 0.5`; data, never code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ldm.words import near

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "len": len, "abs": abs, "lower": str.lower}


_ODD = (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError)
"""What fields of strangers make of an expression: it is false."""


def compile_filter(expression: str) -> Callable[[Mapping[str, Any]], bool]:
    """A predicate over json fields. A field that is absent or null makes its comparison false.

    Allowed: names, numbers, strings, lists, + - * /, comparisons, in, and, or, not, min, max, len, abs, lower.
    Raises ValueError naming what is not.
    """
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"filter {expression!r}: {error.msg}") from error
    _check(tree, expression)

    def keep(fields: Mapping[str, Any]) -> bool:
        try:
            return bool(_value(tree, fields))
        except _ODD:
            return False

    return keep


def names(expression: str) -> set[str]:
    """The fields that a filter looks at."""
    tree = ast.parse(expression, mode="eval").body
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}


def absent(expression: str, seen: Collection[str]) -> list[str]:
    """The fields of a filter that no sample had, each with the nearest of those that were `seen`."""
    return [f"{name!r}{near(name, seen)}" for name in sorted(names(expression) - set(seen))]


def _check(node: ast.AST, expression: str) -> None:
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
            raise ValueError(f"filter {expression!r}: only {sorted(_FUNCTIONS)} may be called")
        parts: list[ast.AST] = list(node.args)
    elif isinstance(node, ast.Constant):
        if not isinstance(node.value, (int, float, str, bool, type(None))):
            raise ValueError(f"filter {expression!r}: constant {node.value!r} is not allowed")
        return
    elif isinstance(node, (ast.Name, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.List, ast.Tuple)):
        operators = [n for n in ast.walk(node) if isinstance(n, (ast.operator, ast.cmpop, ast.unaryop))]
        for op in operators:
            if type(op) not in (*_COMPARE, *_ARITHMETIC, ast.Not, ast.USub):
                raise ValueError(f"filter {expression!r}: operator {type(op).__name__} is not allowed")
        kinds = (ast.expr_context, ast.operator, ast.cmpop, ast.unaryop, ast.boolop)
        parts = [n for n in ast.iter_child_nodes(node) if not isinstance(n, kinds)]
    else:
        raise ValueError(f"filter {expression!r}: {type(node).__name__} is not allowed")
    for part in parts:
        _check(part, expression)


def _value(node: ast.AST, fields: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return fields.get(node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(n, fields) for n in node.elts]
    if isinstance(node, ast.BoolOp):
        results = (_true(n, fields) for n in node.values)
        return all(results) if isinstance(node.op, ast.And) else any(results)
    if isinstance(node, ast.UnaryOp):
        return not _true(node.operand, fields) if isinstance(node.op, ast.Not) else -_value(node.operand, fields)
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_value(node.left, fields), _value(node.right, fields))
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return _FUNCTIONS[node.func.id](*[_value(n, fields) for n in node.args])
    assert isinstance(node, ast.Compare)
    left = _value(node.left, fields)
    for op, right_node in zip(node.ops, node.comparators, strict=True):
        right = _value(right_node, fields)
        if not _COMPARE[type(op)](left, right):
            return False
        left = right
    return True


def _true(node: ast.AST, fields: Mapping[str, Any]) -> bool:
    """Truth of a part of and, or, not: what cannot be compared is false on its own."""
    try:
        return bool(_value(node, fields))
    except _ODD:
        return False
