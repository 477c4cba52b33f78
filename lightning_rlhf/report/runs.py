"""The data of runs, and how it is read from reports, Lightning's logs and files of answers."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_rlhf.report.settings import read_settings, read_yaml

#: Maximum number of points per curve. Longer curves keep every second, fourth ... value.
MAX_POINTS = 300
_EVENTS = "events.out.tfevents.*"


@dataclass
class Curve:
    """The values of a metric over steps, with a limited number of points.

    Attributes:
        points: Pairs of step and value, for every ``every``-th value.
        every: One of this many values is kept.
        seen: Number of all values.
        last: The latest step and value.
    """

    points: list[list[float]] = field(default_factory=list)
    every: int = 1
    seen: int = 0
    last: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Adds a value. A second value for the same step replaces the first."""
        point = [step, float(f"{value:.6g}")]
        if self.last and self.last[0] == step:
            self.seen -= 1
            if self.points[-1][0] == step:
                self.points.pop()
        if self.seen % self.every == 0:
            self.points.append(point)
        self.seen, self.last = self.seen + 1, point
        if len(self.points) >= MAX_POINTS:
            self.points, self.every = self.points[::2], 2 * self.every

    def all(self) -> list[list[float]]:
        """Returns the points, including the latest one."""
        return self.points if not self.last or self.points[-1] == self.last else [*self.points, self.last]


@dataclass
class StageReport:
    """The data of one run in a report.

    Attributes:
        name: Heading. Each name occurs once in a report.
        run: Identifies the run.
        started: Time when it started.
        ended: Time when it ended, or when the report was written.
        status: State of the run, such as "finished".
        settings: Sections of settings: name, value, and whether the value differs from its default.
        curves: Logged metrics by name.
        samples: For each prompt the first and the latest answer, as :class:`SampleCompletions` writes them.
        groups: Groups of completions of an iteration, as ``choose_groups`` makes them.
    """

    name: str
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: str = ""
    ended: str = ""
    status: str = ""
    settings: dict[str, list[tuple[str, str, bool]]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Restores types that JSON lacks: curves from objects, tuples from lists."""
        self.settings = {k: [(name, text, new) for name, text, new in rows] for k, rows in self.settings.items()}
        self.curves = {k: c if isinstance(c, Curve) else Curve(**c) for k, c in self.curves.items()}

    @property
    def kind(self) -> str:
        """The stage: the module's name (SFT, PPO ...) if it is known, otherwise the heading."""
        named = next((text for name, text, _ in self.settings.get("Model", []) if name == "class"), self.name)
        return named.removesuffix("Module") or named


def read_report(path: str | os.PathLike[str]) -> tuple[str, list[StageReport]]:
    """Reads a file that :func:`~lightning_rlhf.report.write_report` wrote.

    Args:
        path: Path of the HTML file.

    Returns:
        The title and the stages.

    Raises:
        ValueError: The file is not a report.
    """
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', _text(Path(path)), re.DOTALL)
    if found is None:
        raise ValueError(f"{path} is not a report, and is not changed. Choose another path for the report.")
    data = json.loads(found[1])
    return data["title"], [StageReport(**stage) for stage in data["stages"]]


# ---------------------------------------------------------------------------------------------------------------- runs


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, StageReport]]:
    """Reads several runs.

    Args:
        paths: Paths of the runs; see :func:`read_run`. The name of a run is its directory's name, with as many parent
            directories as are needed to distinguish it from the others.

    Returns:
        The runs by stage and by name, in the order of ``paths``. If a report has several runs of one stage, their
        headings are added to the name.

    Raises:
        ValueError: A run cannot be read (see :func:`read_run`) or is given twice.
        FileNotFoundError: A path does not exist or has no data.
    """
    stages: dict[str, dict[str, StageReport]] = {}
    for path, name in zip(paths, _names([Path(path) for path in paths]), strict=True):
        found = read_run(path)
        kinds = [report.kind for report in found]
        for report in found:
            label = name if kinds.count(report.kind) == 1 else f"{name} · {report.name}"
            stages.setdefault(report.kind, {})[label] = report
    return stages


def read_run(path: str | os.PathLike[str]) -> list[StageReport]:
    """Reads a run.

    In a directory, ``report.html`` is read. Without it, the directory and its subdirectories are searched for
    ``metrics.csv`` of Lightning's CSVLogger, and then for TensorBoard's events. Settings come from ``config.yaml`` or
    ``hparams.yaml`` beside this log, and answers from the directory's ``samples.jsonl``. If there are several
    ``version_N``, the last one is read with the versions that it was resumed from; if steps overlap, the later log
    counts. Loggers count steps from 0. A value that they log at step n is shown at n + 1, the number of finished
    optimizer steps, as in reports.

    Args:
        path: A directory, a report, or a ``metrics.csv``.

    Returns:
        The stages of a report, or the single stage of a log.

    Raises:
        FileNotFoundError: The path does not exist or has no data.
        ValueError: A file cannot be read, or the directory has several runs.
    """
    path = Path(path)
    if path.is_file():
        return [_read_logs([path])] if path.suffix == ".csv" else read_report(path)[1]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist. Give a run's directory, its report.html or its metrics.csv.")
    if (path / "report.html").is_file():
        return read_report(path / "report.html")[1]
    found = sorted(path.rglob("metrics.csv"), key=_version) or sorted(path.rglob(_EVENTS), key=_version)
    if not found:
        raise FileNotFoundError(
            f"{path} has no data of a run: neither report.html, nor metrics.csv or {_EVENTS} in it or below. Give the "
            "Trainer a CSVLogger, or the callback Report."
        )
    homes = {_home(file) for file in found}
    if len(homes) > 1:
        listed = ", ".join(sorted(map(str, homes)))
        raise ValueError(f"{path} has several runs. Give some of them: {listed}.")
    report = _read_logs(found)
    report.samples, left_out = _read_answers(path / "samples.jsonl")
    report.status += left_out
    return [report]


