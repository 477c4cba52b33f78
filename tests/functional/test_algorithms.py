"""The table of algorithms: the papers' constants, and what contradicts itself."""

import math
import re
from dataclasses import replace

import pytest
import torch

from lightning_rlhf.functional import ALGORITHMS, Algorithm, make_algorithm, policy_loss

SEQUENCE = torch.tensor([0, 0, 0, 1, 1])


def losses(algorithm, change=0.5):
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    return algorithm.policy_loss(torch.full((5,), change), torch.zeros(5), advantages, SEQUENCE)


def test_constants_are_the_papers():
    assert {"grpo", "dr_grpo", "dapo", "rloo", "reinforce++", "reinforce++baseline", "gspo", "cispo", "gmpo", "sapo",
            "maxrl"} <= ALGORITHMS.keys()  # fmt: skip
    limits = {name: losses(a, 3.0).loss[0].item() for name, a in ALGORITHMS.items()}
    for name, bound in (("grpo", 1.2), ("dapo", 1.28), ("gspo", 1.0004), ("gmpo", math.exp(0.4))):
        assert limits[name] == pytest.approx(-bound), name
    assert limits["cispo"] == pytest.approx(-5 * 3.0)  # the bound times log p
    assert limits["sapo"] == pytest.approx(-4 / (1 + math.exp(1 - math.exp(3.0))))
    assert losses(ALGORITHMS["gspo"], -3.0).loss[4].item() == pytest.approx(1 - 3e-4)
    assert ALGORITHMS["grpo"] == Algorithm() == make_algorithm("grpo")


def test_each_algorithm_differs_from_the_others():
    assert len(set(ALGORITHMS.values())) == len(ALGORITHMS)


def test_ones_own():
    own = replace(ALGORITHMS["dapo"], clip_high=0.5, dual_clip=2.0)
    assert make_algorithm(own) is own
    want = policy_loss(torch.full((5,), 1.0), torch.zeros(5), torch.tensor([1.0, 1, 1, -1, -1]), 0.2, 0.5, 2.0)
    assert torch.equal(losses(own, 1.0).loss, want.loss)
    completion = losses(Algorithm(ratio="completion", clip_high=9.0)).ratio
    torch.testing.assert_close(completion, torch.tensor([1.5, 1.5, 1.5, 1.0, 1.0]).exp())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(ratio="sequence", mean="token"),
            "ratio sequence has one loss per completion: set mean to seq",
        ),
        (dict(loss="gmpo", mean="constant"), "loss gmpo has one loss per completion"),
        (dict(ratio="sequence", loss="sapo"), "ratio sequence is for loss clip, not sapo"),
        (dict(clip_low=None), "clip_low null is for loss cispo, not clip"),
        (dict(clip_low=1.5), "clip_low must be at most 1"),
        (dict(dual_clip=3.0, loss="reinforce"), "dual_clip is for loss clip"),
        (dict(dual_clip=0.9), "algorithm.dual_clip must be above 1"),
        (dict(baseline="none"), "scale group needs a baseline"),
        (dict(baseline="leave_one_out", scale="mean"), "scale mean is for baseline mean"),
        (dict(whiten=True), "whiten and scale group both scale"),
        (dict(combine="normalize", scale="none"), "combine normalize is for"),
        (dict(baseline="median"), "algorithm.baseline is 'median'. Choose one of: mean, leave_one_out"),
        (dict(clip_high=-1.0), "algorithm.clip_high must be at least 0"),
    ],
)
def test_contradictions_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Algorithm(**given)


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(ValueError, match=r"algorithm 'Dappo' is unknown; did you mean dapo\? All: grpo, dr_grpo"):
        make_algorithm("Dappo")


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_ratio_beyond_all_numbers_has_no_gradient_where_it_is_clipped_or_nothing_is_learned(name, advantage):
    """exp of a large log-ratio is inf in fp32, and 0 times inf is NaN: the step would be left out."""
    sequence, old = torch.tensor([0, 1, 1]), torch.tensor([-1e3, -1.0, -2.0])
    new = torch.tensor([-1.0, -1.0, -2.0], requires_grad=True)
    algorithm = ALGORITHMS[name]
    found = algorithm.policy_loss(new, old, torch.full((3,), advantage), sequence)
    found.loss.sum().backward()
    learns = algorithm.loss in ("reinforce", "cispo")  # theirs is that of the log-prob, whatever the ratio
    ratio = 5.0 if algorithm.loss == "cispo" else 1.0
    far = -advantage * (ratio if learns else 0.0)
    torch.testing.assert_close(new.grad, torch.tensor([far, -advantage, -advantage]))
    assert found.loss.isfinite().all()


def test_the_ratio_of_a_long_completion_may_be_beyond_all_numbers():
    """Of 4000 tokens each of which became 5% likelier; of a dual clip also where the advantage is negative."""
    sequence, old = torch.zeros(4000, dtype=torch.long), torch.full((4000,), -1.0)
    for advantage, dual_clip, loss in [(0.0, None, 0.0), (2.0, None, -2.4), (-2.0, 3.0, 6.0)]:
        new = (old + 0.05).requires_grad_()
        algorithm = Algorithm(ratio="completion", dual_clip=dual_clip)
        found = algorithm.policy_loss(new, old, torch.full((4000,), advantage), sequence)
        found.loss.sum().backward()
        torch.testing.assert_close(found.loss, torch.full((4000,), loss))
        assert new.grad.eq(0).all() and found.clipped.all() == (advantage != 0)
