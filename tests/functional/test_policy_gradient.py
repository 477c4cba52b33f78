"""Losses of the GRPO family: values and gradients of an independent script, and what the formulas promise."""

import json
from pathlib import Path

import pytest
import torch

from lightning_rlhf.functional import (
    cispo_loss,
    gmpo_loss,
    importance_weights,
    kl_loss,
    loss_weights,
    off_policy_mask,
    policy_loss,
    reinforce_loss,
    sapo_loss,
    sequence_policy_loss,
)

CHECKED = json.loads((Path(__file__).parents[1] / "assets" / "policy_losses.json").read_text())
SEQUENCES = CHECKED["sequences"]
SEQUENCE = torch.arange(len(SEQUENCES)).repeat_interleave(torch.tensor([len(s["old"]) for s in SEQUENCES]))
GROUP = torch.tensor([s["group"] for s in SEQUENCES])
#: Losses of papers that no algorithm of the table has.
LEFT_OUT = {"vespo", "clip+kl_k3_ratio"}


def column(name, dtype):
    return torch.tensor([x for s in SEQUENCES for x in s[name]], dtype=dtype)


def token_losses(name, s, new, old, reference, rollout, advantages):
    """(N,) losses of a case of the file, by its name and settings."""
    given, low, high = (new, old, advantages), s.get("clip_low"), s.get("clip_high")
    if name == "reinforce":
        return reinforce_loss(*given).loss
    if name.startswith("cispo"):
        return cispo_loss(*given, low, high if high is not None else s["max_ratio"] - 1).loss
    if name == "gmpo":
        return gmpo_loss(*given, SEQUENCE, low, high).loss
    if name == "sapo":
        return sapo_loss(*given, s["tau_positive"], s["tau_negative"]).loss
    if name in ("gspo", "rloo_sequence"):
        return sequence_policy_loss(*given, SEQUENCE, low, high, normalize=name == "gspo").loss
    loss = policy_loss(*given, low, high, s.get("dual", s.get("delta"))).loss
    if "kl_coef" in s:
        loss = loss + s["kl_coef"] * kl_loss(new - reference, name[-2:])
    if "correction" in s:
        loss = loss * importance_weights(old, rollout, SEQUENCE, s["correction"], s["max"])
    if "threshold" in s:
        loss = loss * off_policy_mask(new, rollout, advantages, SEQUENCE, s["threshold"])
    return loss


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "case", [c for c in CHECKED["losses"] if c["name"] not in LEFT_OUT], ids=lambda c: f"{c['name']}-{c['settings']}"
)
def test_values_and_gradients_are_those_of_an_independent_script(case, dtype, tolerance):
    new = column("policy", dtype).requires_grad_()
    old, reference, rollout = (column(name, dtype) for name in ("old", "reference", "rollout"))
    advantages = torch.tensor([s["advantage"] for s in SEQUENCES], dtype=dtype)[SEQUENCE]
    settings = case["settings"]
    loss = token_losses(case["name"].split(",")[0], settings, new, old, reference, rollout, advantages)
    cut = torch.tensor([s["truncated"] for s in SEQUENCES]) & ("left out" in case["name"])
    counts = 1 - cut.to(dtype)[SEQUENCE]
    weight, share = loss_weights(settings["mean"], counts, SEQUENCE, GROUP, settings.get("constant"))
    total = (weight * loss).sum() / share.sum()
    total.backward()
    gradient = torch.tensor([x for row in case["gradient"] for x in row], dtype=dtype)
    torch.testing.assert_close(total.detach(), torch.tensor(case["total"], dtype=dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(new.grad, gradient, rtol=tolerance, atol=tolerance)
    if "token_losses" in case:
        want = torch.tensor([x for row in case["token_losses"] for x in row], dtype=dtype)
        torch.testing.assert_close(loss.detach(), want, rtol=tolerance, atol=tolerance)


def test_the_first_update_of_each_loss_is_the_policy_gradient():
    """At a ratio of 1 the mean over sequences has the same gradient by every loss."""
    advantages = torch.tensor([s["advantage"] for s in SEQUENCES], dtype=torch.float64)[SEQUENCE]
    weight, share = loss_weights("sequence", torch.ones_like(advantages), SEQUENCE, GROUP)
    want = -advantages * weight / share.sum()
    for loss in (
        lambda *x: policy_loss(*x, 0.2, 0.2),
        lambda *x: sequence_policy_loss(*x, SEQUENCE, 3e-4, 4e-4),
        lambda *x: cispo_loss(*x, None, 4.0),
        lambda *x: gmpo_loss(*x, SEQUENCE, 0.4, 0.4),
        lambda *x: sapo_loss(*x, 1.0, 1.05),
        reinforce_loss,
    ):
        new = column("old", torch.float64).requires_grad_()
        found = loss(new, column("old", torch.float64), advantages)
        ((weight * found.loss).sum() / share.sum()).backward()
        torch.testing.assert_close(new.grad, want, rtol=1e-12, atol=1e-14)
        assert not found.clipped.any() and found.ratio.eq(1).all() and not found.ratio.requires_grad


def test_means_add_up_over_parts_of_a_batch():
    """The sums of weights and shares of whole prompts are those of the batch."""
    counts, cut = torch.ones(len(SEQUENCE)), int((GROUP[SEQUENCE] == 0).sum())
    for mean in ("token", "sequence", "prompt", "constant"):
        whole = torch.stack(loss_weights(mean, counts, SEQUENCE, GROUP, 8))
        first = loss_weights(mean, counts[:cut], SEQUENCE[:cut], GROUP[GROUP == 0], 8)
        then = loss_weights(mean, counts[cut:], SEQUENCE[cut:] - 3, GROUP[GROUP == 1] - 1, 8)
        torch.testing.assert_close(whole, torch.stack([torch.cat(p) for p in zip(first, then, strict=True)]))
    with pytest.raises(ValueError, match="needs the constant"):
        loss_weights("constant", counts, SEQUENCE, GROUP)


def test_dual_clip_bounds_only_bad_tokens():
    new, advantages = torch.tensor([2.0, 2.0], requires_grad=True), torch.tensor([-1.0, 1.0])
    found = policy_loss(new, torch.zeros(2), advantages, 0.2, 0.2, dual_clip=3.0)
    assert found.loss.tolist() == pytest.approx([3.0, -1.2]) and found.clipped.all()
    found.loss.sum().backward()
    assert new.grad.tolist() == [0, 0]
