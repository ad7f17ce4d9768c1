"""Whole-number arithmetic by a parser, with limits on length and nesting: nothing is ever executed."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_CHARS = 80
MAX_DIGITS = 18
MAX_DEPTH = 8


@dataclass(frozen=True)
class Operation:
    """One operator applied to two expressions."""

    operator: str
    left: int | Operation
    right: int | Operation


Expression = int | Operation

_TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*()]))")


class ArithmeticSyntaxError(ValueError):
    """The text is not an expression of whole numbers, `+`, `-`, `*` and parentheses, or it is too long."""


def parse(text: str) -> Expression:
    """Parse an expression; `*` binds before `+` and `-`, operators of one rank from the left.

    A sign belongs to the number that follows it, so "-3" is a number and "2--3" is 2 minus -3.
    Raises ArithmeticSyntaxError.
    """
    if len(text) > MAX_CHARS:
        raise ArithmeticSyntaxError("too long")
    parser = _Parser(_tokens(text.rstrip()))
    expression = parser.sum(0)
    if parser.tokens:
        raise ArithmeticSyntaxError("expected one expression")
    return expression


def evaluate(expression: Expression) -> int:
    """Compute an expression. Its size is bounded by what `parse` accepts."""
    if isinstance(expression, int):
        return expression
    left, right = evaluate(expression.left), evaluate(expression.right)
    return {"+": left + right, "-": left - right, "*": left * right}[expression.operator]


def _tokens(text: str) -> list[str]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ArithmeticSyntaxError("expected whole numbers and + - * ( )")
        if len(match[1] or "") > MAX_DIGITS:
            raise ArithmeticSyntaxError("too many digits")
        tokens.append(match[1] or match[2])
        at = match.end()
    return tokens[::-1]  # read from the end


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def sum(self, depth: int) -> Expression:
        left = self.product(depth)
        while self.tokens and self.tokens[-1] in "+-":
            left = Operation(self.tokens.pop(), left, self.product(depth))
        return left

    def product(self, depth: int) -> Expression:
        left = self.atom(depth)
        while self.tokens and self.tokens[-1] == "*":
            left = Operation(self.tokens.pop(), left, self.atom(depth))
        return left

    def atom(self, depth: int) -> Expression:
        token = self.tokens.pop() if self.tokens else ""
        if token.isdigit():
            return int(token)
        if token == "-" and self.tokens and self.tokens[-1].isdigit():
            return -int(self.tokens.pop())
        if token == "(" and depth < MAX_DEPTH:
            inner = self.sum(depth + 1)
            if self.tokens and self.tokens.pop() == ")":
                return inner
        raise ArithmeticSyntaxError("expected a number")
