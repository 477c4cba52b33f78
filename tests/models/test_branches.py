"""Merged attention of branches against one softmax over all keys, and the kernel that it rests on."""

import pytest
import torch

from lightning_rlhf.models import branches


def draw(H, K, P, lengths, dtype, E=6):
    g = torch.Generator().manual_seed(0)
    N = sum(lengths)
    return [torch.randn(1, n, h, E, generator=g, dtype=dtype).transpose(1, 2).requires_grad_()
            for h, n in ((H, N), (K, N), (K, N), (K, P), (K, P))]  # fmt: skip


def reference(q, k, v, pk, pv, lengths, scaling):
    """All keys in one softmax, in double precision."""
    groups, P = q.shape[1] // k.shape[1], pk.shape[2]
    q, k, v = q.double(), *(torch.cat(x, 2).double().repeat_interleave(groups, 1) for x in ((pk, k), (pv, v)))
    seen = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    seen = torch.cat([torch.ones(len(seen), P, dtype=torch.bool), seen], 1)
    return (q @ k.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("P, lengths", [(7, [3, 3, 3]), (1, [1, 9, 2]), (40, [1]), (5, [70, 3])], ids=str)
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str
)
def test_equals_one_softmax_forward_and_backward(H, K, P, lengths, dtype, bound):
    tensors = draw(H, K, P, lengths, dtype)
    out = branches.attend(*tensors[:3], tuple(tensors[3:]), lengths, 0.4)
    want = reference(*tensors, lengths, 0.4)
    assert out.dtype == dtype and out.shape == want.shape
    torch.testing.assert_close(out.double(), want, atol=bound, rtol=0)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad((out * direction.to(dtype)).sum(), tensors)
    for a, b in zip(found, torch.autograd.grad((want * direction).sum(), tensors), strict=True):
        torch.testing.assert_close(a.double(), b.double(), atol=bound * len(lengths) * 3, rtol=bound)


def test_logits_far_apart_stay_finite():
    """The prompt has all of the weight, or none."""
    for factor in (200.0, -200.0):
        q, k, v, pk, pv = draw(2, 2, 3, [2, 2], torch.float32)
        q, pk = torch.ones_like(q).requires_grad_(), (torch.ones_like(pk) * factor).requires_grad_()
        out = branches.attend(q, k, v, (pk, pv), [2, 2], 1.0)
        torch.testing.assert_close(out.double(), reference(q, k, v, pk, pv, [2, 2], 1.0), atol=1e-5, rtol=0)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v, pk, pv)))


def test_autocast_is_followed():
    tensors = draw(2, 2, 3, [2, 2], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert branches.attend(*tensors[:3], tuple(tensors[3:]), [2, 2], None).dtype == torch.bfloat16


def test_the_kernel_is_there_and_returns_the_log_sum_exp():
    """It is no public function: if it goes, branches are computed one by one, which takes up to 2.7 times as long."""
    q, k, v = (t.detach() for t in draw(2, 2, 1, [9], torch.float64)[:3])
    assert (
        branches.usable(q, k, v) and not branches.usable(q, k, v[..., :4]) and not branches.usable(*3 * [q.to("meta")])
    )
    out, lse = branches._attention(q, k, v, 0.0, False, scale=0.5)
    logits = q @ k.mT * 0.5
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, logits.softmax(-1) @ v)
