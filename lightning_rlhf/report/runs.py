"""What is known of runs, and how it is read back from what they left: reports, Lightning's logs, answers."""

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

#: Most points of a curve; of longer ones every second, fourth ... is kept.
MAX_POINTS = 300
_EVENTS = "events.out.tfevents.*"


@dataclass
class Curve:
    """The values of a metric over steps, thinned.

    Attributes:
        points: Steps and values, of every ``every``-th value.
        every: What share of the values is kept.
        seen: How many there were.
        last: The latest step and value.
    """

    points: list[list[float]] = field(default_factory=list)
    every: int = 1
    seen: int = 0
    last: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Adds a value; of two for one step the later holds."""
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
        """The points, the latest among them."""
        return self.points if not self.last or self.points[-1] == self.last else [*self.points, self.last]


@dataclass
class StageReport:
    """What a report says of one run.

    Attributes:
        name: Heading; one report has each name once.
        run: Tells runs apart.
        started: When it began.
        ended: When it ended, or when this was written.
        status: How it went.
        settings: Sections of settings: name, value, and whether it differs from its default.
        curves: Logged metrics.
        samples: By prompt, the first and the latest answer, as :class:`SampleCompletions` writes them.
    """

    name: str
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: str = ""
    ended: str = ""
    status: str = ""
    settings: dict[str, list[tuple[str, str, bool]]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Takes what JSON knows no other way: curves as objects, tuples as lists."""
        self.settings = {k: [(name, text, new) for name, text, new in rows] for k, rows in self.settings.items()}
        self.curves = {k: c if isinstance(c, Curve) else Curve(**c) for k, c in self.curves.items()}

    @property
    def kind(self) -> str:
        """The stage: its module's name where that is known (SFT, PPO ...), else the heading."""
        named = next((text for name, text, _ in self.settings.get("Model", []) if name == "class"), self.name)
        return named.removesuffix("Module") or named


def read_report(path: str | os.PathLike[str]) -> tuple[str, list[StageReport]]:
    """Reads back what :func:`~lightning_rlhf.report.write_report` wrote.

    Args:
        path: Of the HTML file.

    Returns:
        The title and the stages.

    Raises:
        ValueError: The file is no report.
    """
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', _text(Path(path)), re.DOTALL)
    if found is None:
        raise ValueError(f"{path} is no report, and is left as it is. Choose another path for the report.")
    data = json.loads(found[1])
    return data["title"], [StageReport(**stage) for stage in data["stages"]]


