"""What a run did, as one HTML file that needs nothing else: settings, curves, answers before and after."""

from __future__ import annotations

import functools
import html
import inspect
import json
import math
import os
import platform
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rlhf.models.saving import sync

#: Most points of a curve; of longer ones every second, fourth ... is kept.
MAX_POINTS = 300
#: Curves shown first, by the name behind the prefix; the others follow in the order in which they were logged.
FIRST = ("score", "reward_mean", "reward", "kl", "accuracy", "loss", "perplexity", "token_accuracy", "margin")
#: Figures at the head of a stage, those of them that it logged.
HEADLINES = (
    "val/win_rate",
    "val/score",
    "train/score",
    "train/kl",
    "val/accuracy",
    "val/loss",
    "val/perplexity",
    "val/token_accuracy",
    "val/margin",
)
#: Prefixes of metrics whose curves come first.
GROUPS = ("train", "val", "test")
_SHOWN = 6
_EVALUATION = ("val", "eval", "test")


# ---------------------------------------------------------------------------------------------------------------- data


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


def read_report(path: str | os.PathLike[str]) -> tuple[str, list[StageReport]]:
    """Reads back what :func:`write_report` wrote.

    Args:
        path: Of the HTML file.

    Returns:
        The title and the stages.

    Raises:
        ValueError: The file is no report.
    """
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', _read(Path(path)), re.DOTALL)
    if found is None:
        raise ValueError(f"{path} is no report, and is left as it is. Choose another path for the report.")
    data = json.loads(found[1])
    return data["title"], [StageReport(**stage) for stage in data["stages"]]


