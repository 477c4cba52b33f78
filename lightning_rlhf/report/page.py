"""Makes HTML pages of runs, without network access or scripts."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_rlhf.report.charts import Line, chart, number
from lightning_rlhf.report.runs import Curve, StageReport
from lightning_rlhf.report.style import STYLE

#: Metrics whose curves come first, without their prefix. The others follow in the order in which they were logged.
FIRST = ("score", "reward_mean", "reward", "kl", "accuracy", "loss", "perplexity", "token_accuracy", "margin")
#: Metrics at the head of a stage, and the function that finds their best value.
HEADLINES: dict[str, Callable[[Iterable[float]], float] | None] = {
    "val/win_rate": max,
    "val/score": max,
    "train/score": max,
    "train/kl": None,
    "val/accuracy": max,
    "val/loss": min,
    "val/perplexity": min,
    "val/token_accuracy": max,
    "val/margin": max,
}
#: Prefixes of metrics whose curves come first.
GROUPS = ("train", "val", "test")
#: Marks a page that may be overwritten, in its head.
GENERATOR = '<meta name="generator" content="lightning-rlhf report">'
SHOWN = 6


def write_report(path: str | os.PathLike[str], title: str, stages: Sequence[StageReport]) -> None:
    """Writes stages to one HTML file, atomically. The file also holds the data, so that stages can be added later.

    Args:
        path: Path of the file.
        title: Heading.
        stages: The stages, in order.
    """
    write(Path(path), page(title, stages))


def write(target: Path, text: str) -> None:
    """Writes a page atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- a run's page


def page(title: str, stages: Sequence[StageReport]) -> str:
    """Makes the report of one run, or of several stages."""
    data = json.dumps({"title": title, "stages": [asdict(stage) for stage in stages]})
    for character in "<>&":  # they only occur in strings; escaped, no text can end the block
        data = data.replace(character, f"\\u{ord(character):04x}")
    sections = [(stage.name, _stage(stage)) for stage in stages]
    return document(title, sections, f'<script type="application/json" id="report">{data}</script>\n')


def _stage(stage: StageReport) -> str:
    return f"""<p class="when">{escape(stage.status)} · {escape(stage.started)} to {escape(stage.ended)}</p>
{_cards(stage.curves)}
{_answers(stage.samples)}
{_groups(stage.groups)}
{curves(stage.curves, lambda name: [Line(stage.curves[name].all())])}
{_values(stage.curves)}
{_settings(stage.settings)}
"""


def _cards(curves: Mapping[str, Curve]) -> str:
    found = [(name, headline(curves[name])) for name in HEADLINES if name in curves]
    cards = [f"<div><dt>{escape(name)}</dt><dd>{text}</dd></div>" for name, text in found if text]
    return f'<dl class="cards">{"".join(cards)}</dl><p class="note">{HEADLINE_NOTE}</p>' if cards else ""


