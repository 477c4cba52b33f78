"""A model's forward pass over stages: a call like any other, whose results and gradients are on every stage.

A batch is dealt into micro-batches of whole trees, which may have any lengths. Every rank reads the same batch, so all
know the shapes that are exchanged. The forward pass runs all micro-batches, and the backward pass runs them in reverse
(GPipe, Huang et al. 2019). Exchanges are functions of one ordinary graph, so hooks of DDP and of ZeRO see each
parameter's gradient once, as without stages. All ranks exchange in the same order, because autograd runs what is ready
in the reverse order of its creation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rlhf.data import PackedBatch
from lightning_rlhf.data.packed import deal
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.strategies.parallel.noise import has_dropout, own_stream
from lightning_rlhf.utils.collectives import Ranks


class Tie(NamedTuple):
    """A trained weight that the first stage has as embeddings and the last one as head.

    Attributes:
        parameter: The weight.
        owners: This rank's modules that read it, with its name in them.
    """

    parameter: nn.Parameter
    owners: list[tuple[nn.Module, str]]


class PipelineStage:
    """This rank's stage of a model.

    Args:
        backbone: The model. Its layers of the stages before return :attr:`received`, and those behind what they get.
        ranks: The stages' ranks, in order.
        micro_batches: Maximum number of micro-batches per call.
        ties: Weights whose gradients the two ends sum.

    Attributes:
        received: Hidden states of the stage before, while a micro-batch runs.
    """

    def __init__(self, backbone: Backbone, ranks: Ranks, micro_batches: int, ties: Sequence[Tie] = ()) -> None:
        self.backbone, self.ranks, self.micro_batches, self.ties = backbone, ranks, micro_batches, ties
        self.first, self.last = ranks.place == 0, ranks.place == ranks.size - 1
        self.received: Tensor | None = None
        self._noise: float | None = None
        self._sending: list[tuple[Any, Tensor]] = []

    # ------------------------------------------------------------------------------------------------- calls

    def forward(self, batch: PackedBatch, *args: Any, weights: Tensor | None = None, **kwargs: Any) -> Any:
        """Stands in for the model's ``forward``. All stages must call it with the same arguments.

        Args:
            batch: A packed batch on the model's device.
            args: Other arguments of the model's ``forward``.
            weights: (N,) weights of scored tokens, if the model takes them.
            kwargs: Other arguments of the model's ``forward``.

        Returns:
            What the model returns, on every stage.
        """
        self.flush()
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        noisy = self.backbone.training and (self._noise is not None or has_dropout(self.backbone))
        parts = deal(batch, self.micro_batches)
        options = [kwargs] * len(parts)
        if weights is not None:
            pieces = weights.split([part.num_scored for part in parts])
            options = [{**kwargs, "weights": piece} for piece in pieces]
        with own_stream(self.ranks.place) if noisy else nullcontext(), torch.set_grad_enabled(trains):
            token = torch.zeros((), device=batch.input_ids.device, requires_grad=trains)
            with self._tied(token) as token:
                found = [self._run(part, token, args, each) for part, each in zip(parts, options, strict=True)]
            return self._share(found)

    @contextmanager
    def noisy_embeddings(self, batch: PackedBatch, alpha: float | None) -> Iterator[None]:
        """Stands in for the policy's ``noisy_embeddings``: the first stage adds it to each micro-batch."""
        former, self._noise = self._noise, alpha
        try:
            yield
        finally:
            self._noise = former

    def flush(self) -> None:
        """Waits until all that was sent has left."""
        while self._sending:
            self._sending.pop()[0].wait()

    def _run(self, part: PackedBatch, token: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs a micro-batch through this stage: results at the last one, otherwise a token for the backward pass."""
        backbone: Any = self.backbone
        whole = type(backbone)
        if not self.first:
            states = _Receive.apply(token, self, self._shape(part), self.dtype)  # type: ignore[no-untyped-call]
            self.received = states
        try:
            noise = whole.noisy_embeddings(backbone, part, self._noise) if self.first and self._noise else nullcontext()
            with noise:
                if self.last:
                    return whole.forward(backbone, part, *args, **kwargs)
                states = backbone.trunk(part, *args, **kwargs).states
        finally:
            self.received = None
        return _Send.apply(states.to(self.dtype), token, self)  # type: ignore[no-untyped-call]

    def _shape(self, part: PackedBatch) -> tuple[int, int, int]:
        """Shape of a micro-batch's hidden states between layers."""
        width = self.backbone.transformer.config.get_text_config().hidden_size
        if self.backbone.layout != "padded":
            return 1, part.num_tokens, width
        longest = max(p.length + b.length for p, branches in part.forest.trees for b in branches)
        return part.num_sequences, longest, width

    @property
    def dtype(self) -> torch.dtype:
        """Data type of hidden states between stages."""
        embeddings: Any = self.backbone.transformer.get_input_embeddings()
        dtype: torch.dtype = embeddings.weight.dtype
        return dtype

    # ------------------------------------------------------------------------------------------------- results

    def _share(self, found: list[Any]) -> Any:
        """Joins the micro-batches' results, and gives them to all stages."""
        kind: Any = None
        values: list[Tensor | None] = []
        said: list[Any] = [None]
        if self.last:
            kind = type(found[0]) if isinstance(found[0], tuple) else None
            columns = zip(*found, strict=True) if kind else [found]
            values = [_join(column) for column in columns]
            said = [(kind, [None if v is None else (v.shape, v.dtype, v.requires_grad) for v in values])]
        dist.broadcast_object_list(said, self.ranks.members[-1], group=self.ranks.group)
        kind, described = said[0]
        inputs = [v for v in values if v is not None] if self.last else found
        results = iter(_Share.apply(self, [d for d in described if d is not None], *inputs))  # type: ignore[no-untyped-call]
        shared = [None if d is None else next(results) for d in described]
        return shared[0] if kind is None else kind(*shared)

    @contextmanager
    def _tied(self, token: Tensor) -> Iterator[Tensor]:
        """Within it, modules read tied weights whose gradients are summed when all others are known.

        Yields:
            A token on which all that this stage receives depends, so that it has its gradient first.
        """
        if not (self.ties and token.requires_grad):
            yield token
            return
        token, *weights = _SumEnds.apply(self, token, *(tie.parameter for tie in self.ties))  # type: ignore[no-untyped-call]
        with ExitStack() as stack:
            for tie, weight in zip(self.ties, weights, strict=True):
                for module, name in tie.owners:
                    vars(module)[name] = weight  # found before the parameter of that name
                    stack.callback(vars(module).pop, name)
            yield token

    # ------------------------------------------------------------------------------------------------- exchanges

    def send(self, value: Tensor, place: int) -> None:
        """Sends a tensor to a stage, and does not wait."""
        value = value.contiguous()
        self._sending.append((dist.isend(value, self.ranks.members[place], group=self.ranks.group), value))

    def receive(self, value: Tensor, place: int) -> Tensor:
        """Fills a tensor with one from another stage."""
        dist.recv(value, self.ranks.members[place], group=self.ranks.group)
        return value


def stand_in(layer: nn.Module, forward: Callable[..., Any]) -> Callable[[], Any]:
    """Lets a module run something else. Returns a function that undoes it."""
    vars(layer)["forward"] = forward
    return lambda: vars(layer).pop("forward")


def stands_in(layer: nn.Module) -> bool:
    """Whether a module runs something else now."""
    return "forward" in vars(layer)


def _join(values: Sequence[Tensor | None]) -> Tensor | None:
    """Joins one result of all micro-batches: numbers are summed, others follow each other."""
    found = [v for v in values if v is not None]
    if not found:
        return None
    return torch.stack(found).sum() if found[0].dim() == 0 else torch.cat(found)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, stage: PipelineStage, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        ctx.stage, ctx.token = stage, torch.zeros_like(token)
        return stage.receive(torch.empty(shape, dtype=dtype, device=token.device), stage.ranks.place - 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.stage.send(gradient, ctx.stage.ranks.place - 1)
        return ctx.token, None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, token: Tensor, stage: PipelineStage) -> Tensor:
        ctx.stage, ctx.like = stage, (states.shape, states.dtype, states.device)
        stage.send(states, stage.ranks.place + 1)
        return torch.zeros_like(token)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        shape, dtype, device = ctx.like
        found = torch.empty(shape, dtype=dtype, device=device)
        return ctx.stage.receive(found, ctx.stage.ranks.place + 1), gradient, None


class _Share(torch.autograd.Function):
    """Results of the last stage on all. Each stage's loss is the same, so each has their gradients already."""

    @staticmethod
    def forward(
        ctx: Any, stage: PipelineStage, described: list[tuple[Any, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.stage, ctx.inputs = stage, len(inputs)
        exact = any(dtype == torch.float64 for _, dtype, _ in described)
        sizes = [shape.numel() for shape, _, _ in described]
        flat = torch.empty(sum(sizes), dtype=torch.float64 if exact else torch.float32, device=inputs[0].device)
        if stage.last:
            torch.cat([value.reshape(-1).to(flat.dtype) for value in inputs], out=flat)
        dist.broadcast(flat, stage.ranks.members[-1], group=stage.ranks.group)
        pieces = zip(flat.split(sizes), described, strict=True)
        found = tuple(piece.to(dtype).view(shape).clone() for piece, (shape, dtype, _) in pieces)
        ctx.mark_non_differentiable(*(v for v, (_, _, wanted) in zip(found, described, strict=True) if not wanted))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if ctx.stage.last:
            return None, None, *gradients
        like = next(g for g in gradients if g is not None)
        return None, None, *(like.new_zeros(()) for _ in range(ctx.inputs))


class _SumEnds(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stage: PipelineStage, token: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.stage = stage
        return token.view_as(token), *(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, token: Tensor, *gradients: Tensor) -> tuple[Any, ...]:
        stage, found = ctx.stage, []
        for gradient in gradients:
            if stage.last:
                stage.send(gradient, 0)
                found.append(stage.receive(torch.empty_like(gradient), 0))
            else:
                total = gradient + stage.receive(torch.empty_like(gradient), stage.ranks.size - 1)
                stage.send(total, stage.ranks.size - 1)
                found.append(total)
        return None, token, *found
