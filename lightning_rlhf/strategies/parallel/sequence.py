"""Sequence parallelism: each rank runs a stretch of every packed row, with whole weights.

Layers look at one token at a time, but for attention. There ranks exchange tokens for heads (all-to-all, as in
Jacobs et al. 2023, DeepSpeed-Ulysses): each has all tokens of some heads, so that tree attention runs as it is, with
its windows and soft caps, and behind it they exchange back. A stretch may end within a tree or a branch. Heads run on
each rank's own scored tokens; what they give, a few numbers a token, is gathered, so that losses and metrics are the
same on all ranks.

A rank's gradients are a part of the whole, since each loss reads what all ranks computed. Where results are gathered
they are multiplied by the number of ranks: then the mean over the ranks is the sum of the parts. So these ranks belong
to the group in which a plugin averages gradients anyway: they are exchanged in one go, once a step under accumulation,
and ZeRO shards states over the ranks too. Parameters outside the models, which see the same numbers on all ranks, come
right as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_rlhf.data import PackedBatch
from lightning_rlhf.data.packed import Span
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.models.tree_attention import SharedForest
from lightning_rlhf.strategies.parallel.functions import part_of
from lightning_rlhf.strategies.parallel.noise import BlockNoise
from lightning_rlhf.utils.collectives import Ranks


class SequenceParallel:
    """Models that ranks run together, each a stretch of the row, until :meth:`undo`.

    Args:
        ranks: The ranks.
        slices: Number of slices of each layer, under tensor parallelism.
    """

    def __init__(self, ranks: Ranks, slices: int = 1) -> None:
        self.ranks, self.slices = ranks, slices
        self._undo: list[Callable[[], Any]] = []

    def spread_models(self, module: nn.Module) -> None:
        """Lets the ranks run all models in a module that read packed batches together.

        Raises:
            ValueError: There is none, or one cannot; the message says why.
        """
        found = {name: part for name, part in module.named_modules() if isinstance(part, Backbone)}
        if not found:
            raise ValueError(
                f"sp={self.ranks.size} cuts the rows of packed batches, and {type(module).__name__} has no model that "
                "reads them (Policy, RewardModel or ValueModel). Leave out sp."
            )
        for name, backbone in found.items():
            check_rows(backbone, name, self.ranks.size, self.slices)
        for backbone in found.values():
            self._spread(backbone)

    def _spread(self, backbone: Backbone) -> None:
        ranks = self.ranks  # functions, not methods: a copy of the model has the same hooks

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            given = dict(kwargs)
            batch, *rest = args or (given.pop("batch"),)
            stretch = cut_row(batch, ranks)
            if given.get("weights") is not None:
                given["weights"] = given["weights"][stretch.scored]
            return (stretch, *rest), given

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return _whole(output, args[0], ranks)

        self._undo.append(backbone.register_forward_pre_hook(enter, with_kwargs=True).remove)
        self._undo.append(backbone.register_forward_hook(leave).remove)
        self._undo.extend(BlockNoise(ranks).install(backbone))  # other dropout on other tokens

    def undo(self) -> None:
        """Lets each rank run whole rows again."""
        while self._undo:
            self._undo.pop()()


def check_rows(backbone: Backbone, name: str, size: int, slices: int = 1) -> None:
    """Checks that a model's rows can be cut.

    Args:
        backbone: The model.
        name: Its name, for messages.
        size: Number of ranks.
        slices: Number of slices of each layer; each has a part of the heads.

    Raises:
        ValueError: They cannot; the message says what would do.
    """
    model = backbone.transformer
    kind = type(model).__name__
    if backbone.layout == "padded":
        raise ValueError(
            f"sp={size} cuts packed rows, but the batches of {name} ({kind}) are padded. Set load.layout to tree, if "
            "its family has it, or leave out sp."
        )
    config: Any = model.config.get_text_config()
    check_heads(config, size, kind, slices)
    scaling = _rope_types(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    if longer := scaling & {"dynamic", "longrope"}:
        raise ValueError(
            f"sp={size} does not support {kind} with rope_type {min(longer)!r}, whose angles depend on the longest "
            "sequence of the whole row. Leave out sp."
        )


def check_heads(config: Any, size: int, name: str, slices: int = 1) -> None:
    """Checks that heads can be dealt to ranks evenly.

    Args:
        config: The text model's.
        size: Number of ranks.
        name: The model's, for the message.
        slices: Number of slices of each layer; each has a part of the heads.

    Raises:
        ValueError: They cannot; the message has the numbers that would do.
    """
    heads: int = config.num_attention_heads // slices
    if heads % size:
        fits = [str(k) for k in range(2, heads + 1) if heads % k == 0]
        raise ValueError(
            f"sp={size} does not divide the {heads} attention heads of {name}{' on each rank' if slices > 1 else ''}. "
            f"{'Set sp to ' + ' or '.join(fits) if fits else 'No sp does: leave it out'}."
        )


def _rope_types(settings: Mapping[str, Any]) -> set[str]:
    """Types of rotary embeddings; there may be some for each kind of layer."""
    nested = [value for value in settings.values() if isinstance(value, Mapping)]
    return {str(each.get("rope_type", each.get("type"))) for each in (settings, *nested)}


# --------------------------------------------------------------------------------------------------- rows


@dataclass(eq=False, kw_only=True)
class Stretch(PackedBatch):
    """A rank's stretch of a packed row.

    Tokens, positions and what is read behind them are the rank's own; the trees are those of the whole row.

    Attributes:
        scored: (n,) numbers of the row's scored tokens that are predicted here.
        ended: (s,) numbers of its sequences that end here.
        counts: N and S of the whole row.
    """

    scored: Tensor
    ended: Tensor
    counts: tuple[int, int]


def cut_row(batch: PackedBatch, ranks: Ranks) -> Stretch:
    """Returns this rank's stretch of a row. A row with fewer tokens than ranks gets others that nothing reads."""
    missing = max(0, ranks.size - batch.num_tokens)
    lengths = [part_of(batch.num_tokens + missing, ranks, i)[1] for i in range(ranks.size)]
    start, length = part_of(batch.num_tokens + missing, ranks)
    trees, masks = batch.forest.trees, batch.forest.masks
    if missing:
        trees, masks = (*trees, (Span(batch.num_tokens, missing), ())), {}
    scored, ended = (_within(at, start, start + length) for at in (batch.predictor, batch.last))
    own = {
        "input_ids": F.pad(batch.input_ids, (0, missing)).narrow(0, start, length),
        "position_ids": F.pad(batch.position_ids, (0, missing)).narrow(0, start, length),
        "forest": StretchedForest(trees, masks, lengths=lengths, ranks=ranks),
        "predictor": batch.predictor[scored] - start,
        "target": batch.target[scored],
        "sequence": batch.sequence[scored],
        "weight": batch.weight[scored],
        "last": batch.last[ended] - start,
    }
    whole = {each.name: getattr(batch, each.name) for each in fields(PackedBatch)}
    return Stretch(**{**whole, **own}, scored=scored, ended=ended, counts=(batch.num_scored, batch.num_sequences))


