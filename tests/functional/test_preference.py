"""Losses over pairs are the textbook's, and stay finite where a literal formula does not."""

import json
import math
from decimal import Decimal, getcontext
from itertools import combinations, product
from pathlib import Path

import pytest
import torch

from lightning_rlhf.functional import (
    F_DIVERGENCES,
    LOSSES,
    bradley_terry_loss,
    centering_penalty,
    log_exp_loss,
    log_sig_loss,
    pair_logprobs,
)
from lightning_rlhf.functional.preference import sigmoid_loss


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


# ------------------------------------------------------------------------------------------ direct alignment

CHECKED = json.loads((Path(__file__).parents[1] / "assets" / "preference_losses.json").read_text())
#: The names of settings in the check values, where ours say more.
SETTINGS = {"lambda": "odds_weight", "nll": "sft_weight"}
#: What is no loss of its own, but a way to make pairs.
MODIFIERS = ("sigmoid+margin", "sigmoid+ld", "sigmoid+length", "sigmoid+f")


def flat(pairs, dtype=torch.float64):
    """Policy's and reference's log-probs of the check values' tokens, and each token's sequence."""
    completions = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    policy, reference = (
        torch.tensor([x for c in completions for x in c[n]], dtype=dtype) for n in ("policy", "reference")
    )
    lengths = torch.tensor([len(c["policy"]) for c in completions])
    return policy.requires_grad_(), reference, torch.arange(len(completions)).repeat_interleave(lengths)


def losses_of(case, policy, reference, sequence):
    name, settings = case["name"], dict(case["settings"])
    count = int(sequence[-1]) + 1
    made = {"better": torch.arange(0, count, 2), "worse": torch.arange(1, count, 2)}
    if name in MODIFIERS:
        rename = {"margins": "margin", "alpha": "f_alpha"}
        beta = settings.pop("beta")
        made |= {rename.get(k, k): v for k, v in settings.items() if v is not None}
        if "margin" in made:
            made["margin"] = torch.tensor(made["margin"], dtype=torch.float64)
        name, settings = "sigmoid", {"beta": beta}
    pairs = pair_logprobs(policy, reference, sequence, count, **made)
    if name == "sigmoid+sft":
        return LOSSES["sigmoid"].function(pairs, settings["beta"]) + settings["sft"] * LOSSES["sft"].function(pairs)
    if name == "ipo":
        settings["average"] = settings.pop("normalise") == "tokens"
    if name == "dpop":
        settings["drop_weight"] = settings.pop("lambda")
    settings = {SETTINGS.get(k, k): v for k, v in settings.items()}
    return LOSSES[name.removesuffix("+smoothing")].function(pairs, **settings)


def name_of(case):
    return "-".join([case["name"], *(f"{k}={v}" for k, v in case["settings"].items() if k != "margins")])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CHECKED["losses"], ids=name_of)