def write_report(path: str | os.PathLike[str], title: str, stages: Sequence[StageReport]) -> None:
    """Writes stages as one HTML file, whole or not at all.

    The data lies in the file too, so that stages can be added later.

    Args:
        path: Of the file.
        title: Heading.
        stages: In order.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(page(title, stages), encoding="utf-8", errors="replace")
        sync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# ------------------------------------------------------------------------------------------------------------ callback


class Report(L.Callback):
    """Writes an HTML report of the run: settings, curves of all that was logged, answers, final values.

    The file needs no network and runs no scripts. It is written when training ends, is interrupted or fails, and again
    after a later ``trainer.validate`` or ``trainer.test``. What these log before training stands at step 0. Answers are
    those of :class:`~lightning_rlhf.callbacks.SampleCompletions`. All of it is kept in checkpoints: the report of a
    resumed run is whole.

    Args:
        path: Of the file; default ``report.html`` under the Trainer's ``default_root_dir``.
        title: Heading of the file; None keeps that of a file which is added to.
        stage: Heading of this run; default the module's name, such as PPO.
        append: Keep other stages that the file has, so that SFT, reward model and PPO make one report; a stage of the
            same name is replaced. False replaces the file.
        every_n_steps: Write every so many steps too.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        title: str | None = None,
        stage: str | None = None,
        append: bool = False,
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or null for the end alone; got {every_n_steps}.")
        self.path, self.title, self.stage, self.append = path, title, stage, append
        self.every_n_steps = every_n_steps
        self.report = StageReport("")
        self._answers: tuple[Path, int] | None = None  # the file of samples, and how far it was read
        self._noted = -1

    # ------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses to write over what is no report, before compute is spent; finds the end of older answers.

        Raises:
            ValueError: A file that is no report is in its place.
        """
        if stage != TrainerFn.FITTING:
            return
        if self._target(trainer).exists():
            read_report(self._target(trainer))
        answers = Path(trainer.default_root_dir) / "samples.jsonl"
        self._answers = answers, answers.stat().st_size if answers.exists() else 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins, or goes on with what the checkpoint brought."""
        if trainer.global_step == 0:
            before = {} if self.report.ended else self.report.curves
            self.report = StageReport("", curves=before)
        elif self._target(trainer).exists():
            self._complete(trainer)
        self._noted = trainer.global_step
        report = self.report
        report.name = self.stage or type(pl_module).__name__.removesuffix("Module") or type(pl_module).__name__
        report.started = report.started or _now()
        report.status, report.ended = "running", ""
        report.settings = {
            "Model": describe(pl_module),
            "Data": describe(getattr(trainer, "datamodule", None)),
            "Trainer": describe_trainer(trainer),
        }

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the step before, all of whose hooks are done; writes where it is time."""
        step = trainer.global_step
        if step > self._noted:
            self._note(trainer, step)
            if self.every_n_steps and step % self.every_n_steps == 0:
                self._write(trainer)
            self._noted = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes what is new already, for the checkpoint of this step; modules may log the rest after callbacks."""
        if trainer.global_step > self._noted:
            self._note(trainer, trainer.global_step, only_new=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes validation metrics."""
        if not trainer.sanity_checking:
            self._note(trainer, trainer.global_step, evaluation=True)
            self._write_again(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes test metrics."""
        self._note(trainer, trainer.global_step, evaluation=True)
        self._write_again(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the last step."""
        self._note(trainer, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes, after all other callbacks have done what they do at the end of training."""
        interrupted = trainer.state.status == TrainerStatus.INTERRUPTED
        self._end(trainer, f"interrupted at step {trainer.global_step}" if interrupted else "finished")
        if trainer.is_global_zero:
            rank_zero_info(f"Report: {self._target(trainer)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes what there is."""
        if self.report.status == "running":
            if trainer.world_size == 1:  # other ranks may be elsewhere, and not take part in computing a metric
                self._note(trainer, trainer.global_step)
            kind, text = type(exception).__name__, str(exception)
            self._end(trainer, f"stopped at step {trainer.global_step} by {kind}{': ' if text else ''}{text}")

    def state_dict(self) -> dict[str, Any]:
        """All that the report will say, so that a resumed run's is whole."""
        self._read_answers()
        return asdict(self.report)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.report = StageReport(**state_dict)

    # ------------------------------------------------------------------------------------------------- collecting

    def _note(self, trainer: L.Trainer, step: int, only_new: bool = False, evaluation: bool = False) -> None:
        """Adds values: of training or of evaluation, all or those that differ from their last."""
        # on all ranks, since a metric may only now be computed, by all together
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        for name, value in values.items():
            if name.startswith(_EVALUATION) == evaluation:
                curve = self.report.curves.setdefault(name, Curve())
                if not (only_new and curve.last and curve.last[1] == float(f"{value:.6g}")):
                    curve.add(step, value)

    def _complete(self, trainer: L.Trainer) -> None:
        """Takes from the file what modules logged of the checkpoint's step after it was saved."""
        _, stages = read_report(self._target(trainer))
        for curves in (stage.curves for stage in stages if stage.run == self.report.run):
            for name, curve in curves.items():
                own = self.report.curves.setdefault(name, Curve())
                for step, value in curve.all():
                    if (own.last[0] if own.last else -1) < step <= trainer.global_step:
                        own.add(int(step), value)

    def _read_answers(self) -> None:
        if self._answers is None or not self._answers[0].exists():
            return
        path, place = self._answers
        with path.open("rb") as file:
            file.seek(place)
            lines = file.readlines()
        self._answers = path, place + sum(map(len, lines))
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                rank_zero_warn(f"Report: a line of {path} is no JSON, and its answer is left out: {line[:80]!r}")
                continue
            known = self.report.samples.setdefault(row["prompt"], [])
            known[1:] = [row]

    # ------------------------------------------------------------------------------------------------- writing

    def _target(self, trainer: L.Trainer) -> Path:
        return Path(self.path or Path(trainer.default_root_dir) / "report.html")

    def _end(self, trainer: L.Trainer, status: str) -> None:
        self.report.status = status
        self._write(trainer)

    def _write_again(self, trainer: L.Trainer) -> None:
        """After training, for evaluations that follow it."""
        if trainer.state.fn != TrainerFn.FITTING and self.report.ended:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        self.report.ended = _now()
        if not trainer.is_global_zero:
            return
        self._read_answers()
        target = self._target(trainer)
        title, stages = read_report(target) if self.append and target.exists() else ("Training report", [])
        places = {stage.name: i for i, stage in enumerate(stages)}
        i = places.get(self.report.name, len(stages))
        stages[i : i + 1] = [self.report]
        write_report(target, self.title or title, stages)


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


# ------------------------------------------------------------------------------------------------------------ settings


def describe(thing: Any) -> list[tuple[str, str, bool]]:
    """What a module or data module was made with, as far as it keeps it.

    Args:
        thing: The object, or None.

    Returns:
        Names of arguments, values in words, and whether they differ from the defaults.
    """
    if thing is None:
        return []
    out = [("class", type(thing).__name__, False)]
    saved: Mapping[str, Any] = getattr(thing, "hparams", {})
    kept = [saved] if saved else [getattr(thing, "sources", {}), vars(thing)]
    for name, argument in inspect.signature(type(thing).__init__).parameters.items():
        home = next((values for values in kept if name in values), None)
        if home is not None and name != "self":
            default = home[name] if argument.default is argument.empty else argument.default
            out.append((name, say(home[name]), say(home[name]) != say(default)))
    return out


def describe_trainer(trainer: Any) -> list[tuple[str, str, bool]]:
    """Those of the Trainer's settings that decide what is learnt, its optimizers, and what it ran on."""
    values: dict[str, Any] = {name: getattr(trainer, name) for name in _TRAINER}
    for i, optimizer in enumerate(trainer.optimizers):
        known = (f"{k}={say(optimizer.defaults[k])}" for k in _OPTIMIZER if k in optimizer.defaults)
        values[f"optimizer {i}" if i else "optimizer"] = f"{type(optimizer).__name__}({', '.join(known)})"
    for i, config in enumerate(trainer.lr_scheduler_configs):
        values[f"lr_scheduler {i}" if i else "lr_scheduler"] = type(config.scheduler).__name__
    values["strategy"] = type(trainer.strategy).__name__
    values["devices"] = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    values["seed"] = os.environ.get("PL_GLOBAL_SEED")
    packages = ", ".join(f"{name} {version(name)}" for name in ("lightning", "torch", "transformers"))
    values["versions"] = f"Python {platform.python_version()}, {packages}"
    return [(name, say(value), False) for name, value in values.items() if value is not None]


_TRAINER = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "precision",
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
)
_OPTIMIZER = ("lr", "momentum", "betas", "eps", "weight_decay")


def say(value: Any) -> str:
    """A setting in words that don't name addresses in memory, and don't list data."""
    if isinstance(value, (torch.nn.Module, torch.Tensor)):
        return type(value).__name__
    if isinstance(value, functools.partial):
        return f"{say(value.func)}({', '.join(f'{k}={say(v)}' for k, v in value.keywords.items())})"
    if isinstance(value, type) or inspect.isroutine(value):
        return str(value.__qualname__).rpartition("<locals>.")[2]
    if isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
        return f"{len(value)} rows"
    text = str(value) if isinstance(value, (str, os.PathLike)) else repr(value)
    return type(value).__name__ if " at 0x" in text or len(text) > 400 else text


# ---------------------------------------------------------------------------------------------------------------- page


def page(title: str, stages: Sequence[StageReport]) -> str:
    """The whole file."""
    data = json.dumps({"title": title, "stages": [asdict(stage) for stage in stages]})
    for character in "<>&":  # inside strings alone; no text can then end the block
        data = data.replace(character, f"\\u{ord(character):04x}")
    links = "".join(f'<a href="#stage{i}">{_e(stage.name)}</a>' for i, stage in enumerate(stages))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{_e(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{_e(title)}</h1>{f"<nav>{links}</nav>" if len(stages) > 1 else ""}</header>
<main>
{"".join(_stage(i, stage) for i, stage in enumerate(stages))}
</main>
<script type="application/json" id="report">{data}</script>
</body>
</html>
"""


def _e(text: object) -> str:
    return html.escape(str(text))


def _stage(number: int, stage: StageReport) -> str:
    return f"""<section id="stage{number}">
<h2>{_e(stage.name)}</h2>
<p class="when">{_e(stage.status)} · {_e(stage.started)} to {_e(stage.ended)}</p>
{_headlines(stage.curves)}
{_samples(stage.samples)}
{_curves(stage.curves)}
{_values(stage.curves)}
{_settings(stage.settings)}
</section>
"""


def _headlines(curves: Mapping[str, Curve]) -> str:
    cards = []
    for name in HEADLINES:
        values = [value for _, value in curves[name].all()] if name in curves else []
        if values:
            tenth = max(1, len(values) // 10)
            first, last = (sum(part) / tenth for part in (values[:tenth], values[-tenth:]))
            figure = _number(last) if len(values) == 1 else f"{_number(first)} → <b>{_number(last)}</b>"
            cards.append(f"<div><dt>{_e(name)}</dt><dd>{figure}</dd></div>")
    if not cards:
        return ""
    note = "From first to last; of long curves, the means of the first and the last tenth."
    return f'<dl class="cards">{"".join(cards)}</dl><p class="note">{note}</p>'


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    if not samples:
        return ""
    rows = []
    for prompt, answers in samples.items():
        cells = "".join(f"<div>{_answer(answer)}</div>" for answer in answers)
        rows.append(
            f'<article><p class="prompt" dir="auto">{_e(prompt)}</p><div class="answers">{cells}</div></article>'
        )
    return f"<h3>Answers</h3>{''.join(rows)}"


def _answer(answer: Mapping[str, Any]) -> str:
    known = ("step", "prompt", "completion", "ended")
    extra = "".join(
        f" · {_e(name)} {_number(value)}"
        for name, value in answer.items()
        if name not in known and isinstance(value, (int, float))
    )
    end = "" if answer["ended"] else " …"
    text = f'<p class="text" dir="auto">{_e(answer["completion"].strip())}{end}</p>'
    return f'<p class="note">step {_e(answer["step"])}{extra}</p>{text}'


def _curves(curves: Mapping[str, Curve]) -> str:
    groups: dict[str, list[str]] = {}
    for name in curves:
        prefix, slash, _ = name.partition("/")
        groups.setdefault(prefix if slash else "other", []).append(name)
    out = []
    for prefix in sorted(groups, key=lambda prefix: GROUPS.index(prefix) if prefix in GROUPS else len(GROUPS)):
        names = sorted(groups[prefix], key=_order)
        charts = [chart(name, curves[name].all()) for name in names]
        out.append(f'<h3>Curves: {_e(prefix)}</h3><div class="charts">{"".join(charts[:_SHOWN])}</div>')
        if charts[_SHOWN:]:
            more = f"<summary>{len(charts) - _SHOWN} more of {_e(prefix)}</summary>"
            out.append(f'<details>{more}<div class="charts">{"".join(charts[_SHOWN:])}</div></details>')
    return "".join(out)


def _order(name: str) -> int:
    own = name.rpartition("/")[2]
    return FIRST.index(own) if own in FIRST else len(FIRST)


def _values(curves: Mapping[str, Curve]) -> str:
    rows = []
    for name, curve in curves.items():
        points = curve.all()
        values = [value for _, value in points if math.isfinite(value)] or [math.nan]
        figures = (points[0][1], curve.last[1], min(values), max(values))
        cells = "".join(f"<td>{_number(value)}</td>" for value in figures)
        rows.append(f'<tr><th scope="row">{_e(name)}</th>{cells}<td>{_e(int(curve.last[0]))}</td></tr>')
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("metric", "first", "last", "min", "max", "at step"))
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<details><summary>Final values</summary>{table}</details>"


def _settings(settings: Mapping[str, Iterable[Sequence[Any]]]) -> str:
    out = []
    for section, rows in settings.items():
        cells = "".join(
            f'<tr{" class=changed" if changed else ""}><th scope="row">{_e(name)}</th><td>{_e(value)}</td></tr>'
            for name, value, changed in rows
        )
        if cells:
            out.append(f'<h4>{_e(section)}</h4><div class="wide"><table>{cells}</table></div>')
    if not out:
        return ""
    note = '<p class="note">Marked: other than the default.</p>'
    return f"<details><summary>Settings</summary>{note}{''.join(out)}</details>"


# -------------------------------------------------------------------------------------------------------------- charts

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 170, 46, 10, 10, 22


def chart(name: str, points: Sequence[Sequence[float]]) -> str:
    """A curve as a figure.

    Args:
        name: Of the metric.
        points: Steps and values; at values that are not finite the line breaks.

    Returns:
        The figure, an inline SVG with its caption. Long curves also get their running mean.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    last = _number(points[-1][1]) if points else ""
    caption = f"<figcaption>{_e(name)} <b>{last}</b></figcaption>"
    if not finite:
        return f"<figure>{caption}<p>no finite value</p></figure>"
    steps, values = zip(*finite, strict=True)
    across = _Scale(min(steps), max(steps), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(values), max(values), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(t):.1f}" y2="{up(t):.1f}"/>'
        f'<text class="y" x="{_LEFT - 5}" y="{up(t):.1f}">{_number(t)}</text>'
        for t in up.ticks(4)
    ]
    parts += [
        f'<text class="x" x="{across(t):.1f}" y="{_HEIGHT - 6}">{_number(t)}</text>'
        for t in across.ticks(5)
        if t == int(t)
    ]
    window = len(finite) // 15
    parts.append(_line("raw" if window > 1 else "curve", points, across, up))
    if window > 1:
        parts.append(_line("curve", _running_mean(finite, window), across, up))
    label = f"{name}: {_number(values[0])} at step {int(steps[0])}, {_number(values[-1])} at step {int(steps[-1])}"
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_e(label)}">{"".join(parts)}</svg>'
    return f"<figure>{caption}{picture}</figure>"


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


def _line(kind: str, points: Iterable[Sequence[float]], across: _Scale, up: _Scale) -> str:
    pieces: list[list[str]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            pieces[-1].append(f"{across(step):.1f},{up(value):.1f}")
        else:
            pieces.append([])
    # a polyline of one point, twice, shows as a dot by its round ends
    return "".join(
        f'<polyline class="{kind}" points="{" ".join(piece * 2 if len(piece) == 1 else piece)}"/>'
        for piece in pieces
        if piece
    )


def _running_mean(points: Sequence[Sequence[float]], window: int) -> list[tuple[float, float]]:
    out = []
    for i, (step, _) in enumerate(points):
        near = points[max(0, i - window) : i + window + 1]
        out.append((step, sum(value for _, value in near) / len(near)))
    return out


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 or not math.isfinite(value) else f"{value:,.0f}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #667; --back: #fff; --card: #f4f5f7; --edge: #dde;
  --line: #1f6feb; --mark: #b35900 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #9aa; --back: #14171a; --card: #1e2226;
  --edge: #343a40; --line: #6cb0ff; --mark: #ffb454 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: var(--back);
  font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: .5rem 0 } h2 { font-size: 1.3rem; border-top: 1px solid var(--edge); padding-top: 1rem }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem } h4 { margin: 1rem 0 .25rem }
a { color: var(--line) } nav a { margin-right: 1rem }
.when, .note { color: var(--soft); font-size: .85rem; margin: .25rem 0 } .when { overflow-wrap: anywhere }
.cards { display: flex; flex-wrap: wrap; gap: .5rem; margin: .75rem 0 0 }
.cards div { background: var(--card); border-radius: .5rem; padding: .5rem .75rem }
dt { color: var(--soft); font-size: .85rem } dd { margin: 0; font-variant-numeric: tabular-nums }
article { background: var(--card); border-radius: .5rem; padding: .5rem .75rem; margin: .5rem 0 }
article p { margin: .25rem 0 } .prompt { font-weight: 600 }
.prompt, .text { white-space: pre-wrap; overflow-wrap: anywhere }
.answers { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .25rem 1.5rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .75rem }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .5rem }
figcaption { font-size: .85rem; overflow-wrap: anywhere } svg { display: block; width: 100%; height: auto }
polyline { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
polyline.raw { stroke-width: 1; opacity: .35 } .grid { stroke: var(--edge) }
svg text { font-size: 10px; fill: var(--soft) } text.y { text-anchor: end; dominant-baseline: middle }
text.x { text-anchor: middle }
details { margin: .75rem 0 } summary { cursor: pointer }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem }
th, td { text-align: left; padding: .15rem .75rem .15rem 0; border-bottom: 1px solid var(--edge); vertical-align: top }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere } th { font-weight: 500 }
.changed { color: var(--mark) }
@media (max-width: 40rem) { .answers { grid-template-columns: 1fr } body { padding: .75rem } }
"""
