"""Reads the tasks in what a model wrote. Nothing is lost: what is no task is a problem with a kind, to be counted."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_DIGITS = r"(?:[0-9０-９]{1,3}|[①-⑳]|[一二三四五六七八九十]{1,3}(?=[、．.]))"
_LABEL = r"(?:task|instruction|question|任务|指令|问题|题目)"
#: The number before an item, at the start of a line: "9.", "9)", "(9)", "９、", "**9.**", "### Task 9:", "⑨", "十、".
#: A decimal number such as 3.5 does not number an item.
_NUMBER = re.compile(
    rf"^[ \t>]*(?:\#+[ \t]*)?(?P<bold>\*\*|__)?[ \t]*(?:{_LABEL}[ \t]*)?[(（\[]?(?P<number>{_DIGITS})[ \t]*"
    r"(?:(?P=bold)[ \t]*)?(?:\.(?![0-9])|[)）\]、．:：]|(?<=[①-⑳]))[ \t]*(?(bold)(?:(?P=bold))?[ \t]*)",
    re.MULTILINE | re.IGNORECASE,
)
#: The same within a line, behind a sentence; it only counts if it is the next number.
_INLINE = re.compile(rf"(?<=[。．.!！?？;；])[ \t]*[(（]?(?P<number>{_DIGITS})(?:\.(?![0-9])|[)）、．])[ \t]*")
_BULLET = re.compile(r"^[ \t]*[-*•·][ \t]+", re.MULTILINE)
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
#: Tokens that chat templates write: <|im_end|>, <s>, </s>, [INST], <<SYS>>, <start_of_turn>, <｜User｜>.
_TEMPLATE_TOKEN = re.compile(
    r"<[|｜][^\n<>]{1,40}[|｜]>|</?s>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
_ANSWER = re.compile(
    r"(?:^|\n)[ \t>*_#]*(?:answer|output|response|solution|assistant|答案|回答|输出|解答|参考答案)[ \t*_]*[:：]",
    re.IGNORECASE,
)
#: How answers begin, and tasks don't.
_SPOKEN = re.compile(
    r"(?:i['’]?m |i am )?(?:very |so )?sorry[,.!]|(?:i['’]?m|i am) sorry\b|i (?:cannot|can['’]t|am unable)\b|"
    r"as an? (?:ai|large language|language)\b|(?:sure|certainly|of course)[,!.:]|"
    r"(?:很)?抱歉|对不起[，,]|作为(?:一个|一名|一款)?(?:人工智能|大?语言模型|ai)|好的[，,！!。]",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"\A[ \t#*_]*(?:(?:new |rewritten |evolved )?(?:task|instruction|question|prompt)"
    r"|(?:新|改写后的|改编后的)?(?:任务|指令|问题))"
    r"[ \t#*_]*[:：][ \t*_]*",
    re.IGNORECASE,
)
#: A line that announces the one task that follows.
_ANNOUNCED = re.compile(
    r"\A\s*(?:sure|certainly|of course|好的)?[,!.，！。 ]*(?:here(?: is|'s|’s)|以下是|下面是|这是)[^\n:：]{0,60}?"
    r"(?:task|instruction|question|prompt|任务|指令|问题)[^\n:：]{0,40}[:：][ \t]*\n+",
    re.IGNORECASE,
)
_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("'", "'"), ("**", "**"))


@dataclass(frozen=True)
class Piece:
    """A part of a reply.

    Attributes:
        source: The part as the model wrote it. The sources of all pieces, joined, are the reply.
        text: The task in it, without number and markup; empty if there is none.
        problem: The kind of what is wrong; None for a task.
    """

    source: str
    text: str = ""
    problem: str | None = None


def parse_list(reply: str, first: int | None = None, cut: bool = False, examples: Sequence[str] = ()) -> list[Piece]:
    """Splits a reply into the items of its list.

    Numbers may be out of order, and several items may share a line if their numbers follow each other. If no line has a
    number, bullets count instead. An item may have several lines; what follows an empty line after the last item is not
    part of it.

    Args:
        reply: What the model wrote.
        first: The number before the reply, if the prompt wrote one: the reply then begins within that item.
        cut: Whether the length limit ended the reply, so that its last item is not whole.
        examples: The tasks that the prompt showed.

    Returns:
        Items and problems, in order. The kinds of problems are ``empty``, ``no list``, ``text before the list``, ``text
        after the list``, ``empty item``, ``cut``, ``template tokens``, ``an answer``, ``holds an answer``, ``repeats
        an example`` and ``repeats itself``.
    """
    if not reply.strip():
        return [Piece(reply, problem="empty")]
    starts = _starts(reply, first)
    if not starts:
        return [Piece(reply, problem="no list")]
    pieces: list[Piece] = []
    if reply[: starts[0][0]].strip():
        pieces.append(Piece(reply[: starts[0][0]], problem="text before the list"))
    else:
        starts[0] = (0, starts[0][1])
    shown, seen = {same(example) for example in examples}, set[str]()
    ends = [begin for begin, _ in starts[1:]] + [_end_of_last(reply, starts[-1][1])]
    for (begin, inner), end in zip(starts, ends, strict=True):
        half = cut and end == len(reply)
        text, problem = _task(reply[inner:end])
        if half:
            problem = "cut"
        elif not text:
            problem = "empty item"
        elif not problem and same(text) in shown:
            problem = "repeats an example"
        elif not problem and same(text) in seen:
            problem = "repeats itself"
        seen.add(same(text))
        pieces.append(Piece(reply[begin:end], "" if problem else text, problem))
    if ends[-1] < len(reply):
        pieces.append(Piece(reply[ends[-1] :], problem="text after the list"))
    return pieces


def parse_one(reply: str, cut: bool = False, shown: Sequence[str] = ()) -> list[Piece]:
    """Reads a reply that should be one task.

    Args:
        reply: What the model wrote.
        cut: Whether the length limit ended it.
        shown: The tasks that the prompt showed.

    Returns:
        One piece, without a line that announces the task. Its problem is one of those of
        :func:`parse_list`, or ``a list`` for several numbered items.
    """
    text, problem = _task(_ANNOUNCED.sub("", reply))
    if not reply.strip():
        problem = "empty"
    elif cut:
        problem = "cut"
    elif not text:
        problem = "empty item"
    elif not problem and len(_numbered(reply)) > 1:
        problem = "a list"
    elif not problem and same(text) in {same(example) for example in shown}:
        problem = "repeats an example"
    return [Piece(reply, "" if problem else text, problem)]


def same(text: str) -> str:
    """Returns a key that is equal for texts that differ only in case, width, spaces and punctuation.

    Example:
        >>> same("What is  rust？") == same("what is rust")
        True
    """
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def _starts(reply: str, first: int | None) -> list[tuple[int, int]]:
    """Where each item begins, with its number and without."""
    found = _numbered(reply, first)
    if first is not None:
        head = reply[: found[0][0]] if found else reply
        return [(0, 0), *found] if head.strip() or not found else found
    return found or [match.span() for match in _BULLET.finditer(reply)]


def _numbered(reply: str, first: int | None = None) -> list[tuple[int, int]]:
    """Where items with numbers begin: at the start of a line, or within one if the number is the next."""
    lines = {match.start(): match for match in _NUMBER.finditer(reply)}
    inline = {match.start(): match for match in _INLINE.finditer(reply)}
    spans: list[tuple[int, int]] = []
    previous = first
    for start in sorted(lines.keys() | inline.keys()):
        match = lines.get(start) or inline[start]
        if spans and start < spans[-1][1]:
            continue
        number = _value(match["number"])
        if start in lines or (previous is not None and number == previous + 1):
            spans.append((start, match.end()))
            previous = number
    return spans


def _end_of_last(reply: str, inner: int) -> int:
    """Where the last item ends: at the first empty line after its text, if more text follows that."""
    begin = inner + len(reply[inner:]) - len(reply[inner:].lstrip())
    blank = _BLANK_LINE.search(reply, begin)
    return blank.start() if blank and reply[blank.end() :].strip() else len(reply)


def _task(source: str) -> tuple[str, str | None]:
    """The task in the text of an item, and its problem."""
    text = _HEADING.sub("", source.strip()).strip()
    for opening, closing in _QUOTES:
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and inner and not {opening, closing} & {*inner}:
            text = inner.strip()
    if _TEMPLATE_TOKEN.search(text):
        return text, "template tokens"
    if _SPOKEN.match(text):
        return text, "an answer"
    return (text, "holds an answer") if _ANSWER.search(text) else (text if same(text) else "", None)


def _value(digits: str) -> int:
    """A number in any of the digits that lists have."""
    numerals = "一二三四五六七八九"
    if not set(digits) <= {*numerals, "十"}:
        return int(unicodedata.normalize("NFKC", digits))
    tens, ten, ones = digits.rpartition("十")
    value = numerals.find(ones[-1:]) + 1 if ones else 0
    return value + (10 * (numerals.find(tens[-1:]) + 1 if tens else 1) if ten else 0)
