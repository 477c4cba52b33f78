"""``lightning-rlhf report``: compares several runs on one page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_rlhf.arguments import Parser
from lightning_rlhf.report.charts import MAX_LINES, Line, chart, key, number, running_mean
from lightning_rlhf.report.page import (
    GENERATOR,
    HEADLINE_NOTE,
    HEADLINES,
    SHOWN,
    answer,
    article,
    beside,
    curves,
    details,
    document,
    escape,
    headline,
    table,
    write,
)
from lightning_rlhf.report.runs import Curve, StageReport, read_runs

#: Smallest number of iterations for a trend of reward and KL.
_TREND = 20
#: Stands for a value that is not known or was not logged.
NONE = "–"


def main(args: Sequence[str] | None = None) -> None:
    """Compares runs on one HTML page: curves, answers, reward against KL, and the settings that differ.

    Runs of the same stage (SFT, Reward, PPO ...) are shown together. The page needs no network and no scripts.

    Args:
        args: Arguments after ``report``.
    """
    parser = Parser("report", main.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory, its report.html or its metrics.csv")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write; default: report.html")
    parser.add_argument("--title", help="heading of the page; default: the names of the runs")
    parser.add_argument(
        "--seeds", action="store_true", help="show mean and range of runs that differ only in their seeds"
    )
    options = parser.parse_args(args)
    try:
        if options.out.exists() and not _replaceable(options.out):
            raise ValueError(f"{options.out} exists and is not a comparison of runs. Choose another --out.")
        stages = read_runs(options.runs)
        text = page(options.title or ", ".join(_labels(stages)), stages, options.seeds)
    except (OSError, ValueError) as error:
        parser.exit(1, f"lightning-rlhf report: {error}\n")
    write(options.out, text)
    counts = ", ".join(f"{name} {len(runs)}" for name, runs in stages.items())
    print(f"Runs compared ({counts}): {options.out}")


def _replaceable(path: Path) -> bool:
    """Whether a file is an older comparison, and not a run's report, whose data would be lost."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return GENERATOR in text and '<script type="application/json" id="report">' not in text


def page(title: str, stages: Mapping[str, Mapping[str, StageReport]], seeds: bool = False) -> str:
    """Makes the page.

    Args:
        title: Heading.
        stages: Runs by stage and by name, from :func:`~lightning_rlhf.report.runs.read_runs`.
        seeds: Show mean and range of runs that differ only in their seeds.

    Raises:
        ValueError: There are more runs than lines that can be distinguished.
    """
    labels = _labels(stages)
    if len(labels) > MAX_LINES:
        raise ValueError(f"{len(labels)} runs are too many for one page. Compare at most {MAX_LINES}.")
    styles = {label: i for i, label in enumerate(labels)}
    return document(title, [(name, _stage(_groups(runs, styles, seeds))) for name, runs in stages.items()])


def _labels(stages: Mapping[str, Mapping[str, StageReport]]) -> list[str]:
    return list(dict.fromkeys(label for runs in stages.values() for label in runs))


# --------------------------------------------------------------------------------------------------------------- seeds


@dataclass(frozen=True)
class _RunGroup:
    """Runs that share a line: one, or several that differ only in their seeds."""

    label: str
    style: int
    runs: Mapping[str, StageReport]


def _groups(runs: Mapping[str, StageReport], styles: Mapping[str, int], seeds: bool) -> list[_RunGroup]:
    if not seeds:
        return [_RunGroup(label, styles[label], {label: run}) for label, run in runs.items()]
    alike: dict[Any, dict[str, StageReport]] = {}
    for label, run in runs.items():
        own = {name: text for name, text in _flat(run).items() if name.rpartition(".")[2] != "seed"}
        alike.setdefault(tuple(sorted(own.items())) or label, {})[label] = run  # alone if its settings are unknown
    found = []
    for group in alike.values():
        first = next(iter(group))
        found.append(_RunGroup(first if len(group) == 1 else f"{first} ({len(group)} seeds)", styles[first], group))
    return found


def _line(group: _RunGroup, name: str) -> Line | None:
    """Makes a group's line of a metric. Several runs get their mean and range at the steps that all of them have."""
    found = [run.curves[name].all() for run in group.runs.values() if name in run.curves]
    if len(found) < 2:
        return Line(found[0], group.label, group.style) if found else None
    known = [{step: value for step, value in points if math.isfinite(value)} for points in found]
    shared = sorted(set.intersection(*map(set, known)))
    values = [[points[step] for points in known] for step in shared]
    mean = [(step, statistics.fmean(each)) for step, each in zip(shared, values, strict=True)]
    band = [(step, min(each), max(each)) for step, each in zip(shared, values, strict=True)]
    return Line(mean, group.label, group.style, band=band)


# ------------------------------------------------------------------------------------------------------------ sections


def _stage(groups: Sequence[_RunGroup]) -> str:
    runs = {label: run for group in groups for label, run in group.runs.items()}
    keys = {label: key(label, group.style) for group in groups for label in group.runs}
    names = dict.fromkeys(name for run in runs.values() for name in run.curves)
    drawn = curves(names, lambda name: [line for group in groups if (line := _line(group, name))])
    return f"""{_overview(runs, keys)}
{_differences(runs, keys)}
{_over_kl(groups)}
{_answers(runs, keys)}
{drawn}
{_values(runs, keys)}
"""


