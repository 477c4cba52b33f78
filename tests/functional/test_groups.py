"""Advantages of groups: values of an independent script, and the traps that public stacks fell into."""

import json
from pathlib import Path

import pytest
import torch

from lightning_rlhf.functional import (
    flat_groups,
    gae,
    group_advantages,
    merge_moments,
    moments,
    normalized_sum,
    overlong_penalty,
    standardize,
    token_rewards,
    whiten,
)

ASSETS = Path(__file__).parents[1] / "assets"
CHECKED = json.loads((ASSETS / "group_advantages.json").read_text())
POLICY = json.loads((ASSETS / "policy_losses.json").read_text())
KINDS = {
    "mean_std": ("mean", "group"),
    "mean": ("mean", "none"),
    "leave_one_out": ("leave_one_out", "none"),
    "batch_std": ("mean", "batch"),
    "length_weighted": ("length_weighted", "none"),
    "mean_scaled": ("mean", "mean"),
    "reinforce++baseline": ("mean", "none"),
}


def flat_list(groups, dtype=torch.float64):
    return torch.tensor([x for group in groups for x in group], dtype=dtype)


def numbers_of(groups):
    return torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))


def close(found, want, tolerance=1e-10):
    torch.testing.assert_close(found.double(), want.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", CHECKED["cases"])
def test_advantages_are_those_of_an_independent_script(name, dtype, tolerance):
    case = CHECKED["cases"][name]
    assert case["advantages"].keys() == KINDS.keys()
    rewards, group, lengths = flat_list(case["rewards"], dtype), numbers_of(case["rewards"]), flat_list(case["lengths"])
    for kind, (baseline, scale) in KINDS.items():
        found = group_advantages(rewards, group, baseline, scale, lengths.long())
        if kind == "reinforce++baseline":  # whitened over tokens
            tokens = found.repeat_interleave(lengths.long())
            found = whiten(tokens)[lengths.long().cumsum(0) - 1]
        want = flat_list(case["advantages"][kind]["advantages"])
        # of fp32 rewards near a mean of 0, what remains of the mean is rounded
        close(found, want, 3e-4 if dtype is torch.float32 and kind == "mean_scaled" else tolerance)


def test_gdpo_is_that_of_an_independent_script():
    case = CHECKED["gdpo"]
    parts = torch.stack([flat_list(case["rewards"][k]) for k in "ab"], 1)
    sums = normalized_sum(parts, torch.tensor(case["weights"]), numbers_of(case["advantages"]))
    close(standardize(sums), flat_list(case["advantages"]))


def test_reinforce_plus_plus_is_that_of_an_independent_script():
    """Returns are the rest of the penalties and the score: GAE without a critic."""
    case = POLICY["reinforce++"]
    lengths = torch.tensor([len(s["old"]) for s in POLICY["sequences"]])
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    old, reference = (flat_list([s[k] for s in POLICY["sequences"]]) for k in ("old", "reference"))
    rewards = token_rewards(case["kl_coef"] * (old - reference), torch.tensor(case["scores"]).double(), sequence)
    found = gae(rewards, torch.zeros_like(rewards), torch.zeros(len(lengths)), sequence, case["gamma"], 1.0).advantages
    close(found, flat_list(case["returns"]))
    close(whiten(found), flat_list(case["advantages"]))


def test_overlong_penalties_are_those_of_an_independent_script():
    case = POLICY["overlong"]
    lengths = torch.tensor([v["length"] for v in case["values"]])
    want = torch.tensor([v["penalty"] for v in case["values"]])
    close(overlong_penalty(lengths, case["max_length"], case["cache"]), want, 1e-6)
    with pytest.raises(ValueError, match="at most 20"):
        overlong_penalty(lengths, 20, 21)


@pytest.mark.parametrize("scale", ["group", "batch", "mean", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "length_weighted"])
@pytest.mark.parametrize("value", [0.95, 0.1, 1e6 + 0.1, -3.3e-7])
def test_equal_rewards_teach_exactly_nothing(value, baseline, scale):
    """Their mean in fp32 is not always the reward."""
    rewards, group = torch.full((8,), value), torch.zeros(8, dtype=torch.long)
    found = group_advantages(rewards, group, baseline, scale, torch.arange(1, 9))
    assert torch.equal(found, torch.zeros(8)) and flat_groups(rewards, group).item()


def test_rewards_that_hardly_differ_are_exact():
    """1e-6 apart, and large: in fp32 as they are there, in float64 as by hand."""
    group = torch.tensor([0, 0, 0, 1, 1])
    rewards = torch.tensor([0.5, 0.5, 0.500001, 1e6, 1e6 + 0.0625])
    assert not flat_groups(rewards, group).any()
    found = group_advantages(rewards, group)
    step = (rewards[2].double() - 0.5).item()
    want = torch.tensor([-step / 3, -step / 3, 2 * step / 3]) / (step / 3**0.5 + 1e-4)
    torch.testing.assert_close(found[:3], want, rtol=1e-6, atol=0)
    assert found[4].item() == pytest.approx(0.03125 / (0.0625 / 2**0.5 + 1e-4), rel=1e-6)
    exact = torch.tensor([1e6, 1e6 + 1e-6], dtype=torch.float64)
    found = group_advantages(exact, torch.zeros(2, dtype=torch.long), scale="none")
    assert found.tolist() == [-(exact[1] - exact[0]) / 2, (exact[1] - exact[0]) / 2]


def test_rewards_that_do_not_apply_count_nowhere():
    nan = float("nan")
    rewards = torch.tensor([1.0, nan, 0.0, nan, nan, 5.0, nan, 2.0, 2.0])
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    lengths = torch.tensor([3, 9, 1, 1, 1, 1, 1, 1, 1])
    for baseline, scale in KINDS.values():
        found = group_advantages(rewards, group, baseline, scale, lengths)
        alone = group_advantages(rewards[[0, 2]], group[[0, 2]], baseline, scale, lengths[[0, 2]],
                                 moments(rewards, (~rewards.isnan()).float()))  # fmt: skip
        torch.testing.assert_close(found[[0, 2]], alone)
        assert found[[1, 3, 4, 5, 6, 7, 8]].eq(0).all()
    assert flat_groups(rewards, group).tolist() == [False, True, True, True]
    assert group_advantages(rewards, group, "none", "none").tolist() == [1, 0, 0, 0, 0, 5, 0, 2, 2]
    assert torch.equal(standardize(torch.tensor([nan, 1.0, 3.0]))[0], torch.zeros(()))
    parts = torch.tensor([[1.0, nan], [0.0, 2.0], [nan, nan]])
    sums = normalized_sum(parts, torch.tensor([1.0, 0.5]), torch.zeros(3, dtype=torch.long))
    assert sums.isnan().tolist() == [False, False, True] and sums[0] > 0 > sums[1]


def test_statistics_of_the_batch_reach_over_ranks():
    rewards, group = torch.randn(12, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 4
    whole = group_advantages(rewards, group, scale="batch")
    merged = merge_moments(torch.stack([moments(rewards[:4]), moments(rewards[4:])]))
    parts = [group_advantages(rewards[s], group[s] - group[s][0], scale="batch", whole=merged)
             for s in (slice(4), slice(4, 12))]  # fmt: skip
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(standardize(rewards[:4], merged), standardize(rewards)[:4])


def test_bad_tensors_are_refused():
    with pytest.raises(ValueError, match=r"must be \(S,\)"):
        group_advantages(torch.zeros(2, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="needs lengths"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), "length_weighted")
    assert len(group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long))) == 0  # a rank without prompts
