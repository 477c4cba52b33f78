"""Curves as inline SVG, colored by the style sheet of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Colors of lines, in light and in dark pages. All are told apart with each of the common color blindnesses too, and
#: stand out from the ground by a contrast of 3 (WCAG 2.1, 1.4.11).
COLOURS = (
    ("#0c2dbb", "#386bfa"),
    ("#9f8d0e", "#fae353"),
    ("#8a050d", "#fb9339"),
    ("#398db5", "#82eafc"),
    ("#167b5d", "#097f23"),
    ("#8851eb", "#d092fc"),
    ("#101418", "#91969b"),
    ("#73176f", "#9b5295"),
)
#: Dashes of lines behind the first eight, and again behind these.
DASHES = ("solid", "dashed", "dotted")
MAX_LINES = len(COLOURS) * len(DASHES)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 170, 46, 10, 10, 22


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        points: Places across, which mostly are steps, and values. At values that are not finite the line breaks.
        label: For the legend; empty on a chart of one line.
        style: Number of its color and dashes, below ``MAX_LINES``; None: the page's own.
        dots: Points that it is the trend of, drawn behind it; of few it has no points itself. None: it is drawn
            through its points, and of many also their running mean.
        band: Places with the least and the greatest value.
    """

    points: Sequence[Sequence[float]]
    label: str = ""
    style: int | None = None
    dots: Sequence[Sequence[float]] | None = None
    band: Sequence[tuple[float, float, float]] = ()


def chart(name: str, lines: Sequence[Line]) -> str:
    """Lines as a figure.

    Args:
        name: Of the metric.
        lines: One or several, over the same places.

    Returns:
        The figure, an inline SVG with its caption: the name and the last value of each line. Long curves also get
        their running mean.
    """
    caption = f"<figcaption>{html.escape(name)} {legend(lines)}</figcaption>"
    shown = [point for line in lines for point in (*line.points, *(line.dots or ())) if _finite(point)]
    shown += [(x, y) for line in lines for x, *ends in line.band for y in ends]
    if not shown:
        return f"<figure>{caption}<p>no finite value</p></figure>"
    places, values = zip(*shown, strict=True)
    across = _Scale(min(places), max(places), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(values), max(values), _HEIGHT - _BOTTOM, _TOP)
    whole = all(place == int(place) for place in places)  # steps
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(t):.1f}" y2="{up(t):.1f}"/>'
        f'<text class="y" x="{_LEFT - 5}" y="{up(t):.1f}">{number(t)}</text>'
        for t in up.ticks(4)
    ]
    parts += [
        f'<text class="x" x="{across(t):.1f}" y="{_HEIGHT - 6}">{number(t)}</text>'
        for t in across.ticks(5)
        if t == int(t) or not whole
    ]
    parts += [_drawn(line, across, up) for line in lines]
    label = html.escape(f"{name}: {'; '.join(filter(None, map(_said, lines)))}")
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure>{caption}{picture}</figure>"


def legend(lines: Sequence[Line]) -> str:
    """The last value of a line, or a list of lines with theirs."""
    ends = [(line.points if line.dots is None else line.dots)[-1:] for line in lines]
    lasts = ["".join(f"<b>{number(value)}</b>" for _, value in end) for end in ends]
    if [line.label for line in lines] == [""]:
        return lasts[0]
    items = (f"<li>{key(line.label, line.style)} {last}</li>" for line, last in zip(lines, lasts, strict=True))
    return f'<ul class="legend">{"".join(items)}</ul>'


def key(label: str, style: int | None) -> str:
    """A line's name behind a piece of it."""
    return f'<i class="{style_class(style)}"></i>{html.escape(label)}'


def style_class(style: int | None) -> str:
    """Classes of a line's color and dashes."""
    return "" if style is None else f"c{style % len(COLOURS)} {DASHES[style // len(COLOURS)]}"


def running_mean(points: Sequence[Sequence[float]], part: float = 0.1, fewest: int = 30) -> list[tuple[float, float]]:
    """The mean around each of many points; of few, whose mean would be as restless as they are, none.

    Args:
        points: Places and finite values.
        part: Share of the points to either side that a mean takes in.
        fewest: Points of which there is a mean.

    Returns:
        As many, or none.
    """
    window = int(len(points) * part)
    near = [points[max(0, i - window) : i + window + 1] for i in range(len(points) if len(points) >= fewest else 0)]
    return [(points[i][0], sum(v for _, v in around) / len(around)) for i, around in enumerate(near)]


def number(value: float) -> str:
    """A value in four digits, or in whole thousands."""
    return f"{value:.4g}" if abs(value) < 10_000 or not math.isfinite(value) else f"{value:,.0f}"


def _finite(point: Sequence[float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _said(line: Line) -> str:
    points = [point for point in line.points or line.dots or () if _finite(point)]
    if not points:
        return ""
    ends = (f"{number(value)} at {number(place)}" for place, value in (points[0], points[-1]))
    return f"{line.label} {', '.join(ends)}".strip()


def _drawn(line: Line, across: _Scale, up: _Scale) -> str:
    finite = [point for point in line.points if _finite(point)]
    parts = []
    if line.band:
        edge = [(x, low) for x, low, _ in line.band] + [(x, high) for x, _, high in reversed(line.band)]
        parts.append(f'<polygon class="band" points="{_places(edge, across, up)}"/>')
    if line.dots is not None:  # round ends of lines without length
        dots = "".join(f"M{across(x):.1f} {up(y):.1f}h0" for x, y in filter(_finite, line.dots))
        parts.append(f'<path class="dots" d="{dots}"/>')
    elif mean := running_mean(finite):
        parts += [_line("raw", line.points, across, up), _line("curve", mean, across, up)]
        return _group(line, parts)
    return _group(line, [*parts, _line("curve", line.points, across, up)])


def _group(line: Line, parts: Sequence[str]) -> str:
    return f'<g class="{style_class(line.style)}">{"".join(parts)}</g>'


def _line(kind: str, points: Iterable[Sequence[float]], across: _Scale, up: _Scale) -> str:
    pieces: list[list[Sequence[float]]] = [[]]
    for point in points:
        if _finite(point):
            pieces[-1].append(point)
        else:
            pieces.append([])
    # a polyline of one point, twice, shows as a dot by its round ends
    return "".join(
        f'<polyline class="{kind}" points="{_places(piece * 2 if len(piece) == 1 else piece, across, up)}"/>'
        for piece in pieces
        if piece
    )


def _places(points: Iterable[Sequence[float]], across: _Scale, up: _Scale) -> str:
    return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)


class _Scale:
    """Values to places, linearly; a single value lies in the middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if low == high:
            slack = abs(low) / 2 or 0.5
            low, high = low - slack, high + slack
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About so many round values."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        unit = next(unit for unit in (power, 2 * power, 5 * power, 10 * power) if unit >= rough)
        return [i * unit for i in range(math.ceil(self.low / unit), math.floor(self.high / unit) + 1)]
