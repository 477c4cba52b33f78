"""A calculator: the policy writes an expression, reads its value, and answers."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Any

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import Message
from lightning_rlhf.rollout.environment import Environment, Turn

_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FINITE = Range(above=True, below=True)
_EXPRESSION = re.compile(r"[(\- ]*\d[\d .()+\-*/]*")
_CALCULATES = re.compile(r"\d[ )]*[+\-*/][ (\-]*\d")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
#: How it is used, with an example: small models follow it better than instructions.
_SHOWN = (
    ("system", "Write an expression. The calculator replies with its value. Then answer."),
    ("user", "How many eggs are in 5 boxes of 12?"),
    ("assistant", "12 * 5"),
    ("user", "60"),
    ("assistant", "60 eggs"),
)


class Calculator(Environment):
    """A calculator, which the policy uses once: it writes an expression, reads the value, and answers.

    The reward is 1 if the last number of the answer is the row's ``answer``, otherwise 0; to which ``tool_reward`` is
    added if the expression could be calculated.

    Args:
        shown: Begin with instructions and an example; otherwise with the row's messages alone.
        tool_reward: Reward for an expression that has a value. A larger value leads a model sooner that can't use the
            calculator yet.

    Raises:
        ValueError: A row has no number in its column ``answer``.
    """

    def __init__(self, shown: bool = True, tool_reward: float = 0.0) -> None:
        check_arguments(Calculator.__init__, locals(), tool_reward=_FINITE)
        self.shown, self.tool_reward = shown, tool_reward

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Asks the row's question."""
        self.answer, self.used = _read_answer(row.get("answer")), False
        messages: list[Message] = row["messages"]
        return [*(Message(role=role, content=text) for role, text in _SHOWN), *messages] if self.shown else messages

    def step(self, messages: Sequence[Message], text: str) -> Turn:
        """Calculates the first turn; the second is the answer."""
        if self.used:
            return Turn(reward=float(last_number(text) == self.answer), done=True)
        self.used = True
        try:
            value, reward = show_number(evaluate(text)), self.tool_reward
        except ValueError as error:
            value, reward = f"Error: {error}", 0.0
        return Turn([Message(role="user", content=value)], reward)


def evaluate(text: str) -> Fraction:
    """The value of the first expression in a text: numbers, ``+ - * / × ÷ x`` and parentheses, exactly.

    Raises:
        ValueError: There is none, or it is too long, or divides by 0.

    Example:
        >>> evaluate("12 * (3 + 4)"), evaluate("I calculate 1,000 ÷ 3.")
        (Fraction(84, 1), Fraction(1000, 3))
    """
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text).replace("×", "*").replace("÷", "/")
    plain = re.sub(r"(?<=[\d)]) ?[xX] ?(?=[\d(])", "*", plain)
    found = (match.group().strip(" .") for match in _EXPRESSION.finditer(plain))
    expression = next(filter(_CALCULATES.search, found), None)
    if expression is None:
        raise ValueError("there is no expression, such as 3 * (4 + 5)")
    if len(expression) > 200:
        raise ValueError("the expression is too long")
    try:
        return _value(ast.parse(expression, mode="eval").body, expression)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{expression} is no expression") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None


def _value(node: ast.AST, source: str) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(ast.get_source_segment(source, node)))  # as it is written: a float has 17 digits
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left, source), _value(node.right, source))
    raise ValueError("only numbers, + - * / and parentheses can be calculated")


def show_number(value: Fraction) -> str:
    """A number as people write it: whole, or with at most 4 decimals."""
    if value.denominator == 1:
        return str(value.numerator)
    whole, part = divmod(abs(round(value * 10_000)), 10_000)
    shown = f"{whole}.{part:04d}".rstrip("0").rstrip(".")
    return f"-{shown}" if value < 0 and shown != "0" else shown


def _read_answer(given: object) -> Fraction:
    """The number of a row: itself, or the last one of a text."""
    answer = last_number(given) if isinstance(given, str) else None
    if isinstance(given, Real) and not isinstance(given, bool) and math.isfinite(given):
        answer = Fraction(str(given))  # 1e+20 is one number, and 0.1 a tenth
    if answer is None:
        raise ValueError(f"the column 'answer' is {given!r}. Give the number that is right")
    return answer


def last_number(text: str) -> Fraction | None:
    """The last number in a text, if any; None too where it has more digits than Python reads, which are 4300."""
    found = _NUMBER.findall(text)
    try:
        return Fraction(found[-1].replace(",", "")) if found else None
    except ValueError:
        return None
