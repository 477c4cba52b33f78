"""An inspection as text: with colors for a terminal, or with lines of marks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_rlhf.inspection.pieces import TokenPiece, visible
from lightning_rlhf.inspection.rows import Inspection, RowView
from lightning_rlhf.inspection.statistics import Bar, Statistics
from lightning_rlhf.utils.text import shorten

_BAR = 30
_LONGEST = 200
"""Maximum number of characters to show of a column's value."""


def as_text(found: Inspection, width: int = 100, color: bool = False) -> str:
    """The inspection as text.

    Args:
        found: The inspection.
        width: Width of the terminal in columns.
        color: Mark tokens by color. Otherwise a line of marks is below them: ``^~~`` for a token that the loss reads,
            ``.`` for the start of another token.
    """
    lines = [_bold(found.title, color), ""]
    legend = ["⏎ ⇥ line break, tab"]
    if color:
        legend.append(f"{_paint('<special>', TokenPiece('', (), 0, False, True), 0)} special")
    else:
        legend.append(". start of a token")
    if found.legend:
        shown = "".join(_paint(text, TokenPiece("", (), 0, True, False), i) for i, text in enumerate(("to", "ken")))
        legend.append(f"{shown if color else '^~~'} {found.legend}")
    lines += ["   ".join(legend), ""]
    for section in found.sections:
        if section.name:
            lines += [_bold(f"== {section.name} ==", color), ""]
        for row in section.rows:
            lines += [*_row(row, width, color), ""]
        lines += [*_statistics(section.statistics, color), ""]
    return "\n".join(line.rstrip() for line in lines)


def _row(row: RowView, width: int, color: bool) -> Iterator[str]:
    yield _bold(f"row {row.number} · {row.where}", color) + "".join(f" · {note}" for note in row.notes)
    yield f"prompt · {_tokens(row.prompt)}"
    yield from _lines(row.prompt, "│ " if row.answers or row.starts else "  ", width, color)
    if row.starts:
        yield f"└─▶ {row.starts}"
    for answer in row.answers:
        last = answer is row.answers[-1]
        notes = "".join(f" · {note}" for note in answer.notes)
        yield f"{'└' if last else '├'}─ {answer.name} · {_tokens(answer.pieces)}{notes}"
        yield from _lines(answer.pieces, "  " if last else "│ ", width, color)
    for name, value in row.columns.items():
        yield f"column {name}: {column_text(value)}"


def column_text(value: Any) -> str:
    """A column's value as JSON, or the beginning of it."""
    text = json.dumps(value, ensure_ascii=False)
    return shorten("".join(character for character, _ in visible(text)), _LONGEST, count=True)


def _tokens(shown: Sequence[TokenPiece]) -> str:
    count = sum(len(piece.ids) for piece in shown)
    return f"{count} token{'' if count == 1 else 's'}"


def _lines(shown: Sequence[TokenPiece], rail: str, width: int, color: bool) -> Iterator[str]:
    """Pieces in lines, each with the position of its first token; without colors, with a line of marks below."""
    room = max(20, width - len(rail) - 8)
    text, marks, used, position = "", "", 0, None

    def flush() -> Iterator[str]:
        nonlocal text, marks, used, position
        yield f"{rail}{'' if position is None else position:>5} │{text}"
        if marks.strip():
            yield f"{rail}      │{marks}"
        text, marks, used, position = "", "", 0, None

    for number, piece in enumerate(shown):
        glyphs = list(visible(piece.text)) or [("∅", 1)]  # a token may have no text
        whole = sum(columns for _, columns in glyphs)
        run = ""  # the part of this piece in the line
        for i, (glyph, columns) in enumerate(glyphs):
            needed = whole if i == 0 and whole <= room else columns  # a token that fits on a line is not broken
            if used and used + needed > room:
                text, run = text + _paint(run, piece, number, color), ""
                yield from flush()
            if position is None and i == 0:
                position = piece.position
            run += glyph
            first, rest = ("^", "~") if piece.scored else (".", " ")
            if not color:
                marks += (rest if i else first) + rest * (columns - 1)
            used += columns
            if glyph == "⏎" and "\n" in piece.text:
                text, run = text + _paint(run, piece, number, color), ""
                yield from flush()
        text += _paint(run, piece, number, color)
    if used:
        yield from flush()


def _paint(text: str, piece: TokenPiece, number: int, color: bool = True) -> str:
    """Text in the color of its piece; neighbors differ, to show borders."""
    if piece.scored:
        code = "30;46" if number % 2 else "30;42"
    elif piece.special:
        code = "35"
    else:
        code = "2" if number % 2 else ""
    return f"\x1b[{code}m{text}\x1b[0m" if color and code and text else text


def _bold(text: str, color: bool) -> str:
    return f"\x1b[1m{text}\x1b[0m" if color else text


def _statistics(found: Statistics, color: bool) -> Iterator[str]:
    wide = max(len(name) for name, _ in found.facts)
    for problem in found.problems:
        yield f"\x1b[31m! {problem}\x1b[0m" if color else f"! {problem}"
    for name, text in found.facts:
        yield f"{name:<{wide}}  {text}"
    yield ""
    yield from _histogram(found.histogram)


def _histogram(bars: Sequence[Bar]) -> Iterator[str]:
    most = max(bar.sequences for bar in bars)
    names = [f"{bar.low:,} to {bar.high:,}" if bar.low != bar.high else f"{bar.low:,}" for bar in bars]
    wide = max(map(len, names))
    for name, bar in zip(names, bars, strict=True):
        length = max(1, round(_BAR * bar.sequences / most)) if bar.sequences else 0
        yield f"{name:>{wide}}  {'█' * length:<{_BAR}} {bar.sequences:,}"
