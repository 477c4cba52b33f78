"""Tree attention on a GPU: one fused kernel per layer, with torch's ``flex_attention``.

The forest becomes a block mask, which is made once per batch and shared by the layers. Blocks of 128 by 128 tokens
without any attention cost nothing, full blocks need no mask, and in the other blocks four numbers per token determine
the mask.

The forward pass is tested on a CPU against the loop of :mod:`~lightning_rlhf.models.tree_attention`. **Neither pass
has been run on a GPU, and there is no backward pass on a CPU.** Therefore a kernel's output and gradients are compared
with the loop's before it is used (:func:`~lightning_rlhf.models.kernels.agrees`). If they differ, the loop is used.

Shapes: T packed tokens, H query heads, K key / value heads, E head size.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_rlhf.data.packed import Forest
from lightning_rlhf.models.kernels import compute_dtype
from lightning_rlhf.utils.transfer import send

#: Side of a block of the mask. Rows are padded to a multiple of it: older versions of torch refuse other lengths, and
#: some newer ones give wrong gradients (pytorch issue 153799).
BLOCK = 128


def usable(query: Tensor) -> bool:
    """Whether the kernel is available: it needs CUDA, Triton, and torch 2.7.

    Older versions had wrong gradients (pytorch issue 146377) and problems with rows of different lengths (136196).
    Triton does not support float64.
    """
    return query.is_cuda and query.dtype != torch.float64 and _supported(query.device)


@functools.cache
def _supported(device: torch.device) -> bool:
    capable = torch.cuda.get_device_capability(device) >= (7, 0)
    return capable and torch.__version__ >= "2.7" and importlib.util.find_spec("triton") is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Computes attention over a packed row in one call.

    Args:
        query: (1, H, T, E).
        key: (1, K, T, E), where K divides H.
        value: (1, K, T, E).
        forest: Positions of the trees.
        scaling: Factor on the logits. Default: ``E ** -0.5``.
        window: Number of tokens that a query sees, itself included. None: all.
        softcap: Bound of soft-capped logits.

    Returns:
        (1, T, H, E).
    """
    device = query.device.type
    query, key, value = (t.to(compute_dtype(t)) for t in (query, key, value))  # norms may have returned fp32
    length, size = query.shape[2], value.shape[3]
    widest = max(query.shape[3], size)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    mask = block_mask(forest, window, query.device)
    kernel = _kernel(query.is_cuda, softcap, query.shape[1], key.shape[1], query.shape[3], size, query.dtype)
    with torch.autocast(device, enabled=False):  # torch would compile again for each state of autocast
        out = kernel(*(_padded(t, mask.shape[-1], widest) for t in (query, key, value)), mask, scale)
    return out[:, :, :length, :size].transpose(1, 2)


def block_mask(forest: Forest, window: int | None, device: torch.device) -> BlockMask:
    """Makes the block mask: a token sees its prompt and its branch, causally, and at most ``window`` tokens.

    It is stored on the forest. It is made for one strip of blocks at a time, so that there is no (T, T) mask.
    """
    name = ("blocks", window, device)
    if name in forest.masks:
        return cast(BlockMask, forest.masks[name])
    node, prompt, position = _tokens(forest)
    earliest = position - (window or len(position)) + 1
    node, prompt, position, earliest = send(torch.stack([node, prompt, position, earliest]), device).unbind()

    def visible(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        path = (node[kv] == node[q]) | (node[kv] == prompt[q])
        return path & (kv <= q) & (position[kv] >= earliest[q])

    tokens = torch.arange(len(node), device=device)
    seen = torch.stack(
        [
            visible(tokens, tokens, strip[:, None], tokens[None]).view(BLOCK, -1, BLOCK).sum((0, 2))
            for strip in tokens.split(BLOCK)
        ]
    )
    whole = seen == BLOCK**2
    mask = forest.masks[name] = BlockMask.from_kv_blocks(
        *_listed((seen > 0) & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=visible
    )
    return mask


def _tokens(forest: Forest) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for each token of the padded row, the number of its prompt or branch, of its prompt, and its position.

    Padding is a sequence of its own, so that its tokens see something and do not become NaN. There are at least two
    blocks, because torch would compile again for a single one.
    """
    node, prompt, position = [], [], []
    for root, branches in forest.trees:
        for span in (root, *branches):  # in the row's order
            node.append(torch.full((span.length,), span.start))
            prompt.append(torch.full((span.length,), root.start))
            first = 0 if span is root else root.length
            position.append(torch.arange(first, first + span.length))
    length = sum(map(len, node))
    rest = max(2 * BLOCK, length + -length % BLOCK) - length
    fill = torch.full((rest,), -1)
    rows = [*node, fill], [*prompt, fill], [*position, torch.arange(rest)]
    a, b, c = (torch.cat(row).to(torch.int32) for row in rows)
    return a, b, c


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Converts (n, n) booleans to the number of True per row, and to column indices that list these first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _padded(x: Tensor, length: int, size: int) -> Tensor:
    """Pads with zeros to ``length`` tokens and to a head size that is a power of two, which changes no result."""
    size = max(16, 1 << (size - 1).bit_length())
    return F.pad(x, (0, size - x.shape[3], 0, length - x.shape[2])).contiguous()


_number = itertools.count()


@functools.cache
def _kernel(compiled: bool, softcap: float | None, *shape: Any) -> Callable[..., Tensor]:
    """Makes the kernel for one shape of heads.

    Each kernel has its own code object, because torch limits recompilations per code object. It recompiles for a row of
    another length, a pass without gradients and a second model. Beyond the limit it would run without fusion and take
    (H, T, T) of memory; ``fullgraph`` makes that an error.
    """
    cap = softcap or 1.0

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    def run(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
        return flex_attention(
            query,
            key,
            value,
            score_mod=None if softcap is None else capped,
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    run.__code__ = run.__code__.replace(co_name=f"tree_attention_{next(_number)}")
    return torch.compile(run, fullgraph=True) if compiled else run