def test_values_and_gradients_are_those_of_an_independent_script(case, dtype):
    policy, reference, sequence = flat(CHECKED["pairs"], dtype)
    losses = losses_of(case, policy, reference, sequence)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        losses.double(), torch.tensor(case["per_pair"], dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    losses.mean().backward()
    want = torch.tensor([x for row in case["gradient"] for x in row], dtype=torch.float64)
    torch.testing.assert_close(policy.grad.double(), want, rtol=tolerance, atol=tolerance)


def test_each_loss_of_the_table_has_check_values():
    named = {case["name"].partition("+")[0] for case in CHECKED["losses"]}
    assert named | {"sft"} == set(LOSSES)  # sft: in "sigmoid+sft"


@pytest.mark.parametrize("name", LOSSES)
def test_finite_at_log_ratios_of_any_size(name):
    both = torch.tensor([0]), torch.tensor([1])
    cases = product(F_DIVERGENCES, (-1e4, 1e4), (torch.float64, torch.float32), (both, both[::-1]))
    for divergence, ratio, dtype, pair in cases:
        policy = torch.tensor([-1e-9, -2e4], dtype=dtype, requires_grad=True)
        reference = policy.detach() - torch.tensor([ratio, -ratio], dtype=dtype)
        pairs = pair_logprobs(policy, reference, torch.tensor([0, 1]), 2, *pair, f_divergence=divergence)
        loss = LOSSES[name].function(pairs)
        loss.sum().backward()
        assert loss.isfinite().all() and policy.grad.isfinite().all()


@pytest.mark.parametrize("logprob", [-1e-9, -1e-30, -0.5, -0.69314, -0.6932, -30.0])
def test_log_odds_are_exact_near_zero_and_far_from_it(logprob):
    one = torch.tensor([logprob, -1.0], dtype=torch.float32)
    pairs = pair_logprobs(one, None, torch.tensor([0, 1]), 2, torch.tensor([0]), torch.tensor([1]))
    getcontext().prec = 60
    p, q = (Decimal(float(x)).exp() for x in one)
    odds = (p / (1 - p)).ln() - (q / (1 - q)).ln()
    want = -Decimal(float(one[0])) + Decimal("0.1") * (1 + (-odds).exp()).ln()
    assert LOSSES["orpo"].function(pairs).item() == pytest.approx(float(want), rel=1e-12)


def test_at_the_start_the_losses_are_what_the_formulas_say():
    policy, _, sequence = flat(CHECKED["pairs"])
    pairs = pair_logprobs(policy, policy.detach(), sequence, 8, torch.tensor([0, 2]), torch.tensor([1, 3]))
    for name in ("sigmoid", "sigmoid_norm", "dpop"):
        assert LOSSES[name].function(pairs).tolist() == [math.log(2)] * 2
    assert LOSSES["hinge"].function(pairs).tolist() == [1.0] * 2
    assert LOSSES["apo_zero"].function(pairs).tolist() == [1.0] * 2


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "exo", "discopop", "cpo"])
def test_equal_answers_have_no_gradient(name):
    policy = torch.tensor([-0.3, -1.2, -0.3, -1.2], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.4, -1.0, -0.4, -1.0], dtype=torch.float64)
    pairs = pair_logprobs(policy, reference, torch.tensor([0, 0, 1, 1]), 2, torch.tensor([0]), torch.tensor([1]))
    settings = {"sft_weight": 0.0} if name == "cpo" else {}
    LOSSES[name].function(pairs, **settings).sum().backward()
    torch.testing.assert_close(policy.grad[:2] + policy.grad[2:], torch.zeros(2, dtype=torch.float64))


def test_a_swapped_pair_has_the_mirrored_gradient():
    found = []
    for swap in (False, True):
        policy, _, sequence = flat(CHECKED["pairs"][:1])
        first, second = torch.tensor([0]), torch.tensor([1])
        pairs = pair_logprobs(policy, policy.detach(), sequence, 2, *((second, first) if swap else (first, second)))
        sigmoid_loss(pairs).sum().backward()
        found.append(policy.grad)
    torch.testing.assert_close(found[0], -found[1], rtol=0, atol=0)


def test_a_ranking_is_its_pairs_written_out():
    policy, reference, sequence = flat(CHECKED["pairs"][:2])
    order = list(combinations(range(4), 2))
    better, worse = (torch.tensor(side) for side in zip(*order, strict=True))
    together = sigmoid_loss(pair_logprobs(policy, reference, sequence, 4, better, worse))
    alone = [
        sigmoid_loss(pair_logprobs(policy, reference, sequence, 4, torch.tensor([b]), torch.tensor([w])))
        for b, w in order
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-14, atol=0)


def test_ratios_keep_the_gradient_that_fp32_sums_lose():
    g = torch.Generator().manual_seed(0)
    length = 2_000
    exact = -3 * torch.rand(2 * length, generator=g, dtype=torch.float64)
    policy = exact.float()
    reference = (policy.double() + 0.01 * torch.randn(2 * length, generator=g, dtype=torch.float64)).float()
    sequence = torch.arange(2).repeat_interleave(length)
    pair = torch.tensor([0]), torch.tensor([1])
    got = pair_logprobs(policy, reference, sequence, 2, *pair).difference(0.1).item()
    ratios = (policy.double() - reference.double()).view(2, length).sum(1)
    want = 0.1 * (ratios[0] - ratios[1]).item()
    assert got == pytest.approx(want, abs=1e-6)
    sums = policy.view(2, length).sum(1) - reference.view(2, length).sum(1)  # as most stacks do it
    apart = 0.1 * (sums[0] - sums[1]).item()
    assert abs(apart - want) > 10 * abs(got - want)
