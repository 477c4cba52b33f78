"""Answers whether a run fits, how fast it is, and which other layouts fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, get_args

from lightning_rlhf.plan.cache import rollout, sampled_together
from lightning_rlhf.plan.layout import Layout, Moment, moments, peak
from lightning_rlhf.plan.measure import Found, Mode, between, extend, run
from lightning_rlhf.plan.models import config_of
from lightning_rlhf.plan.shapes import Shape, shape_of
from lightning_rlhf.plan.speed import Device, rollout_seconds, step_seconds
from lightning_rlhf.plan.stages import stage_of, waiting
from lightning_rlhf.stages.base import Stage
from lightning_rlhf.stages.rl import RLStage
from lightning_rlhf.strategies.parallel.pipeline import stage_layers
from lightning_rlhf.strategies.parallel.sequence import check_heads
from lightning_rlhf.strategies.parallel.tensor import check_divides, plan_of
from lightning_rlhf.strategies.precision import MODES, ColossalAIPrecision, Plugin

#: Styles of transformers' plans that can be cut.
_CUTS = {"colwise", "rowwise", "replicated_with_grad_allreduce"}
PLUGINS: tuple[Plugin, ...] = get_args(Plugin)


@dataclass(frozen=True)
class Settings:
    """What a run has beside its stage and data.

    Args:
        devices: Number of devices.
        memory: Bytes of each.
        device: What each does in a second.
        precision: The Trainer's.
        accumulate: The Trainer's micro-batches per step.
        clip: The Trainer's ``gradient_clip_val``.
        on_gpu: Whether it runs on GPUs.
        margin: Share of the memory that nothing may use.
    """

    devices: int
    memory: int
    device: Device
    precision: str = "32-true"
    accumulate: int = 1
    clip: float | None = None
    on_gpu: bool = True
    margin: float = 0.05

    @property
    def room(self) -> float:
        """Bytes of a device that a run may take."""
        return self.memory * (1 - self.margin)


class Answer(NamedTuple):
    """What a layout takes.

    Attributes:
        layout: The layout.
        shape: The micro-batch.
        places: What a rank holds at all places of a step.
        most: The one where most is taken.
        seconds: Of a step, or an iteration.
        tokens_per_second: Over all devices.
        fits: Whether it fits into the memory.
    """

    layout: Layout
    shape: Shape
    places: list[Moment]
    most: Moment
    seconds: float
    tokens_per_second: float
    fits: bool


class Planner:
    """Plans a stage.

    Args:
        stage: With the names of its models, none of which is loaded.
        data: Its data module; no row is read.
        settings: What else a run has.
    """

    def __init__(self, stage: Stage, data: Any, settings: Settings) -> None:
        self.stage, self.data, self.settings = stage, data, settings
        self._found: dict[tuple[Mode, Shape, int], Found] = {}

    @cached_property
    def config(self) -> Any:
        """The config of the model that is trained."""
        return config_of(self.stage)

    @property
    def _name(self) -> str:
        return str((self.config.architectures or [self.config.model_type])[0])

    def layout(
        self, plugin: Plugin = "ddp", tp: int = 1, rows: int | None = None, pp: int = 1, sp: int = 1, **settings: Any
    ) -> Layout:
        """Makes a layout of all devices.

        Args:
            plugin: What is sharded.
            tp: Ranks that hold each layer together.
            rows: Rows of a micro-batch. None: as many as the settings say.
            pp: Stages to which layers are dealt.
            sp: Ranks that run each row together.
            settings: Further fields of :class:`Layout`.

        Raises:
            ValueError: ``tp``, ``pp`` or ``sp`` divides the devices, or the model, badly; or the family has no plan for
                ``tp``; or the plugin does not go with it, or does not have the precision.
        """
        devices = self.settings.devices
        if devices % tp:
            fits = ", ".join(str(k) for k in range(1, devices + 1) if devices % k == 0)
            raise ValueError(f"tp={tp} does not divide {devices} devices. Set tp to one of {fits}.")
        if tp > 1:
            plan_of(self.config, self._name)
            check_divides(self.config, tp, self._name)
        if pp > 1:
            self._check_stages(plugin, tp, pp)
        if sp > 1:
            self._check_stretches(plugin, tp, pp, sp)
        masters = plugin != "ddp" and ColossalAIPrecision(self.settings.precision, plugin).master_weights
        checkpointing = settings.pop("checkpointing", self.stage.load.gradient_checkpointing)
        copies = devices // (tp * pp * sp)
        rows = rows or shape_of(self.stage, self.data, copies, self.settings.accumulate).rows
        return Layout(plugin, tp, copies, checkpointing, rows, masters=masters, pp=pp, sp=sp, **settings)

    def _check_share(self, name: str, size: int, tp: int) -> None:
        devices = self.settings.devices
        if devices % (tp * size):
            fits = ", ".join(str(k) for k in range(1, devices // tp + 1) if devices % (tp * k) == 0)
            raise ValueError(
                f"{name}={size} does not divide {devices} devices for tp={tp}. Set {name} to one of {fits}."
            )

    def _check_stretches(self, plugin: Plugin, tp: int, pp: int, sp: int) -> None:
        self._check_share("sp", sp, tp)
        check_heads(self.config, sp, self._name, tp)
        if pp > 1:
            raise ValueError("pp and sp do not go together, since both cut rows. Leave out one; tp goes with either.")
        if plugin == "gemini":
            raise ValueError("sp does not support Gemini's chunks. Use plugin ddp, zero1 or zero2 with sp.")

    def _check_stages(self, plugin: Plugin, tp: int, pp: int) -> None:
        self._check_share("pp", pp, tp)
        layers = self.config.num_hidden_layers
        if pp > layers:
            raise ValueError(f"pp={pp} is more than the {layers} layers of {self._name}. Set pp to at most {layers}.")
        if plugin == "gemini":
            raise ValueError("Gemini's chunks span the layers that pp deals to ranks. Use plugin ddp, zero1 or zero2.")

    def answer(self, layout: Layout) -> Answer:
        """Tells what a layout takes, on the rank where it is most."""
        shape, whole = self._look(layout)
        manual = isinstance(self.stage, RLStage)
        stages = [whole] if layout.pp == 1 else self._stages(layout, shape, whole)
        found, places = max(
            ((each, moments(each, layout, manual)) for each in stages), key=lambda pair: peak(pair[1]).on_device
        )
        seconds = step_seconds(
            found, shape, layout, self.settings.device, self.config.hidden_size, self.config.num_hidden_layers
        )
        if isinstance(self.stage, RLStage):
            item = 2 if self.settings.precision.startswith(("bf16", "16")) or self.stage.load.dtype != "float32" else 4
            held = min(places, key=lambda place: place.on_device)
            places.insert(0, sampling := rollout(self.stage, self.config, shape, whole, layout, held, item))
            together = sampled_together(self.stage, shape)
            counts = (together.rows, together.rounds, shape.answer, sampling.parts["rollout cache"], item)
            seconds += rollout_seconds(*counts, whole, layout, self.settings.device)
        most = peak(places)
        speed = shape.step_tokens * layout.copies / seconds
        return Answer(layout, shape, places, most, seconds, speed, most.on_device <= self.settings.room)

    def search(self, tell: Callable[[Answer], object] = lambda answer: None) -> list[Answer]:
        """Tells what layouts take, those that fit first, the fastest first.

        More ranks per copy of the model are tried until something fits, and then once more.

        Args:
            tell: Called with each answer as it comes.
        """
        found: list[Answer] = []
        enough = self.settings.devices
        for tp, pp, sp in self._ways():
            if tp * pp * sp > enough:
                break
            for answer in self._with(tp, pp, sp):
                tell(answer)
                found.append(answer)
            if any(answer.fits for answer in found):
                enough = min(enough, 2 * tp * pp * sp)
        return sorted(found, key=lambda answer: (not answer.fits, -answer.tokens_per_second, answer.most.on_device))

    def _ways(self) -> list[tuple[int, int, int]]:
        """``tp``, ``pp`` and ``sp`` of copies that ranks can hold, those of few ranks first."""
        devices, layers = self.settings.devices, self.config.num_hidden_layers
        sizes = [k for k in range(1, devices + 1) if devices % k == 0]
        ways = [(tp, pp, 1) for tp in sizes for pp in sizes if pp <= layers]
        ways += [(tp, 1, sp) for tp in sizes for sp in sizes[1:] if self.config.num_attention_heads % (tp * sp) == 0]
        fit = [(tp, pp, sp) for tp, pp, sp in ways if devices % (tp * pp * sp) == 0 and self._divides(tp)]
        return sorted(fit, key=lambda way: (math.prod(way), way[1:]))

    def _with(self, tp: int, pp: int, sp: int) -> Iterator[Answer]:
        """Answers for all layouts with ``tp`` times ``pp`` times ``sp`` ranks per copy."""
        copies = self.settings.devices // (tp * pp * sp)
        most = shape_of(self.stage, self.data, copies, self.settings.accumulate).rows
        for plugin in PLUGINS if copies * sp > 1 else PLUGINS[:1]:
            if self._has(plugin) and not (plugin == "gemini" and tp * pp * sp > 1):
                for checkpointing in (False, True):
                    for rows in sorted({most, -(-most // 2), -(-most // 4), 1}, reverse=True):
                        yield self.answer(self.layout(plugin, tp, rows, pp, sp, checkpointing=checkpointing))

    def _has(self, plugin: Plugin) -> bool:
        """True if a plugin supports the precision."""
        if plugin == "ddp":
            return True
        try:
            ColossalAIPrecision(self.settings.precision, plugin)
        except ValueError:
            return False
        return True

    def _divides(self, tp: int) -> bool:
        """Whether a copy can be held by so many ranks."""
        if tp == 1:
            return True
        plan = set((getattr(self.config, "base_model_tp_plan", None) or {}).values())
        if not plan or plan - _CUTS:
            return False
        try:
            check_divides(self.config, tp, self._name)
        except ValueError:
            return False
        return True

    def _look(self, layout: Layout) -> tuple[Shape, Found]:
        """The micro-batch of a layout, and what it takes with all layers."""
        most = shape_of(self.stage, self.data, layout.copies, self.settings.accumulate)
        shape = most._replace(rows=layout.rows) if layout.rows >= most.rows else most.with_rows(layout.rows)
        return shape, self._at(layout, shape, shape.rows)

    def _stages(self, layout: Layout, shape: Shape, whole: Found) -> list[Found]:
        """Computes what the first and the last stage of a pipeline hold."""
        found, parts = [], layout.parts
        slower = 1 / (layout.pp * (1 - waiting(layout.pp, parts)))
        ends = stage_layers(self.config.num_hidden_layers, layout.pp)
        for begin, end in (ends[0], ends[-1]):
            all_rows = self._at(layout, shape, shape.rows, end - begin)
            part = self._at(layout, shape, -(-shape.rows // parts), end - begin)
            stage = stage_of(all_rows, part, parts, first=begin == 0, summed=shape.kind == "instructions")
            found.append(replace(stage, scoring=whole.scoring * slower, updating=whole.updating * slower))
        return found

    def _at(self, layout: Layout, shape: Shape, rows: int, layers: int | None = None) -> Found:
        """Computes what a number of rows takes. It interpolates between one row and the largest micro-batch."""
        sharded, on_gpu, clip = layout.plugin != "ddp", self.settings.on_gpu, self.settings.clip
        cast = MODES[self.settings.precision][1] if sharded else None
        sharded = sharded and isinstance(self.stage, RLStage)  # others run alike, so that one run serves both
        mode = Mode(self.settings.precision, cast, sharded, layout.checkpointing, on_gpu, clip, layout.tp, layout.sp)
        most = shape_of(self.stage, self.data, layout.copies, self.settings.accumulate).rows
        if rows >= most:
            return self._measured(mode, shape._replace(rows=rows), layers)
        low, high = (self._measured(mode, shape._replace(rows=n), layers) for n in (1, most))
        return between(low, high, (rows - 1) / (most - 1))

    def _measured(self, mode: Mode, shape: Shape, layers: int | None) -> Found:
        alike = shape._replace(passes=min(2, shape.passes), prompts=0, updates=1)
        return extend(partial(self._run, mode, alike), layers or self.config.num_hidden_layers)

    def _run(self, mode: Mode, shape: Shape, depth: int) -> Found:
        """Runs so many layers, once."""
        if (key := (mode, shape, depth)) not in self._found:
            self._found[key] = run(self.stage, shape, mode, depth)
        return self._found[key]