def _within(at: Tensor, start: int, end: int) -> Tensor:
    """Returns which places are in a stretch. They are found on the host, so that all shapes are known there."""
    found = [i for i, place in enumerate(at.tolist()) if start <= place < end]
    return torch.tensor(found, dtype=torch.long, device=at.device)


@dataclass(eq=False, kw_only=True)
class StretchedForest(SharedForest):
    """The trees of a row that is cut over ranks.

    Attributes:
        lengths: Number of each rank's tokens.
        ranks: The ranks.
    """

    lengths: list[int]
    ranks: Ranks

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`SharedForest`. Of fewer key-value heads than ranks, each goes to several ranks."""
        size = self.ranks.size
        times = size // math.gcd(size, key.shape[1])
        if times > 1:
            key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
        given = (query, key, value)
        # (ranks, t, features of each rank's heads)
        rows = [x[0].unflatten(0, (size, -1)).transpose(1, 2).flatten(2) for x in given]
        flat = _exchange(torch.cat(rows, -1), self, to_heads=True)
        found = flat.split([row.shape[-1] for row in rows], -1)
        q, k, v = (
            mine.unflatten(-1, (-1, x.shape[-1])).transpose(0, 1)[None].to(x.dtype)
            for x, mine in zip(given, found, strict=True)
        )
        return q, k, v

    def own_heads(self, x: Tensor) -> Tensor:
        """See :class:`SharedForest`."""
        return x.chunk(self.ranks.size)[self.ranks.place]

    def to_tokens(self, outputs: Tensor) -> Tensor:
        """See :class:`SharedForest`."""
        pieces = _exchange(outputs[0].flatten(1), self, to_heads=False)  # (ranks, t, features of each rank's heads)
        own: Tensor = pieces.unflatten(-1, (-1, outputs.shape[-1])).transpose(0, 1).flatten(1, 2)
        return own[None]

    def own_tokens(self, x: Tensor) -> Tensor:
        """See :class:`SharedForest`."""
        padded = F.pad(x, (0, 0, 0, sum(self.lengths) - x.shape[1]))
        return padded.narrow(1, sum(self.lengths[: self.ranks.place]), self.lengths[self.ranks.place])


# --------------------------------------------------------------------------------------------------- exchanges


def _whole(output: Any, stretch: Stretch, ranks: Ranks) -> Any:
    """A model's output for the whole row: a tuple of tensors with names, or the scores of sequences."""
    if isinstance(output, Tensor):
        return _gather(output, stretch.ended, stretch.counts[1], ranks)
    found: dict[str, Tensor | None] = {}
    for name, value in output._asdict().items():
        if value is None:
            found[name] = None
        elif name == "loss":
            found[name] = cast(Tensor, _Sum.apply(value, ranks))  # type: ignore[no-untyped-call]
        else:
            at, count = (stretch.ended, 1) if name == "last_values" else (stretch.scored, 0)
            found[name] = _gather(value, at, stretch.counts[count], ranks)
    return output._replace(**found)


