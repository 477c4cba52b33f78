"""Tree attention on a GPU: one fused kernel a layer, by torch's ``flex_attention``.

The forest becomes a block mask, made once a batch and shared by its layers: blocks of 128 by 128 tokens in which
nobody sees anybody cost nothing, whole ones need no mask, and in the others four numbers a token say who sees whom.

The forward pass is tested on a CPU against the loop of :mod:`~lightning_rlhf.models.tree_attention`. **Neither pass
has been run on a GPU, and the backward pass exists on no CPU.** So nothing is trusted: before a kernel serves, its
output and gradients are compared with the loop's (:func:`agrees`), and where they differ the loop stays.

Shapes: T packed tokens, H query heads, K key / value heads, E head size.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lightning_rlhf.data.packed import Branch, Forest, Tree, pack
from lightning_rlhf.utils.compilation import uncompiled

log = logging.getLogger(__name__)

#: Side of a block of the mask. Rows are padded to it: other lengths are refused by older versions of torch, and give
#: wrong gradients in some newer ones (pytorch issue 153799).
BLOCK = 128


def usable(query: Tensor) -> bool:
    """Whether the kernel can be had: CUDA, Triton, and torch 2.7.

    Older versions had wrong gradients (pytorch issue 146377) and trouble with rows of changing length (136196). Triton
    has no float64.
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
    """Attention over a packed row, in one call.

    Args:
        query: (1, H, T, E).
        key: (1, K, T, E), K dividing H.
        value: (1, K, T, E).
        forest: Where the trees lie.
        scaling: Factor on the logits; default ``E ** -0.5``.
        window: Tokens a query sees at most, itself included.
        softcap: Bound of soft-capped logits.

    Returns:
        (1, T, H, E).
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):  # autocast does not know the kernel, and norms may have left fp32
        query, key, value = (t.to(torch.get_autocast_dtype(device)) for t in (query, key, value))
    length, size = query.shape[2], value.shape[3]
    widest = max(query.shape[3], size)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    mask = block_mask(forest, window, query.device)
    kernel = _kernel(query.is_cuda, softcap, query.shape[1], key.shape[1], query.shape[3], size, query.dtype)
    with torch.autocast(device, enabled=False):  # its state is one more thing that torch compiles anew for
        out = kernel(*(_padded(t, mask.shape[-1], widest) for t in (query, key, value)), mask, scale)
    return out[:, :, :length, :size].transpose(1, 2)


def block_mask(forest: Forest, window: int | None, device: torch.device) -> BlockMask:
    """Who sees whom: all of the prompt and, causally, themselves, at most ``window`` tokens back.

    Kept on the forest. Made a strip of blocks at a time, so that no (T, T) mask exists.
    """
    name = ("blocks", window, device)
    if name in forest.masks:
        return cast(BlockMask, forest.masks[name])
    node, prompt, position = _tokens(forest)
    earliest = position - (window or len(position)) + 1
    node, prompt, position, earliest = (t.to(device) for t in (node, prompt, position, earliest))

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
    """(T',) each, T' the padded length: a number for a token's prompt or branch, its prompt's, and its position.

    The padding is a sequence of its own, so that each of its tokens sees something and none is NaN. At least two
    blocks: one alone would be compiled apart.
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
    """(n, n) bool -> how many each row has, and which: those first, in order."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _padded(x: Tensor, length: int, size: int) -> Tensor:
    """Zeros up to ``length`` tokens and to a head size that is a power of two: they change no logit and no sum."""
    size = max(16, 1 << (size - 1).bit_length())
    return F.pad(x, (0, size - x.shape[3], 0, length - x.shape[2])).contiguous()


_number = itertools.count()


@functools.cache
def _kernel(compiled: bool, softcap: float | None, *shape: Any) -> Callable[..., Tensor]:
    """The kernel for one shape of heads.

    A code object each: torch counts recompilations a code object, a row of another length, a pass without gradients
    and a second model are some, and over its limit it would run unfused, in (H, T, T) of memory. ``fullgraph`` makes
    that an error.
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


@functools.cache
@uncompiled
def agrees(
    loop: Callable[..., Tensor],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    softcap: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether the kernel does what ``loop`` does, tried once on two small rows of random numbers.

    Args:
        loop: Attention with :func:`attend`'s arguments.
        heads: H and K.
        sizes: E of queries and keys, and of values.
        softcap: Bound of soft-capped logits.
        dtype: That the kernel will compute in.
        device: Where.

    Returns:
        Whether outputs and gradients are within 2 % of each other's size: rounding is, another mask or a lost term is
        not. If not, or if the kernel can't be compiled, a warning says so.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    ways: tuple[Callable[..., Tensor], ...] = (attend, loop)
    found = []
    try:
        # in whatever state a layer happens to run; a checkpointed one has hooks on what is saved
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        ):
            for group in (3, 5):  # the second length makes torch compile for all
                trees = [Tree([0] * 90, [Branch([0] * 60)] * group), Tree([0] * 5, [Branch([0] * 140)])]
                forest = pack(trees).forest
                length = sum(tree.num_tokens for tree in trees)
                shapes = (heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])
                inputs = [draw(1, h, length, e).requires_grad_() for h, e in shapes]
                direction = draw(1, length, heads[0], sizes[1])
                results = []
                for attention in ways:
                    out = attention(*inputs, forest, None, 100, softcap)
                    results.append((out, *torch.autograd.grad(out, inputs, direction)))
                found += [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
    except Exception as error:  # compilers fail in many ways, and there is a way round all of them
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        if all(difference < 0.02 for difference in found):  # NaN is not
            return True
        reason = f"outputs and gradients differ by {', '.join(f'{difference:.1e}' for difference in found)}"
    log.warning(
        "flex_attention is not used for heads of %s in %s (%s): slower, with equal results.", sizes, dtype, reason
    )
    return False