# ---------------------------------------------------------------------------------------------------------------- runs


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> dict[str, dict[str, StageReport]]:
    """What runs left, by stage and then by name of the run.

    Args:
        paths: Of the runs, as :func:`read_run` takes them. A run's name is that of its directory, with as much of the
            path as tells it from the others.

    Returns:
        Stages in the order in which they are first met, in each the runs. Where one run has several of a stage, as a
        report of one title each may, their headings are added to the name.

    Raises:
        ValueError: As :func:`read_run`, or a run is given twice.
        FileNotFoundError: As :func:`read_run`.
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
    """What a run left.

    Of a directory the report is read, ``report.html``; where there is none, ``metrics.csv`` of Lightning's CSVLogger,
    or else TensorBoard's events, in it or in a folder below, with the settings that stand beside it (``config.yaml``
    or ``hparams.yaml``), and the answers in the directory's ``samples.jsonl``. Of several ``version_N`` the last
    counts, with those that it goes on from; where steps overlap, the later holds. Loggers count steps from 0: a value
    that they have at step n is shown at n + 1, the number of optimizer steps done, as reports have it.

    Args:
        path: A directory, a report, or a ``metrics.csv``.

    Returns:
        The stages of a report, or the one of a log.

    Raises:
        FileNotFoundError: There is no such path, or nothing in it.
        ValueError: A file can't be read, or there are several runs in the directory.
    """
    path = Path(path)
    if path.is_file():
        return [_read_logs([path])] if path.suffix == ".csv" else read_report(path)[1]
    if not path.is_dir():
        raise FileNotFoundError(f"There is no {path}. Give a run's directory, its report.html or its metrics.csv.")
    if (path / "report.html").is_file():
        return read_report(path / "report.html")[1]
    found = sorted(path.rglob("metrics.csv"), key=_version) or sorted(path.rglob(_EVENTS), key=_version)
    if not found:
        raise FileNotFoundError(
            f"{path} holds nothing of a run: looked for report.html in it, and in it and the folders below for "
            f"metrics.csv and {_EVENTS}. Give the Trainer a CSVLogger, or the callback Report."
        )
    homes = {_home(file) for file in found}
    if len(homes) > 1:
        listed = ", ".join(sorted(map(str, homes)))
        raise ValueError(f"{path} holds several runs. Name those that are meant: {listed}.")
    report = _read_logs(found)
    report.samples, left_out = _read_answers(path / "samples.jsonl")
    report.status += left_out
    return [report]


def _names(paths: Sequence[Path]) -> list[str]:
    """Ends of paths that tell them apart."""
    whole = []
    for path in paths:
        known = path.name in ("report.html", "metrics.csv")
        whole.append((path.parent if known else path.with_suffix("") if path.is_file() else path).resolve().parts)
    for i, parts in enumerate(whole):
        if parts in whole[:i]:
            raise ValueError(f"{paths[i]} is given twice.")
    names = []
    for parts in whole:
        sizes = (n for n in range(1, len(parts)) if sum(other[-n:] == parts[-n:] for other in whole) == 1)
        names.append("/".join(parts[-next(sizes, len(parts)) :]))
    return names


def _version(path: Path) -> tuple[int, str]:
    number = re.fullmatch(r"version_(\d+)", path.parent.name)
    return int(number[1]) if number else -1, str(path)


def _home(path: Path) -> Path:
    """The folder of a log, or of its versions."""
    return path.parent.parent if _version(path)[0] >= 0 else path.parent


# ---------------------------------------------------------------------------------------------------------------- logs

#: What a log holds, in its order: metric, step, value.
Values = list[tuple[str, int, float]]


def _read_logs(files: Sequence[Path]) -> StageReport:
    """The last of some logs, after those that it goes on from."""
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
            while points and points[-1][0] >= step:  # of before an interruption
                points.pop()
            points.append((step, value))
    report = StageReport("", settings=read_settings(chain[-1][0].parent))
    report.name = report.kind or "Runs"
    for name, points in curves.items():
        report.curves[name] = Curve()
        for step, value in points:
            report.curves[name].add(step, value)
    names = dict.fromkeys("/".join(file.parts[-2 if _version(file)[0] >= 0 else -1 :]) for file, _ in chain)
    report.status = f"to step {max(points[-1][0] for points in curves.values())}, by {', '.join(names)}{notes}"
    return report


def _goes_on(file: Path, values: Values, before: Values) -> bool:
    """Whether a log is of a run that was resumed: it begins later than the one before, and no config says otherwise."""
    config = read_yaml(file.parent / "config.yaml")
    resumed = bool(config.get("ckpt_path")) if config else True
    return resumed and min(step for _, step, _ in values) > min(step for _, step, _ in before)


def _read_csv(path: Path) -> tuple[Values, str]:
    """What CSVLogger wrote, and what of it was left out: a last line that was not finished."""
    text = _text(path)
    whole = text[: text.rfind("\n") + 1]
    rows = csv.reader(io.StringIO(whole))
    out: Values = []
    try:
        header = next(rows, [])
        if header and "step" not in header:
            raise ValueError("there is no column 'step', so it is no log of Lightning's CSVLogger")
        for row in rows:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} values under {len(header)} names")
            cells = dict(zip(header, row, strict=True))
            step = int(float(cells["step"])) + 1
            out += [(k, step, float(text)) for k, text in cells.items() if text and k not in ("step", "epoch")]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {max(1, rows.line_num)}: {error}. Mend the line or take it out.") from error
    return out, "" if whole == text else f"; the last line of {path.name} was cut off, and is left out"


def _read_events(path: Path) -> Values:
    """The scalars in a file of TensorBoard's."""
    try:  # no requirement, not even of an extra: where it is installed, Lightning's default logger is another
        home = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    except ImportError as error:
        raise ValueError(f"{path} can be read by TensorBoard alone: pip install tensorboard.") from error
    events = home.EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name not in ("epoch", "hp_metric")]
    return [(name, event.step + 1, event.value) for name in names for event in events.Scalars(name)]


def _read_answers(path: Path) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """Of each prompt the first and the latest answer, and what was left out."""
    known: dict[str, list[dict[str, Any]]] = {}
    text = _text(path) if path.is_file() else ""
    *lines, rest = text.split("\n")
    bad = 1 if rest else 0
    for line in filter(None, lines):
        try:
            row = json.loads(line)
            answers = known.setdefault(row["prompt"], [])
            row["completion"], row["ended"]
            while answers and answers[-1]["step"] >= row["step"]:  # of another run, or of before an interruption
                answers.pop()
            answers.append(row)
        except (ValueError, KeyError, TypeError):
            bad += 1
    ends = {prompt: answers[:1] + answers[1:][-1:] for prompt, answers in known.items() if answers}
    return ends, f"; {bad} lines of {path.name} hold no answer, and are left out" if bad else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
