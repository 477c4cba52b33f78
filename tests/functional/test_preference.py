"""Losses over pairs are the textbook's, and stay finite where a literal formula does not."""

import pytest
import torch

from lightning_rlhf.functional import bradley_terry_loss, centering_penalty, log_exp_loss, log_sig_loss


def scores(seed=0, n=50):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, n, generator=g, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("margin", [0.0, 0.7, torch.linspace(-2, 2, 50, dtype=torch.float64)])
def test_equals_the_textbook_formulas(margin):
    pair = scores()
    d = pair[0] - pair[1] - margin
    want = -torch.log(1 / (1 + torch.exp(-d)))
    got = bradley_terry_loss(pair[0], pair[1], margin)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got, torch.log(1 + torch.exp(-d)), rtol=1e-12, atol=1e-14)
    gradients = [torch.autograd.grad(loss.sum(), pair)[0] for loss in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)
    assert torch.autograd.gradcheck(lambda p: bradley_terry_loss(p[0], p[1], margin), pair)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("difference", "loss", "slope"), [(500.0, 0.0, 0.0), (-500.0, 500.0, -1.0)])
def test_finite_at_any_difference(dtype, difference, loss, slope):
    better = torch.tensor([difference], dtype=dtype, requires_grad=True)
    got = bradley_terry_loss(better, torch.zeros(1, dtype=dtype))
    got.sum().backward()
    assert got.item() == pytest.approx(loss, abs=1e-30)
    assert better.grad.item() == pytest.approx(slope, abs=1e-30)


@pytest.mark.parametrize("function", [bradley_terry_loss, centering_penalty])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_fp32(function, dtype):
    # neither 256 - 1.0078 nor their sum is a number of 8 or of 11 bits
    better, worse = torch.tensor([1.0078125, 0.5, 3.0]).to(dtype), torch.tensor([256.0, 100.0, 2.984375]).to(dtype)
    got = function(better, worse)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, function(better.double(), worse.double()).float(), rtol=1e-6, atol=0)
    assert function(better.double(), worse.double()).dtype == torch.float64


def test_a_margin_shifts_the_difference():
    better, worse = scores().detach()
    margin = torch.linspace(-3, 3, 50, dtype=torch.float64)
    want = bradley_terry_loss(better - margin, worse)
    torch.testing.assert_close(bradley_terry_loss(better, worse, margin), want, rtol=1e-12, atol=0)
    assert (bradley_terry_loss(better, worse, 1.0) > bradley_terry_loss(better, worse)).all()
    at_margin = bradley_terry_loss(torch.tensor([2.5]), torch.tensor([0.5]), 2.0)
    assert at_margin.item() == pytest.approx(0.6931472, abs=1e-6)


def test_the_order_of_a_pair_decides_the_sign():
    pair = scores()
    right = torch.autograd.grad(bradley_terry_loss(pair[0], pair[1]).sum(), pair)[0]
    wrong = torch.autograd.grad(bradley_terry_loss(pair[1], pair[0]).sum(), pair)[0]
    assert (right[0] < 0).all() and (right[1] > 0).all()  # descent raises the better, lowers the worse
    assert (wrong[0] > 0).all() and (wrong[1] < 0).all()
    torch.testing.assert_close(right[0], -right[1], rtol=0, atol=0)
    # sigmoid(-d) + sigmoid(d) = 1
    torch.testing.assert_close(wrong[0] - right[0], torch.ones_like(right[0]), rtol=1e-12, atol=0)


def test_both_names_are_one_function():
    assert log_sig_loss is bradley_terry_loss and log_exp_loss is bradley_terry_loss


def test_centering_penalty():
    better, worse = scores().detach()
    want = torch.tensor([(b + w) ** 2 for b, w in zip(better.tolist(), worse.tolist(), strict=True)])
    torch.testing.assert_close(centering_penalty(better, worse), want.double(), rtol=1e-6, atol=1e-12)
    assert centering_penalty(torch.tensor([2.0]), torch.tensor([-2.0])).item() == 0
    one = torch.tensor([3.0], requires_grad=True)
    centering_penalty(one, torch.tensor([1.0])).sum().backward()
    assert one.grad.item() == 8  # 2 (3 + 1)
