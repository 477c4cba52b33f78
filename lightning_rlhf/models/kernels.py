"""What fused attention kernels share: the type in which they compute, and a trial against ``tree_attention``'s loop.

Shapes: H query heads, K key / value heads, E head size.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.utils.compilation import uncompiled

log = logging.getLogger(__name__)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns autocast's type where it is on, and a tensor's own elsewhere. Autocast does not apply to kernels."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@functools.cache
@uncompiled
def agrees(
    name: str,
    attend: Callable[..., Tensor],
    loop: Callable[..., Tensor],
    branches: tuple[int, int],
    heads: tuple[int, int],
    sizes: tuple[int, int],
    softcap: float | None,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Checks once, on two small rows of random numbers, that a kernel computes the same as ``loop``.

    Args:
        name: Name of the kernel in torch, for the warning.
        attend: Attention by the kernel. Its arguments are those of :func:`lightning_rlhf.models.flex.attend`.
        loop: Attention with the same arguments.
        branches: Branches of the first tree, in each of the rows.
        heads: H and K.
        sizes: E of queries and keys, and of values.
        softcap: Bound of soft-capped logits.
        dtype: Data type of the computation.
        device: Device of the computation.

    Returns:
        True if outputs and gradients differ by less than 2 %. That covers rounding, but not a wrong mask or a missing
        term. If they differ by more, or if the kernel cannot be compiled, a warning is shown.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    found = []
    try:
        # independent of the state in which a layer runs; a checkpointed layer has hooks on saved tensors
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        ):
            for count, window in zip(
                branches, (100, None), strict=True
            ):  # after a second length torch compiles for all
                trees = [Tree([0] * 90, [Branch([0] * 60)] * count), Tree([0] * 5, [Branch([0] * 140)])]
                forest = pack(trees).forest
                length = sum(tree.num_tokens for tree in trees)
                shapes = (heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1])
                inputs = [draw(1, h, length, e).requires_grad_() for h, e in shapes]
                direction = draw(1, length, heads[0], sizes[1])
                results = []
                for attention in (attend, loop):
                    out = attention(*inputs, forest, None, window, softcap)
                    results.append((out, *torch.autograd.grad(out, inputs, direction)))
                found += [((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True)]
    except Exception as error:  # compilers fail in many ways, but the loop always works
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        if all(difference < 0.02 for difference in found):  # False for NaN
            return True
        reason = f"outputs and gradients differ by {', '.join(f'{difference:.1e}' for difference in found)}"
    log.warning(
        "%s is not used for heads of %s in %s (%s). The results are the same, but slower.", name, sizes, dtype, reason
    )
    return False