def _overview(runs: Mapping[str, StageReport], keys: Mapping[str, str]) -> str:
    shown = [name for name in HEADLINES if any(name in run.curves for run in runs.values())]
    rows = []
    for label, run in runs.items():
        figures = [_figure(run.curves[name], HEADLINES[name]) if name in run.curves else NONE for name in shown]
        rows.append([keys[label], *figures, _status(run.status), escape(run.started), escape(run.ended)])
    head = ["run", *map(escape, shown), "how it went", "from", "to"]
    return f'{table(head, rows, "wide runs")}<p class="note">{HEADLINE_NOTE} Best: the best of all values.</p>'


def _status(text: str) -> str:
    """Formats the status of a run. A long error is folded after its beginning."""
    return escape(text) if len(text) <= 80 else details(f"{text[:60]} …", escape(text))


def _figure(curve: Curve, best: Callable[[Iterable[float]], float] | None) -> str:
    finite = {value: step for step, value in reversed(curve.all()) if math.isfinite(value)}
    if best is None or len(finite) < 2:
        return headline(curve)
    value = best(finite)
    return f"{headline(curve)}<br>best {number(value)} at {number(finite[value])}"


def _over_kl(groups: Sequence[_RunGroup]) -> str:
    """Plots the score over the KL of each iteration, for stages that log both."""
    lines = [
        Line(_means(pairs), label, group.style, dots=pairs)
        for group in groups
        for label, run in group.runs.items()
        if (pairs := _pairs(run.curves))
    ]
    if not lines:
        return ""
    note = (
        "One dot per iteration. The line goes from the first to the last and is the mean over two fifths of the "
        f"iterations; it needs at least {_TREND}. KL is in nats per completion."
    )
    picture = chart("train/score over train/kl", lines)
    return f'<h3>Reward against KL</h3><p class="note">{note}</p><div class="one">{picture}</div>'


def _pairs(curves: Mapping[str, Curve]) -> list[tuple[float, float]]:
    """Returns KL and score of the steps that have both."""
    kl, scores = (curves.get(name, Curve()).all() for name in ("train/kl", "train/score"))
    at = {step: value for step, value in scores if math.isfinite(value)}
    return [(value, at[step]) for step, value in kl if step in at and math.isfinite(value)]


def _means(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the trend of pairs, or nothing for few pairs, because both of their values are noisy."""
    both = (running_mean(list(enumerate(values)), 1 / 5, _TREND) for values in zip(*pairs, strict=True))
    return [(x, y) for (_, x), (_, y) in zip(*both, strict=True)]


def _answers(runs: Mapping[str, StageReport], keys: Mapping[str, str]) -> str:
    prompts = dict.fromkeys(prompt for run in runs.values() for prompt in run.samples)
    articles = []
    for prompt in prompts:
        latest, first = [], []
        for label, run in runs.items():
            rows = run.samples.get(prompt, [])
            latest.append(_cell(keys[label], rows[-1:]))
            first.append(_cell(keys[label], rows[:1]))
        articles.append(article(prompt, latest, details("the first answers", beside(first))))
    if not articles:
        return ""
    more = details(f"{len(articles) - SHOWN} more prompts", "".join(articles[SHOWN:])) if articles[SHOWN:] else ""
    return f"<h3>Answers</h3>{''.join(articles[:SHOWN])}{more}"


def _cell(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [answer(row, f"{name} · step {escape(row['step'])}") for row in rows]
    return "".join(cells) or f'<p class="note">{name} · {NONE}</p>'


def _values(runs: Mapping[str, StageReport], keys: Mapping[str, str]) -> str:
    names = dict.fromkeys(name for run in runs.values() for name in run.curves)
    rows = [
        [escape(name), *(number(run.curves[name].last[1]) if name in run.curves else NONE for run in runs.values())]
        for name in names
    ]
    return details("Final values", table(["metric", *keys.values()], rows)) if rows else ""


# ------------------------------------------------------------------------------------------------------------ settings


def _flat(run: StageReport) -> dict[str, str]:
    return {f"{section}.{name}": text for section, rows in run.settings.items() for name, text, _ in rows}


def _known(settings: Mapping[str, str], name: str) -> str | None:
    """Returns a run's value of a setting, or of the setting that contains it: ``lora`` for a missing ``lora.r``."""
    while name not in settings and "." in name:
        name = name.rpartition(".")[0]
    return settings.get(name)


def differing(runs: Mapping[str, StageReport]) -> dict[str, list[str | None]]:
    """Finds settings for which two runs are known to have different values.

    Args:
        runs: Runs by name.

    Returns:
        For each setting, the value of each run; None if it is not known.
    """
    settings = [_flat(run) for run in runs.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [_known(each, name) for each in settings] for name in names}
    return {name: found for name, found in values.items() if len({v for v in found if v is not None}) > 1}


def _differences(runs: Mapping[str, StageReport], keys: Mapping[str, str]) -> str:
    settings = [_flat(run) for run in runs.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    head = ["setting", *keys.values()]
    if not names:
        return '<h3>Settings</h3><p class="note">No settings were found.</p>'
    different = {name: [NONE if v is None else escape(v) for v in found] for name, found in differing(runs).items()}
    whole = table(head, ([escape(name), *(escape(each.get(name, NONE)) for each in settings)] for name in names))
    few = table(head, ([escape(name), *cells] for name, cells in different.items()))
    none = '<p class="note">No known settings differ.</p>'
    shown = f"<h3>Settings that differ</h3>{few if different else none}" if len(runs) > 1 else ""
    return shown + details("All settings", whole)
