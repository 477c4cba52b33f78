"""Attention over a packed row of trees: a branch sees only its prompt and itself.

There are three implementations with the same results. On a GPU a fused kernel runs, if it is available and computes
correctly: :mod:`~lightning_rlhf.models.varlen` for rows without forks, :mod:`~lightning_rlhf.models.flex` for others.
Otherwise it is a loop over prompts and branches.

It is registered with transformers as ``"tree"``. A model with this attention behaves as with ``"sdpa"`` (``generate``
works) until it gets a forest. While a forest is active, a layer that does not receive it raises an error, because its
tokens would see the whole row.

Shapes: T packed tokens, H query heads, K key / value heads, E head size.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from lightning_rlhf.data.packed import Forest, Span
from lightning_rlhf.models import branches, flex, varlen
from lightning_rlhf.models.kernels import agrees, compute_dtype
from lightning_rlhf.utils.compilation import uncompiled

NAME = "tree"
#: Branches of a prompt from which on they are merged. Fewer gain little, and then a branch's result is the same to the
#: last bit whichever others are beside it, so that a policy that equals its reference has margins of exactly 0.
MERGED = 8
_ACTIVE: ContextVar[bool] = ContextVar("a forest is being run", default=False)
_WINDOWS: ContextVar[set[int | None] | None] = ContextVar("windows of the layers that run", default=None)


class SharedForest(Forest, ABC):
    """A forest of whose row this process has a stretch of the tokens; other processes have the others.

    Its trees are those of the whole row. In attention tokens are exchanged for heads.
    """

    @abstractmethod
    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchanges (1, H, t, E) of own tokens for (1, h, T, E): all tokens of the heads that are this process's."""

    @abstractmethod
    def own_heads(self, x: Tensor) -> Tensor:
        """Returns this process's (h,) of (H,) numbers of heads."""

    @abstractmethod
    def to_tokens(self, outputs: Tensor) -> Tensor:
        """Exchanges (1, T, h, E) of own heads for (1, t, H, E) of own tokens."""

    @abstractmethod
    def own_tokens(self, x: Tensor) -> Tensor:
        """Returns this process's (1, t, D) of a (1, T, D) tensor."""


class ForestNotPassedError(RuntimeError):
    """A model dropped the ``forest`` keyword on its way to an attention layer."""


@contextmanager
def forest_active() -> Iterator[None]:
    """Within it, every attention layer must receive a forest, and models do not make masks."""
    token = _ACTIVE.set(True)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def noting_windows() -> Iterator[set[int | None]]:
    """Yields a set that collects the sliding windows of layers that run; None for a layer without a window."""
    found: set[int | None] = set()
    token = _WINDOWS.set(found)
    try:
        yield found
    finally:
        _WINDOWS.reset(token)


@uncompiled  # its loop depends on lengths and would be compiled again for each batch
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    forest: Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Computes attention over a forest, without padding and without a (T, T) mask. transformers calls it in each layer.

    Args:
        module: The attention layer.
        query: (1, H, T, E).
        key: (1, K, T, E), where K divides H.
        value: (1, K, T, E).
        attention_mask: Unused with a forest.
        scaling: Factor on the logits. Default: ``E ** -0.5``.
        dropout: Dropout probability of attention weights.
        sliding_window: Number of tokens that a query sees, itself included. None: all.
        softcap: Bound of soft-capped logits (Gemma 2).
        s_aux: (H,) attention sinks (GPT-OSS).
        forest: Positions of the trees. None: plain SDPA.
        kwargs: Other arguments from transformers, which are passed to SDPA.

    Returns:
        (1, T, H, E) outputs, and None in place of attention weights.

    Raises:
        ForestNotPassedError: A packed row runs, but the layer did not receive the forest.
        ValueError: There is more than one row, or the layer made a mask.
    """
    if forest is None:
        if _ACTIVE.get():
            raise ForestNotPassedError(
                f"{type(module).__name__} did not receive the forest: its model drops unknown keywords. Use layout: "
                "padded."
            )
        sdpa: Callable[..., tuple[Tensor, Tensor | None]] = AttentionInterface()["sdpa"]
        extra = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux, **kwargs}
        if softcap is not None or s_aux is not None:
            raise ValueError(
                f"{type(module).__name__} uses soft-capping or sinks, which SDPA does not support. Use the model's own "
                "attention (Policy.native_attention) outside packed batches."
            )
        return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **extra)
    if attention_mask is not None and _ASKS_FOR_MASKS:
        raise ValueError(
            f"{type(module).__name__} makes its own mask, which may depend on a row's length. Use layout: padded."
        )
    if (windows := _WINDOWS.get()) is not None:
        windows.add(sliding_window)
    if query.shape[0] != 1:
        raise ValueError(f"Tree attention takes one packed row, got a batch of {query.shape[0]}.")
    if isinstance(forest, SharedForest):
        query, key, value = forest.to_heads(query, key, value)
        s_aux = None if s_aux is None else forest.own_heads(s_aux)
    if kernel := _fused(query, key, value, forest, dropout, softcap, s_aux):
        out = kernel(query, key, value, forest, scaling, sliding_window, softcap)
    else:
        out = _loop(query, key, value, forest, scaling, sliding_window, softcap, dropout, s_aux)
    return forest.to_tokens(out) if isinstance(forest, SharedForest) else out, None


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Callable[..., Tensor] | None:
    """Chooses a kernel: they have no dropout and no sinks, and their results must equal the loop's."""
    if dropout or sinks is not None:
        return None
    heads, sizes = (query.shape[1], key.shape[1]), (query.shape[3], value.shape[3])
    dtype = compute_dtype(query)
    shape = heads, sizes, softcap, dtype, query.device
    sequences = varlen.usable(query, key, value, forest, softcap, dtype)
    if sequences and agrees("varlen_attn", varlen.attend, _loop, (1, 1), *shape):
        return varlen.attend
    if flex.usable(query) and agrees("flex_attention", flex.attend, _loop, (3, 5), *shape):
        return flex.attend
    return None


