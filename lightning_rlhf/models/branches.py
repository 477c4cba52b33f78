"""Attention of a prompt's branches on a CPU: one call for all of them against the prompt, and one for each by itself.

A softmax over all keys is the mean of the softmaxes over two parts of them, weighted by their sums of exponentials. So
the keys of the prompt need not be copied next to those of each branch, and no mask is needed. The gradient of each part
follows from the merged output and the merged log-sum-exp (Dao et al. 2022, FlashAttention; Liu et al. 2023, Ring
Attention).

Shapes: N tokens of all branches, P tokens of the prompt, H heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

# No public function returns the log-sum-exp on a CPU. tests/models/test_branches.py fails if these change; without them
# branches are computed one by one.
_attention = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_attention_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True if the kernel can compute with these tensors."""
    known = _attention is not None and _attention_backward is not None
    return known and query.device.type == "cpu" and query.shape[-1] == key.shape[-1] == value.shape[-1]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: tuple[Tensor, Tensor],
    lengths: Sequence[int],
    scaling: float | None,
) -> Tensor:
    """Computes attention of branches that lie side by side.

    Args:
        query: (1, H, N, E).
        key: (1, K, N, E), where K divides H.
        value: (1, K, N, E).
        prompt: (1, K, P, E) keys and values of their prompt, which all see.
        lengths: Tokens of each branch, N in all. A token sees its own branch up to itself.
        scaling: Factor on the logits. Default: ``E ** -0.5``.

    Returns:
        (1, H, N, E).
    """
    tensors = [query, key, value, *prompt]
    if torch.is_autocast_enabled("cpu"):  # as it does to torch's own attention
        tensors = [t.to(torch.get_autocast_dtype("cpu")) for t in tensors]
    if (groups := query.shape[1] // key.shape[1]) > 1:
        tensors[1:] = [t.repeat_interleave(groups, 1) for t in tensors[1:]]
    return cast(Tensor, _Branches.apply(*tensors, list(lengths), scaling))  # type: ignore[no-untyped-call]


class _Branches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prompt_key: Tensor,
        prompt_value: Tensor,
        lengths: list[int],
        scaling: float | None,
    ) -> Tensor:
        assert _attention is not None
        out, lse = _attention(query, prompt_key, prompt_value, 0.0, False, scale=scaling)
        branches = zip(*(t.split(lengths, 2) for t in (query, key, value)), strict=True)
        found = [_attention(*branch, 0.0, True, scale=scaling) for branch in branches]
        own_out, own_lse = (_join(parts) for parts in zip(*found, strict=True))
        both = torch.logaddexp(lse, own_lse)
        share = (own_lse - both).exp_()[..., None]  # of the branch itself
        out = torch.lerp(out.to(share.dtype), own_out.to(share.dtype), share).to(query.dtype)
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, out, both)
        ctx.lengths, ctx.scaling = lengths, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        assert _attention_backward is not None
        query, key, value, prompt_key, prompt_value, out, lse = ctx.saved_tensors
        [gradient], scaling = gradients, ctx.scaling
        to_query, to_prompt_key, to_prompt_value = _attention_backward(
            gradient, query, prompt_key, prompt_value, out, lse, 0.0, False, scale=scaling
        )
        branches = zip(*(t.split(ctx.lengths, 2) for t in (gradient, query, key, value, out, lse)), strict=True)
        found = [_attention_backward(*branch, 0.0, True, scale=scaling) for branch in branches]
        own_query, to_key, to_value = (_join(parts) for parts in zip(*found, strict=True))
        return to_query + own_query, to_key, to_value, to_prompt_key, to_prompt_value, None, None


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Joins tensors along the tokens, whose numbers lie together in a packed row."""
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)
