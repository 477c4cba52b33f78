"""KL estimators against the exact KL of two categorical distributions, value and gradient."""

import math

import pytest
import torch

from lightning_rlhf.functional import k1, k2, k3, kl_loss

V = 11


def logits(seed):
    return torch.randn(V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distributions(distance=1.0):
    """Log-probs of a policy and a reference that are `distance` apart in logits."""
    policy = logits(0)
    return policy.log_softmax(-1), (policy + distance * logits(1)).log_softmax(-1)


def exact(policy, reference):
    return (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("distance", [0.05, 1.0, 3.0])
def test_k1_and_k3_are_unbiased(estimator, distance):
    policy, reference = distributions(distance)
    mean = (policy.exp() * estimator(policy - reference)).sum()  # by full enumeration
    torch.testing.assert_close(mean, exact(policy, reference), rtol=1e-12, atol=0)


def test_the_direction_is_policy_against_reference():
    """Upside down, k3's mean is another number altogether: 2.5 was once reported for a KL of 1.03."""
    policy, reference = distributions(2.0)
    mean = (policy.exp() * k3(policy - reference)).sum()
    upside_down = (policy.exp() * k3(reference - policy)).sum()
    assert mean == pytest.approx(exact(policy, reference).item(), rel=1e-12)
    assert abs(upside_down - mean) > 0.3 * mean
    assert abs(exact(reference, policy) - mean) > 0.1 * mean


def test_k2_agrees_to_second_order():
    for distance, tolerance in ((0.1, 0.05), (0.01, 0.005)):
        policy, reference = distributions(distance)
        mean = (policy.exp() * k2(policy - reference)).sum()
        assert mean == pytest.approx(exact(policy, reference).item(), rel=tolerance)
    policy, reference = distributions(3.0)
    assert (policy.exp() * k2(policy - reference)).sum() != pytest.approx(exact(policy, reference).item(), rel=0.1)


def test_samples_come_to_the_exact_kl():
    policy, reference = distributions()
    draws = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=torch.Generator().manual_seed(2))
    log_ratio = (policy - reference)[draws]
    want = exact(policy, reference).item()
    for estimator in (k1, k3):
        found = estimator(log_ratio)
        error = found.std().item() / math.sqrt(len(draws))
        assert abs(found.mean().item() - want) < 4 * error < 0.05 * want
    assert k3(log_ratio).std() < k1(log_ratio).std()
    assert (k1(log_ratio) < 0).any() and (k2(log_ratio) >= 0).all() and (k3(log_ratio) >= 0).all()


def expected_gradient(estimator, theta, reference):
    """By enumeration, and as autograd sees it: gradients flow through the log-prob, not through the sampling."""
    logprobs = theta.log_softmax(-1)
    weights = logprobs.exp().detach()
    return torch.autograd.grad((weights * estimator(logprobs - reference)).sum(), theta)[0]


def test_gradients_on_policy():
    theta, reference = logits(0).requires_grad_(), distributions(2.0)[1]
    kl = torch.autograd.grad(exact(theta.log_softmax(-1), reference), theta)[0]
    reverse = torch.autograd.grad(exact(reference, theta.log_softmax(-1)), theta)[0]
    assert kl.norm() > 0.1 and (kl - reverse).norm() > 0.1
    torch.testing.assert_close(expected_gradient(lambda x: kl_loss(x, "k2"), theta, reference), kl)
    torch.testing.assert_close(expected_gradient(lambda x: kl_loss(x, "k3"), theta, reference), reverse)
    assert expected_gradient(k1, theta, reference).norm() < 1e-12  # which is why it is refused


def test_k1_is_no_loss():
    with pytest.raises(ValueError, match=r"k1 cannot be a loss.*zero\. Choose k2 or k3"):
        kl_loss(torch.zeros(3), "k1")
    with pytest.raises(ValueError, match="'k4' is unknown"):
        kl_loss(torch.zeros(3), "k4")


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_half_precision_becomes_fp32(estimator):
    log_ratio = torch.tensor([0.5, -0.25, 3.0, 0.01])
    for dtype in (torch.bfloat16, torch.float16):
        got = estimator(log_ratio.to(dtype))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, estimator(log_ratio.to(dtype).double()).float(), rtol=1e-4, atol=0)
    assert estimator(log_ratio.double()).dtype == torch.float64


def test_a_small_log_ratio_is_not_lost_in_rounding():
    got = k3(torch.tensor([1e-3, -1e-3]))
    torch.testing.assert_close(got.double(), k3(torch.tensor([1e-3, -1e-3], dtype=torch.float64)), rtol=1e-3, atol=0)