def _names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of paths that distinguish them."""
    whole = []
    for path in paths:
        known = path.name in ("report.html", "metrics.csv")
        whole.append((path.parent if known else path.with_suffix("") if path.is_file() else path).resolve().parts)
    for i, parts in enumerate(whole):
        if parts in whole[:i]:
            raise ValueError(f"{paths[i]} is given twice. Remove one of them.")
    names = []
    for parts in whole:
        sizes = (n for n in range(1, len(parts)) if sum(other[-n:] == parts[-n:] for other in whole) == 1)
        names.append("/".join(parts[-next(sizes, len(parts)) :]))
    return names


def _version(path: Path) -> tuple[int, str]:
    number = re.fullmatch(r"version_(\d+)", path.parent.name)
    return int(number[1]) if number else -1, str(path)


def _home(path: Path) -> Path:
    """Returns the directory of a log or of its versions."""
    return path.parent.parent if _version(path)[0] >= 0 else path.parent


# ---------------------------------------------------------------------------------------------------------------- logs

#: Metric, step and value, in the order of a log.
Values = list[tuple[str, int, float]]


def _read_logs(files: Sequence[Path]) -> StageReport:
    """Reads the last of several logs, after the logs that it was resumed from."""
    chain: list[tuple[Path, Values]] = []
    notes = ""
    measured: tuple[Path, Values, str] | None = None
    for file in reversed(files):
        values, note = _read_csv(file) if file.suffix == ".csv" else (_read_events(file), "")
        if all(name.startswith(("val/", "test/")) for name, _, _ in values):  # validate and test log beside the run
            measured = measured or ((file, values, note) if values else None)
            continue
        if values and chain and file.parent != chain[0][0].parent and not _goes_on(*chain[0], values):
            break
        if values:
            chain.insert(0, (file, values))
            notes = note + notes
    if not chain and measured:
        chain, notes = [measured[:2]], measured[2]
    if not chain:
        raise ValueError(f"{files[-1]} holds no values.")
    curves: dict[str, list[tuple[int, float]]] = {}
    for _, values in chain:
        for name, step, value in values:
            points = curves.setdefault(name, [])
            while points and points[-1][0] >= step:  # steps that were repeated after an interruption
                points.pop()
            points.append((step, value))
    report = StageReport("", settings=read_settings(chain[-1][0].parent))
    report.name = report.kind or "Runs"
    for name, points in curves.items():
        report.curves[name] = Curve()
        for step, value in points:
            report.curves[name].add(step, value)
    names = dict.fromkeys("/".join(file.parts[-2 if _version(file)[0] >= 0 else -1 :]) for file, _ in chain)
    report.status = f"to step {max(points[-1][0] for points in curves.values())}, from {', '.join(names)}{notes}"
    return report


def _goes_on(file: Path, values: Values, before: Values) -> bool:
    """Whether a log continues an earlier one: it starts later, and its config, if any, has a ``ckpt_path``."""
    config = read_yaml(file.parent / "config.yaml")
    resumed = bool(config.get("ckpt_path")) if config else True
    return resumed and min(step for _, step, _ in values) > min(step for _, step, _ in before)


def _read_csv(path: Path) -> tuple[Values, str]:
    """Reads a file of CSVLogger. Returns its values and a note if an unfinished last line was left out."""
    text = _text(path)
    whole = text[: text.rfind("\n") + 1]
    rows = csv.reader(io.StringIO(whole))
    out: Values = []
    try:
        header = next(rows, [])
        if header and "step" not in header:
            raise ValueError("there is no column 'step', so it is not a log of Lightning's CSVLogger")
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} values under {len(header)} names")
            cells = dict(zip(header, row, strict=True))
            step = int(float(cells["step"])) + 1
            out += [(k, step, float(text)) for k, text in cells.items() if text and k not in ("step", "epoch")]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {max(1, rows.line_num)}: {error}. Correct the line or delete it.") from error
    return out, "" if whole == text else f"; the last line of {path.name} is incomplete and left out"


def _read_events(path: Path) -> Values:
    """Reads the scalars in a TensorBoard file."""
    try:  # not a dependency, not even of an extra, because Lightning's default logger changes if it is installed
        home = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    except ImportError as error:
        raise ValueError(f"Reading {path} needs TensorBoard: pip install tensorboard.") from error
    events = home.EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name not in ("epoch", "hp_metric")]
    return [(name, event.step + 1, event.value) for name in names for event in events.Scalars(name)]


def _read_answers(path: Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Reads the first and the latest answer of each prompt. Returns them and a note about lines that were left out."""
    known: dict[str, list[dict[str, Any]]] = {}
    text = _text(path) if path.is_file() else ""
    *lines, rest = text.split("\n")
    bad = 1 if rest else 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            answers = known.setdefault(row["prompt"], [])
            row["completion"], row["ended"]
            while answers and answers[-1]["step"] >= row["step"]:  # from another run, or before an interruption
                answers.pop()
            answers.append(row)
        except (ValueError, KeyError, TypeError):
            bad += 1
    ends = {prompt: answers[:1] + answers[1:][-1:] for prompt, answers in known.items() if answers}
    return ends, f"; {bad} lines of {path.name} without an answer are left out" if bad else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
