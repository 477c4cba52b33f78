"""Draws curves as inline SVG. The page's style sheet colors them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Colors of lines in light and in dark pages. They can be distinguished with each common color blindness, and have a
#: contrast of at least 3 with the background (WCAG 2.1, 1.4.11).
COLORS = (
    ("#0c2dbb", "#386bfa"),
    ("#9f8d0e", "#fae353"),
    ("#8a050d", "#fb9339"),
    ("#398db5", "#82eafc"),
    ("#167b5d", "#097f23"),
    ("#8851eb", "#d092fc"),
    ("#101418", "#91969b"),
    ("#73176f", "#9b5295"),
)
#: Dashes of the first eight lines, of the next eight, and of the last eight.
DASHES = ("solid", "dashed", "dotted")
MAX_LINES = len(COLORS) * len(DASHES)
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 170, 46, 10, 10, 22


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        points: Pairs of x, usually a step, and y. The line is interrupted at values that are not finite.
        label: Name in the legend; empty in a chart with one line.
        style: Number of color and dashes, below ``MAX_LINES``. None: the page's own color.
        dots: Points behind the line, which shows their trend; ``points`` are empty if there are few dots. None: the
            line goes through its points, and many points also get a running mean.
        band: Tuples of x, smallest and largest y.
    """

    points: Sequence[Sequence[float]]
    label: str = ""
    style: int | None = None
    dots: Sequence[Sequence[float]] | None = None
    band: Sequence[tuple[float, float, float]] = ()


def chart(name: str, lines: Sequence[Line]) -> str:
    """Draws lines as a figure.

    Args:
        name: Name of the metric.
        lines: One or several lines over the same x.

    Returns:
        An HTML figure with an inline SVG. Its caption has the name and the last value of each line. Long curves also
        get their running mean.
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
        f'<text class="y" x="{_LEFT - 5}" y="{up(t):.1f}">{_short(t)}</text>'
        for t in up.ticks(4)
    ]
    parts += [
        f'<text class="x" x="{across(t):.1f}" y="{_HEIGHT - 6}">{number(t)}</text>'
        for t in across.ticks(5)
        if t == int(t) or not whole
    ]
    parts += [_draw(line, across, up) for line in lines]
    label = html.escape(f"{name}: {'; '.join(filter(None, map(_describe, lines)))}")
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure>{caption}{picture}</figure>"


def legend(lines: Sequence[Line]) -> str:
    """Returns the last value of a single line, or a list of several lines with their last values."""
    ends = [(line.points if line.dots is None else line.dots)[-1:] for line in lines]
    lasts = ["".join(f"<b>{number(value)}</b>" for _, value in end) for end in ends]
    if [line.label for line in lines] == [""]:
        return lasts[0]
    items = (f"<li>{key(line.label, line.style)} {last}</li>" for line, last in zip(lines, lasts, strict=True))
    return f'<ul class="legend">{"".join(items)}</ul>'


def key(label: str, style: int | None) -> str:
    """Returns a sample of a line with its name."""
    return f'<i class="{style_class(style)}"></i>{html.escape(label)}'


def style_class(style: int | None) -> str:
    """Returns the CSS classes of a line's color and dashes."""
    return "" if style is None else f"c{style % len(COLORS)} {DASHES[style // len(COLORS)]}"


def running_mean(points: Sequence[Sequence[float]], part: float = 0.1, fewest: int = 30) -> list[tuple[float, float]]:
    """Computes the mean around each point. There is none for few points, whose mean would be as noisy as the points.

    Args:
        points: Pairs of x and finite y.
        part: Share of all points that a mean covers on each side.
        fewest: Smallest number of points that get a mean.

    Returns:
        As many means as points, or none.
    """
    window = int(len(points) * part)
    near = [points[max(0, i - window) : i + window + 1] for i in range(len(points) if len(points) >= fewest else 0)]
    return [(points[i][0], sum(v for _, v in around) / len(around)) for i, around in enumerate(near)]


def number(value: float) -> str:
    """Formats a value with four digits, or as an integer with thousands separators."""
    return f"{value:.4g}" if abs(value) < 10_000 or not math.isfinite(value) else f"{value:,.0f}"


def _short(value: float) -> str:
    """Formats a value for the left margin, which holds seven characters: 2,000,000 is 2e6."""
    if len(text := number(value)) <= 7:
        return text
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10**power:.5g}e{power}"


def _finite(point: Sequence[float]) -> bool:
    return math.isfinite(point[0]) and math.isfinite(point[1])


def _describe(line: Line) -> str:
    points = [point for point in line.points or line.dots or () if _finite(point)]
    if not points:
        return ""
    ends = (f"{number(value)} at {number(place)}" for place, value in (points[0], points[-1]))
    return f"{line.label} {', '.join(ends)}".strip()


def _draw(line: Line, across: _Scale, up: _Scale) -> str:
    finite = [point for point in line.points if _finite(point)]
    parts = []
    if line.band:
        edge = [(x, low) for x, low, _ in line.band] + [(x, high) for x, _, high in reversed(line.band)]
        parts.append(f'<polygon class="band" points="{_places(edge, across, up)}"/>')
    if line.dots is not None:  # lines without length show as dots, because their ends are round
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
    # a single point is drawn twice, and shows as a dot, because ends are round
    return "".join(
        f'<polyline class="{kind}" points="{_places(piece * 2 if len(piece) == 1 else piece, across, up)}"/>'
        for piece in pieces
        if piece
    )


def _places(points: Iterable[Sequence[float]], across: _Scale, up: _Scale) -> str:
    return " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)


class _Scale:
    """Maps values to coordinates linearly. A single value is in the middle."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if low == high:
            slack = abs(low) / 2 or 0.5
            low, high = low - slack, high + slack
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Returns about ``count`` round values."""
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        unit = next(unit for unit in (power, 2 * power, 5 * power, 10 * power) if unit >= rough)
        return [i * unit for i in range(math.ceil(self.low / unit), math.floor(self.high / unit) + 1)]
