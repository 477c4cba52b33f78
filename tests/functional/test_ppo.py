"""PPO's losses against formulas written out token by token."""

import math

import pytest
import torch

from lightning_rlhf.functional import explained_variance, merge_moments, moments, policy_loss, value_loss


def tokens(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, n, generator=g, dtype=torch.float64).unbind()


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.1, 0.5)])
def test_policy_loss_equals_the_paper(low, high):
    old, change, advantages = tokens()
    new = (old + 0.4 * change).requires_grad_()
    found = policy_loss(new, old, advantages, low, high)
    loss, ratio, clipped, slopes = [], [], [], []
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
        r = math.exp(n - o)
        bounded = min(max(r, 1 - low), 1 + high)
        loss.append(-min(r * a, bounded * a))
        ratio.append(r)
        clipped.append(bounded * a < r * a)
        slopes.append(0.0 if clipped[-1] else -r * a)
    torch.testing.assert_close(found.loss, torch.tensor(loss, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.ratio, torch.tensor(ratio, dtype=torch.float64), rtol=1e-12, atol=0)
    assert found.clipped.tolist() == clipped and 20 < sum(clipped) < 180
    assert not found.ratio.requires_grad
    found.loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "clipped"),
    [(1.0, 1.0, True), (1.0, -1.0, False), (-1.0, 1.0, False), (-1.0, -1.0, True), (0.1, 1.0, False)],
)
def test_only_what_goes_too_far_in_its_own_favor_is_clipped(log_ratio, advantage, clipped):
    found = policy_loss(torch.tensor([log_ratio]), torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2)
    assert found.clipped.item() is clipped


def test_the_first_update_is_the_policy_gradient():
    """At a ratio of 1 the loss is -A, nothing is clipped, and the gradient is that of -A log p, in full."""
    old, _, advantages = tokens()
    new = old.clone().requires_grad_()
    found = policy_loss(new, old, advantages, 0.2, 0.2)
    assert torch.equal(found.ratio, torch.ones_like(old)) and not found.clipped.any()
    found.loss.sum().backward()
    assert torch.equal(new.grad, -advantages) and torch.equal(found.loss, -advantages)


def test_a_wider_upper_bound_leaves_the_lower_one():
    new, advantages = torch.tensor([0.24, -0.24]), torch.tensor([1.0, -1.0])  # ratios 1.271 and 0.787
    assert policy_loss(new, torch.zeros(2), advantages, 0.2, 0.2).clipped.tolist() == [True, True]
    assert policy_loss(new, torch.zeros(2), advantages, 0.2, 0.28).clipped.tolist() == [False, True]


@pytest.mark.parametrize("clip", [0.2, 0.05, 5.0, None])
def test_value_loss_equals_the_formula(clip):
    old, change, noise = tokens()
    new, returns = (old + 0.3 * change).requires_grad_(), old + noise
    found = value_loss(new, old, returns, clip)
    loss, clipped, slopes = [], [], []
    for v, o, r in zip(new.tolist(), old.tolist(), returns.tolist(), strict=True):
        free = (v - r) ** 2
        bounded = free if clip is None else (min(max(v, o - clip), o + clip) - r) ** 2
        loss.append(0.5 * max(free, bounded))
        clipped.append(bounded > free)
        slopes.append(0.0 if bounded > free else v - r)
    torch.testing.assert_close(found.loss, torch.tensor(loss, dtype=torch.float64), rtol=1e-12, atol=1e-14)
    assert found.clipped.tolist() == clipped
    assert sum(clipped) > 10 if clip in (0.2, 0.05) else sum(clipped) == 0
    found.loss.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_fp32(dtype):
    old, change, advantages = (x.to(dtype) for x in tokens())
    new = old + 0.1 * change
    policy, value = policy_loss(new, old, advantages, 0.2, 0.2), value_loss(new, old, advantages, 0.2)
    assert policy.loss.dtype == policy.ratio.dtype == value.loss.dtype == torch.float32
    want = policy_loss(new.double(), old.double(), advantages.double(), 0.2, 0.2)
    torch.testing.assert_close(policy.loss.double(), want.loss, rtol=1e-5, atol=1e-6)


def test_explained_variance():
    returns, noise, _ = tokens(1000)
    assert explained_variance(returns, returns).item() == 1
    assert explained_variance(returns + 7, returns).item() == pytest.approx(1)
    assert explained_variance(torch.zeros_like(returns), returns).item() == pytest.approx(0)
    values = returns + 0.5 * noise
    want = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert explained_variance(values, returns).item() == pytest.approx(want.item(), rel=1e-12)
    assert 0.6 < want < 0.9 and explained_variance(-returns, returns).item() == pytest.approx(-3)
    assert explained_variance(values, torch.ones_like(values)).isnan()


def test_explained_variance_by_weight_and_over_ranks():
    returns, noise, _ = tokens(1000)
    values, weight = returns + noise, torch.ones(1000, dtype=torch.float64)
    weight[500:] = 0
    want = explained_variance(values[:500], returns[:500])
    torch.testing.assert_close(explained_variance(values, returns, weight), want, rtol=1e-12, atol=0)
    left = merge_moments(torch.stack([moments(x) for x in (returns - values).split(300)]))
    spread = merge_moments(torch.stack([moments(x) for x in returns.split(300)]))
    want = explained_variance(values, returns)
    torch.testing.assert_close(1 - left[2] / spread[2], want, rtol=1e-12, atol=0)