def _loop(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Computes (1, T, H, E) attention by prompts, branches, and sequences of the same length."""
    eager = softcap is not None or sinks is not None
    if eager:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    usable = not eager and not dropout and branches.usable(query, key, value)

    def merges(prompt: Span, lengths: Sequence[int]) -> bool:
        """True if there are many branches, and all of them see the whole prompt."""
        many = len(lengths) >= MERGED and prompt.length > 0
        return usable and many and not (window and window < prompt.length + max(lengths))

    def attend(q: Tensor, k: Tensor, v: Tensor, before: int) -> Tensor:
        """Sequences of one length, behind so many keys that all of them see."""
        near = window if window and window < k.shape[2] else None
        if eager:
            seen = forest.mask(before, q.shape[2], near, query.device)
            return _eager_attention(q, k, v, seen, scaling, dropout, softcap, sinks)
        # SDPA's is_causal is aligned at the top left, which is right for a prompt, but wrong for a branch
        causal = not before and near is None
        mask = None if causal else forest.mask(before, q.shape[2], near, query.device)
        alike = q.shape[1] == k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=not alike)

    # split each tensor once: in the backward pass each slice would allocate a gradient of the whole tensor
    sizes = [call.own.length for call in forest.calls]
    split = [t.split(sizes, 2) if len(sizes) > 1 else (t,) for t in (query, key, value)]  # one piece is not copied
    pieces = zip(forest.calls, *split, strict=True)
    prompt = key, value
    out: list[Tensor] = []
    for (_, lengths, prefix), q, k, v in pieces:
        if prefix is None:
            prompt = k, v
            if len(lengths) > 1:
                q, k, v = (t.unflatten(2, (len(lengths), lengths[0]))[0].transpose(0, 1) for t in (q, k, v))
            result = attend(q, k, v, 0).transpose(1, 2).flatten(0, 1)[None]
        elif merges(prefix, lengths):
            result = branches.attend(q, k, v, prompt, lengths, scaling).transpose(1, 2)
        else:
            each = zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
            behind = ((q, *(torch.cat(pair, 2) for pair in zip(prompt, kv, strict=True))) for q, *kv in each)
            result = torch.cat([attend(q, k, v, prefix.length).transpose(1, 2) for q, k, v in behind], 1)
        out.append(result)
    return torch.cat(out, 1) if len(out) > 1 else out[0]


def _eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft-capped logits and attention sinks, which SDPA lacks."""
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    at_least_fp32 = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(at_least_fp32).masked_fill(~mask, -torch.inf)
    if sinks is not None:  # a sink is a key without a value: it takes probability and adds nothing
        sink = sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1).to(logits)
        logits = torch.cat([logits, sink], -1)
    weights = F.dropout(logits.softmax(-1).to(q.dtype)[..., : k.shape[2]], dropout)
    return weights @ v


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Makes no mask for a packed row, and SDPA's mask otherwise."""
    if _ACTIVE.get():
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, tree_attention)
try:
    from transformers import AttentionMaskInterface
except ImportError:  # transformers < 4.53 always makes a mask; tree_attention ignores it
    _ASKS_FOR_MASKS = False
else:
    _ASKS_FOR_MASKS = True
    AttentionMaskInterface.register(NAME, _mask)


def set_attention(model: nn.Module, name: str) -> None:
    """Sets the attention function of every layer of a transformers model.

    transformers 4.51 has no public way to do this for an existing model. The attribute is the same in all supported
    versions; ``tests/models/test_tree_attention.py`` fails if it is no longer read.
    """
    for module in model.modules():  # in 4.51 some model families copy the config to each layer
        config: Any = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = name


def attention_of(model: nn.Module) -> str:
    """Returns the name of a model's attention function."""
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that call an attention function, which are found by their class names."""
    return [
        m
        for m in model.modules()
        if type(m).__name__.endswith("Attention") and "hidden_states" in inspect.signature(m.forward).parameters
    ]
