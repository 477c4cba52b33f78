"""Lines lie where their axes say, and can be told apart."""

import itertools
import math

import numpy as np
import pytest

from lightning_rlhf.report.charts import COLORS, MAX_LINES, Line, chart, style_class
from lightning_rlhf.report.runs import MAX_POINTS, Curve
from lightning_rlhf.report.style import STYLE


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line["@points"].split()]


def drawn(svg, kind="curve"):
    """The points of each curve of a chart, by the labels of its axes."""
    axes = {}
    for name, place in (("x", "@x"), ("y", "@y")):
        labels = [(float(e[place]), float(e["text"].replace(",", ""))) for e in svg.all("text", class_=name)]
        (p, a), *_, (q, b) = labels
        axes[name] = lambda at, p=p, a=a, q=q, b=b: a + (at - p) / (q - p) * (b - a)
    return [[(axes["x"](x), axes["y"](y)) for x, y in points(line)] for line in svg.all("polyline", class_=kind)]


def test_curves_are_drawn_where_their_axes_say(parse):
    values = [[10 * i, math.sin(i) * 3 - 1] for i in range(12)]
    [found] = drawn(parse(chart("train/kl", [Line(values)])))
    assert len(found) == len(values)
    for (x, y), (step, value) in zip(found, values, strict=True):
        assert x == pytest.approx(step, abs=0.5) and y == pytest.approx(value, abs=0.01 * 6)


def test_labels_of_large_values_fit_beside_the_chart(parse):
    svg = parse(chart("train/perplexity", [Line([[1, -2.1e6], [2, 5.2e6]])]))
    assert [e["text"] for e in svg.all("text", class_="y")] == ["-2e6", "0", "2e6", "4e6"]
    svg = parse(chart("train/perplexity", [Line([[1, 9_000.0], [2, 21_000.0]])]))
    assert [e["text"] for e in svg.all("text", class_="y")] == ["10,000", "15,000", "20,000"]


def test_odd_values_are_drawn_too(parse):
    assert len(parse(chart("x", [Line([[1, 1.0], [2, 2.0], [3, math.nan], [4, 1.0]])])).all("polyline")) == 2
    (dot,) = parse(chart("x", [Line([[5, 3.0]])])).all("polyline")
    assert len(set(dot["@points"].split())) == 1 and len(dot["@points"].split()) == 2
    flat = [y for _, y in points(parse(chart("x", [Line([[1, 0.0], [2, 0.0]])])).all("polyline")[0])]
    assert flat[0] == flat[1]
    assert "no finite value" in parse(chart("x", [Line([[1, math.inf]])])).texts("figure")[0]


def test_a_long_curve_is_thinned_and_drawn_with_its_running_mean(parse):
    curve = Curve()
    for step in range(1, 5001):
        curve.add(step, step % 7 + step / 1000)
    kept = curve.all()
    assert 100 <= len(kept) <= MAX_POINTS + 1
    assert kept[0] == [1, 1.001] and kept[-1] == [5000, 7.0]  # 5000 % 7 is 2
    assert all(value == pytest.approx(step % 7 + step / 1000) for step, value in kept)
    gaps = {b[0] - a[0] for a, b in itertools.pairwise(kept[:-1])}
    assert len(gaps) == 1
    svg = parse(chart("x", [Line(kept)]))
    (raw,), (mean,) = svg.all("polyline", class_="raw"), svg.all("polyline", class_="curve")
    assert len(points(raw)) == len(points(mean)) == len(kept)
    heights = [[y for _, y in points(line)] for line in (raw, mean)]
    assert max(heights[0]) - min(heights[0]) > 130  # all of the height
    assert max(heights[1]) - min(heights[1]) < 0.8 * (max(heights[0]) - min(heights[0]))


def test_lines_share_their_axes_and_are_named_with_their_last_values(parse):
    first, second = [[i, float(i)] for i in range(1, 9)], [[i, 20.0 - i] for i in range(1, 13)]
    svg = parse(chart("kl", [Line(first, "a <b>", 0), Line(second, "c", 9)]))
    for line, wanted in zip(drawn(svg), (first, second), strict=True):
        assert len(line) == len(wanted)
        assert np.allclose(line, wanted, atol=0.1)
    assert svg.texts("li") == ["a <b> 8", "c 8"]
    assert [e["@class"] for e in svg.all("g")] == [e["@class"] for e in svg.all("i")] == ["c0 solid", "c1 dashed"]
    assert svg.all("svg")[0]["@aria-label"] == "kl: a <b> 1 at 1, 8 at 8; c 19 at 1, 8 at 12"


def test_dots_and_bands_lie_on_the_same_axes(parse):
    line = Line([[0.5, 1.0], [2.5, 3.0]], dots=[(0.0, 0.0), (4.0, 4.0), (math.nan, 1.0)], band=[(0, 1, 2), (4, 0, 4)])
    svg = parse(chart("x", [line]))
    [path] = svg.all("path", class_="dots")
    dots = [tuple(map(float, dot.removesuffix("h0").split())) for dot in path["@d"].split("M")[1:]]
    [curve], [band] = map(points, svg.all("polyline")), map(points, svg.all("polygon"))
    left, right = dots
    assert len(dots) == 2 and left[0] < right[0] and left[1] > right[1]  # down is more
    assert curve[0] == pytest.approx([left[0] + (right[0] - left[0]) / 8, left[1] + (right[1] - left[1]) / 4], abs=0.1)
    assert band[0][0] == band[3][0] == left[0] and band[1] == (right[0], left[1]) and band[2] == right


#: Machado et al. 2009, severity 1, in linear RGB.
BLIND = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color):
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    """Ottosson 2020: distances are near what is seen; black to white is 1."""
    lms = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                    [0.0883024619, 0.2817188376, 0.6299787005]]) @ rgb  # fmt: skip
    return np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]]) @ np.cbrt(lms)  # fmt: skip


@pytest.mark.parametrize("scheme, ground", [(0, "#f4f5f7"), (1, "#1e2226")], ids=["light", "dark"])
def test_colors_stand_out_and_are_told_apart(scheme, ground):
    assert f"--card: {ground}" in STYLE
    colors = [linear(pair[scheme]) for pair in COLORS]
    weights = np.array([0.2126, 0.7152, 0.0722])
    for color in colors:
        dark, light = sorted((color @ weights, linear(ground) @ weights))
        assert (light + 0.05) / (dark + 0.05) >= 3
    for matrix in BLIND.values():
        seen = [oklab(np.clip(matrix @ color, 0, 1)) for color in colors]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.08


def test_no_two_styles_are_alike_and_all_are_in_the_style_sheet():
    styles = [style_class(i) for i in range(MAX_LINES)]
    assert len(set(styles)) == MAX_LINES == 24
    for name in {name for style in styles for name in style.split()} - {"solid"}:
        assert f".{name} " in STYLE
    assert STYLE.count(COLORS[3][0]) == STYLE.count(COLORS[3][1]) == 1 and "/*" not in STYLE


def test_few_points_have_no_running_mean(parse):
    noisy = [[i, float(i % 5)] for i in range(60)]
    for count, drawn in ((2, False), (29, False), (30, True), (60, True)):
        svg = parse(chart("x", [Line(noisy[:count])]))
        assert bool(svg.all("polyline", class_="raw")) == drawn
        [curve] = svg.all("polyline", class_="curve")
        heights = [y for _, y in points(curve)]
        turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(heights, heights[1:], heights[2:], strict=False))
        assert turns < (count / 2 if drawn else count)