def _answers(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    articles = [
        article(prompt, [answer(each, f"step {escape(each['step'])}") for each in answers])
        for prompt, answers in samples.items()
    ]
    return f"<h3>Answers</h3>{''.join(articles)}" if articles else ""


def _groups(groups: Sequence[Mapping[str, Any]]) -> str:
    articles = []
    for group in groups:
        ends = ("best", "worst") if len(group["answers"]) > 1 else ("all with one score, such as",)
        cells = [answer(each, f"<b>{end}</b>") for each, end in zip(group["answers"], ends, strict=True)]
        size = f"{group['size']} completions, mean score {number(group['mean'])}"
        articles.append(article(group["prompt"], cells, f'<p class="note">{size}</p>'))
    return f"<h3>Groups of iteration {escape(groups[0]['iteration'])}</h3>{''.join(articles)}" if articles else ""


def _values(curves: Mapping[str, Curve]) -> str:
    rows = []
    for name, curve in curves.items():
        points = curve.all()
        values = [value for _, value in points if math.isfinite(value)] or [math.nan]
        figures = (points[0][1], curve.last[1], min(values), max(values))
        rows.append([escape(name), *map(number, figures), str(int(curve.last[0]))])
    head = ("metric", "first", "last", "min", "max", "at step")
    return details("Final values", table(head, rows)) if rows else ""


def _settings(settings: Mapping[str, Iterable[tuple[str, str, bool]]]) -> str:
    out = []
    for section, rows in settings.items():
        cells = "".join(
            f'<tr{" class=changed" if changed else ""}><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
            for name, value, changed in rows
        )
        if cells:
            out.append(f'<h4>{escape(section)}</h4><div class="wide"><table>{cells}</table></div>')
    note = '<p class="note">Marked settings differ from their defaults.</p>'
    return details("Settings", note + "".join(out)) if out else ""


# ------------------------------------------------------------------------------------------------------------ elements


def document(title: str, sections: Sequence[tuple[str, str]], data: str = "") -> str:
    """Makes a whole file.

    Args:
        title: Heading.
        sections: Headings with the HTML below them.
        data: HTML at the end.
    """
    links = "".join(f'<a href="#stage{i}">{escape(name)}</a>' for i, (name, _) in enumerate(sections))
    parts = enumerate(sections)
    body = "".join(f'<section id="stage{i}">\n<h2>{escape(name)}</h2>\n{text}</section>\n' for i, (name, text) in parts)
    header = f"<header><h1>{escape(title)}</h1>{f'<nav>{links}</nav>' if len(sections) > 1 else ''}</header>"
    return frame(title, f"{header}\n<main>\n{body}</main>\n{data}", STYLE, GENERATOR)


def frame(title: str, body: str, style: str, head: str = "") -> str:
    """Makes a whole file from its body. The file allows no network access and no scripts.

    Args:
        title: Title of the window.
        body: HTML of the body.
        style: Style sheet.
        head: More HTML for the head.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
{head}
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def escape(text: object) -> str:
    """Escapes text for HTML."""
    return html.escape(str(text))


def details(summary: str, text: str) -> str:
    """Folds HTML behind a summary."""
    return f"<details><summary>{escape(summary)}</summary>{text}</details>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "wide") -> str:
    """Makes a table that scrolls horizontally. All cells are HTML; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    return f'<div class="{kind}"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


HEADLINE_NOTE = "First and last value; long curves show the means of their first and last tenth."


def headline(curve: Curve) -> str:
    """Returns the first and the last value of a curve as HTML, or an empty text without values."""
    values = [value for _, value in curve.all()]
    if not values:
        return ""
    tenth = max(1, len(values) // 10)
    first, last = (sum(part) / tenth for part in (values[:tenth], values[-tenth:]))
    return number(last) if len(values) == 1 else f"{number(first)} → <b>{number(last)}</b>"


def article(prompt: str, cells: Sequence[str], more: str = "") -> str:
    """Makes the HTML of a prompt with its answers, and more HTML below them."""
    return f'<article><p class="prompt" dir="auto">{escape(prompt)}</p>{beside(cells)}{more}</article>'


def beside(cells: Sequence[str]) -> str:
    """Puts answers side by side. More than two scroll horizontally."""
    kind = "answers many" if len(cells) > 2 else "answers"
    row = "".join(f"<div>{cell}</div>" for cell in cells)
    return f'<div class="{kind}">{row}</div>'


def answer(row: Mapping[str, Any], above: str) -> str:
    """Makes the HTML of an answer, below a line to which its numbers (score, KL) are added."""
    known = ("step", "prompt", "completion", "ended")
    extra = "".join(
        f" · {escape(name)} {number(value)}"
        for name, value in row.items()
        if name not in known and isinstance(value, (int, float))
    )
    end = "" if row["ended"] else " …"
    text = f'<p class="text" dir="auto">{escape(str(row["completion"]).strip())}{end}</p>'
    return f'<p class="note">{above}{extra}</p>{text}'


def curves(names: Iterable[str], lines: Callable[[str], Sequence[Line]]) -> str:
    """Makes one chart per metric, grouped by prefix. All but the first few of a group are folded.

    Args:
        names: Names of the metrics.
        lines: Returns the lines of a metric.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        prefix, slash, _ = name.partition("/")
        groups.setdefault(prefix if slash else "other", []).append(name)
    out = []
    for prefix in sorted(groups, key=lambda prefix: GROUPS.index(prefix) if prefix in GROUPS else len(GROUPS)):
        charts = [chart(name, lines(name)) for name in sorted(groups[prefix], key=_order)]
        out.append(f"<h3>Curves: {escape(prefix)}, by step</h3>{grid(charts[:SHOWN])}")
        if charts[SHOWN:]:
            out.append(details(f"{len(charts) - SHOWN} more of {prefix}", grid(charts[SHOWN:])))
    return "".join(out)


def grid(charts: Iterable[str]) -> str:
    """Puts charts side by side, as many as fit."""
    return f'<div class="charts">{"".join(charts)}</div>'


def _order(name: str) -> int:
    own = name.rpartition("/")[2]
    return FIRST.index(own) if own in FIRST else len(FIRST)
