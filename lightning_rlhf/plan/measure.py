"""Runs a stage's own step on tensors without numbers, and tells what lives in each stretch of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_rlhf.functional.logprobs import LARGE_CHUNK
from lightning_rlhf.models import Policy
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.plan.fakes import fake_tensors
from lightning_rlhf.plan.meter import Meter, Segment, few_blocks
from lightning_rlhf.plan.models import copy_of, layers_of, take_weights_away, vocabulary_of
from lightning_rlhf.plan.ranks import one_rank
from lightning_rlhf.plan.rollouts import UPDATE, iteration
from lightning_rlhf.plan.shapes import Shape
from lightning_rlhf.stages.base import Stage
from lightning_rlhf.stages.rl import RLStage
from lightning_rlhf.strategies.parallel import SequenceParallel, TensorParallel

#: Layers are alike: two depths tell the others.
DEPTHS = (2, 4)


@dataclass(frozen=True)
class Mode:
    """How a stage is run.

    Args:
        precision: The Trainer's.
        cast: Trained models are in 16 bits, as under ZeRO and Gemini, and there is no autocast.
        sharded: ZeRO and Gemini: a backward pass must follow each forward pass.
        checkpointing: Activations are computed again in the backward pass.
        fused_lists: As on GPUs, the optimizer steps all tensors at once, and the head makes large blocks of logits.
        clip: The Trainer's ``gradient_clip_val``.
        tp: Ranks that hold each layer of a copy together; what one of them takes is told.
        sp: Ranks that run each row of a copy together.
    """

    precision: str = "32-true"
    cast: torch.dtype | None = None
    sharded: bool = False
    checkpointing: bool = False
    fused_lists: bool = False
    clip: float | None = None
    tp: int = 1
    sp: int = 1


class Outer(NamedTuple):
    """Weights outside of the layers of all models.

    Attributes:
        trained: Bytes of those that are trained.
        elements: Their number.
        frozen: Bytes of the others.
    """

    trained: float
    elements: float
    frozen: float


@dataclass(frozen=True)
class Found:
    """What a run shows.

    Args:
        segments: The stretches of an optimizer step that is not the first.
        trained: Bytes of the weights that are trained.
        elements: Their number.
        largest: Elements of the largest of them.
        together: Elements that one optimizer trains, at most: its gradients are exchanged apart from others'.
        frozen: Bytes of all other weights and buffers.
        gradients: Bytes of all gradients.
        states: Bytes of optimizer states.
        policy: Bytes of the model that samples, or is exported.
        scoring: Floating-point operations of a micro-batch before the updates, in reinforcement learning.
        updating: Those of a micro-batch in an update.
        front: Embeddings that are no head.
        back: Norms and heads that are no embeddings.
    """

    segments: tuple[Segment, ...]
    trained: float
    elements: float
    largest: float
    together: float
    frozen: float
    gradients: float
    states: float
    policy: float
    scoring: float
    updating: float
    front: Outer
    back: Outer

    def flops(self, shape: Shape) -> float:
        """Floating-point operations of a rank in a step, or in an iteration after its rollout.

        Args:
            shape: The micro-batch that was run.
        """
        return shape.passes * (self.scoring * shape.minibatches + self.updating * shape.updates)


def measure(stage: Stage, shape: Shape, mode: Mode, layers: int | None = None) -> Found:
    """Tells what a step of a stage takes.

    Args:
        stage: With the names of its models, none of which is loaded.
        shape: The micro-batch.
        mode: How it is run.
        layers: Layers of each model. None: as many as its config says.
    """
    return extend(lambda depth: run(stage, shape, mode, depth), layers or layers_of(stage))


def extend(look: Callable[[int], Found], layers: int) -> Found:
    """Tells what so many layers take, by one run or by two that have fewer.

    Args:
        look: Runs a number of layers.
        layers: Number of layers.
    """
    if layers <= DEPTHS[1]:
        return look(layers)
    low, high = map(look, DEPTHS)
    return between(low, high, (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


_FLOPS = ("scoring", "updating")


def between(low: Found, high: Found, share: float) -> Found:
    """What lies on the line through two runs, which have the same stretches.

    Args:
        low: At 0.
        high: At 1.
        share: Where to look, which may be beyond 1.
    """

    def line(a: float, b: float) -> float:
        return a + (b - a) * share

    def lines(a: Counter[str], b: Counter[str]) -> Counter[str]:
        return Counter({kind: max(0, round(line(a[kind], b[kind]))) for kind in {**a, **b}})

    segments = []
    for a, b in zip(low.segments, high.segments, strict=True):
        flops = round(line(a.flops, b.flops))
        segments.append(Segment(a.name, lines(a.peak, b.peak), flops, lines(a.held, b.held)))
    names = (
        "trained",
        "elements",
        "largest",
        "together",
        "frozen",
        "gradients",
        "states",
        "policy",
        "scoring",
        "updating",
    )
    numbers: dict[str, Any] = {name: line(getattr(low, name), getattr(high, name)) for name in (*names, *_FLOPS)}
    return replace(low, segments=tuple(segments), **numbers)


def run(stage: Stage, shape: Shape, mode: Mode, layers: int) -> Found:
    """Runs two optimizer steps of a stage on fake tensors, and tells of the second.

    Args:
        stage: See :func:`measure`.
        shape: The micro-batch.
        mode: How it is run.
        layers: Layers of each model.
    """
    meter, module = Meter(-(-vocabulary_of(stage) // mode.tp)), copy_of(stage)
    with (
        one_rank(mode.tp, mode.sp) as mesh,
        fake_tensors(),
        meter,
        few_blocks(meter),
        contextlib.redirect_stdout(None),
    ):
        take_weights_away(module, layers, mode.checkpointing)
        module.configure_model()
        if mesh is not None and mode.tp > 1:
            TensorParallel(mesh.tensor, torch.device("cpu")).cut_models(module)
        if mesh is not None and mode.sp > 1:
            SequenceParallel(mesh.sequence, mode.tp).spread_models(module)
        if mode.cast is not None:
            _cast(module, mode.cast)
        return watch(module, shape, mode, meter)


def watch(module: Stage, shape: Shape, mode: Mode, meter: Meter) -> Found:
    """As :func:`run`, on a stage with models, under a meter that is counting."""
    any_module: Any = module
    any_module.configure_callbacks = lambda: []  # signals are not ours
    any_module.log = lambda *args, **kwargs: None
    if isinstance(module, RLStage):
        any_module.training_step = partial(iteration, module, shape, meter.begin, not mode.sharded)
    weights = [*module.parameters(), *module.buffers()]
    watcher = _Watcher(meter, mode.fused_lists)
    watcher.find_places(module)
    passes = min(2, shape.passes)
    each = 1 if isinstance(module, RLStage) else passes
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=_Still("cpu"),
        precision=mode.precision if mode.cast is None else "32-true",  # type: ignore[arg-type]
        max_steps=2,
        max_epochs=1,
        accumulate_grad_batches=each,
        gradient_clip_val=None if isinstance(module, RLStage) else mode.clip,
        callbacks=[watcher],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    meter.mark(weights, "weights")
    batches: Any = [shape.batch() for _ in range(2 * each)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    meter.begin("end")
    trained = [p for p in module.parameters() if p.requires_grad]
    own = sum(p.nbytes for p in trained)
    names = [s.name for s in meter.segments]
    start = names.index(UPDATE) if UPDATE in names else 0
    scoring, updating = (sum(s.flops for s in part) for part in (meter.segments[:start], meter.segments[start:]))
    return Found(
        segments=tuple(s for s in meter.segments if s.name != _INNER),
        trained=own,
        elements=sum(p.numel() for p in trained),
        largest=max(p.numel() for p in trained),
        together=max(sum(p.numel() for g in o.param_groups for p in g["params"]) for o in trainer.optimizers),
        frozen=meter.now["weights"] - own,
        gradients=watcher.gradients,
        states=meter.now["states"],
        policy=sum(p.nbytes for p in module.model_to_export.parameters()),
        scoring=scoring,
        updating=updating / passes,
        front=(ends := _outside(module))[0],
        back=ends[1],
    )


_INNER = "inner layers"


class _Still(SingleDeviceStrategy):
    """Leaves the model where it is."""

    def model_to_device(self) -> None:
        """Does nothing."""


class _Watcher(L.Callback):
    """Tells a meter where a step is, and what tensors are for."""

    def __init__(self, meter: Meter, fused_lists: bool) -> None:
        self.meter, self.fused_lists = meter, fused_lists
        self.gradients = 0

    def find_places(self, module: nn.Module) -> None:
        """Watches the layers of all models in a module."""
        for name, part in module.named_modules():
            if isinstance(part, Backbone):
                part.register_forward_pre_hook(self._at(f"{name}: embeddings"))
                layers = _layers(part.transformer)
                for i, layer in enumerate(layers):
                    place = f"{name}: first layer" if i == 0 else f"{name}: last layer" if i == len(layers) - 1 else ""
                    layer.register_forward_pre_hook(self._at(place))
                    layer.register_forward_hook(partial(self._left, place))
                layers[-1].register_forward_hook(self._at(f"{name}: head"))
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._mark_gradient)

    def _at(self, place: str) -> Any:
        return lambda *args: self.meter.begin(place or _INNER)

    def _left(self, place: str, module: nn.Module, args: Any, output: Any) -> None:
        out = output[0] if isinstance(output, tuple) else output
        if out.requires_grad:
            out.register_hook(lambda gradient: self.meter.begin(f"{place}, backward" if place else _INNER))

    def _mark_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.meter.mark([parameter.grad], "gradients")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lets optimizers step, and heads make logits, as on the device that is planned for."""
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            if self.fused_lists and group.get("foreach", 0) is None and not group.get("fused"):
                group["foreach"] = True
        for part in pl_module.modules() if self.fused_lists else ():
            if isinstance(part, Policy) and part.chunk is None:
                part.chunk = LARGE_CHUNK

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Counts all gradients: none is missing here."""
        self.gradients = self.meter.now["gradients"]
        self.meter.begin("optimizer step")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Knows the states after the first step, with which the steady part begins, and weights that were cast."""
        if trainer.global_step == 1 and not self.meter.now["states"]:
            self.meter.mark([*pl_module.parameters(), *pl_module.buffers()], "weights")
            values = (v for optimizer in trainer.optimizers for each in optimizer.state.values() for v in each.values())
            self.meter.mark((v for v in values if isinstance(v, Tensor) and v.ndim), "states")
            self.meter.begin("next step")
            self.meter.segments.clear()


def _outside(module: nn.Module) -> tuple[Outer, Outer]:
    """Weights before and behind the layers, those that are embeddings and head left out."""
    front: dict[int, Tensor] = {}
    back: dict[int, Tensor] = {}
    for part in module.modules():
        if isinstance(part, Backbone):
            model: Any = part.transformer
            within = {id(p) for p in _layers(model).parameters()}
            embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
            first = {id(p): p for p in embeddings.parameters()}
            front |= {key: p for key, p in first.items() if head is None or all(p is not h for h in head.parameters())}
            back |= {id(p): p for p in part.parameters() if id(p) not in within and id(p) not in first}
    return _outer(front), _outer(back)


def _outer(found: Mapping[int, Tensor]) -> Outer:
    trained = [p for p in found.values() if p.requires_grad]
    own = sum(p.nbytes for p in trained)
    return Outer(own, sum(p.numel() for p in trained), sum(p.nbytes for p in found.values()) - own)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts trained models as ZeRO and Gemini do: whole children, frozen weights in them, but no constants."""
    for child in module.children():
        if any(p.requires_grad for p in child.parameters()):
            for p in child.parameters():
                if p.is_floating_point():
                    p.data = p.data.to(dtype)