def _gather(x: Tensor, mine: Tensor, count: int, ranks: Ranks) -> Tensor:
    """Gathers ``count`` numbers of all ranks in the order of the row. ``mine`` says which are this rank's."""
    if x.dtype == torch.bool:
        return _gather(x.to(torch.uint8), mine, count, ranks).bool()
    return cast(Tensor, _Gather.apply(x, mine, count, ranks))  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mine: Tensor, count: int, ranks: Ranks) -> Tensor:
        out = x.new_zeros(count)
        out[mine] = x
        dist.all_reduce(out, group=ranks.group)
        ctx.save_for_backward(mine)
        ctx.size = ranks.size
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient[ctx.saved_tensors[0]] * ctx.size, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.size = ranks.size
        x = x.clone()
        dist.all_reduce(x, group=ranks.group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.size, None


def _exchange(x: Tensor, forest: StretchedForest, to_heads: bool) -> Tensor:
    """Exchanges (ranks, t, E), own tokens of all ranks' heads, for (T, E), all tokens of own heads, or back."""
    return cast(Tensor, _Exchange.apply(x, forest.lengths, forest.ranks, to_heads))  # type: ignore[no-untyped-call]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], ranks: Ranks, to_heads: bool) -> Tensor:
        ctx.options = lengths, ranks, to_heads
        return _exchanged(x, *ctx.options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        lengths, ranks, to_heads = ctx.options
        return _exchanged(gradient, lengths, ranks, not to_heads), None, None, None


def _exchanged(x: Tensor, lengths: list[int], ranks: Ranks, to_heads: bool) -> Tensor:
    own = [lengths[ranks.place]] * ranks.size
    sent, received = (own, lengths) if to_heads else (lengths, own)
    out = x.new_empty(sum(received), x.shape[-1])
    dist.all_to_all_single(out, x.reshape(-1, x.shape[-1]).contiguous(), received, sent, group=ranks.group)
    return out if to_heads else out.unflatten(0, (ranks.size, -1))
