"""Rewards, GAE and whitening against loops written out, on packed tokens."""

import numpy as np
import pytest
import torch

from lightning_rlhf.functional import (
    RunningMoments,
    adapt_kl_coef,
    explained_variance,
    gae,
    merge_moments,
    moments,
    token_rewards,
    variance,
    whiten,
)


def rollout(lengths, seed=0, dtype=torch.float64):
    """Rewards (N,), values (N,), last values (S,), sequence (N,)."""
    g = torch.Generator().manual_seed(seed)
    n, s = sum(lengths), len(lengths)
    rewards, values = torch.randn(2, n, generator=g, dtype=torch.float64).to(dtype)
    last = torch.randn(s, generator=g, dtype=torch.float64).to(dtype)
    return rewards, values, last, torch.arange(s).repeat_interleave(torch.tensor(lengths))


def loop(rewards, values, last_values, lengths, gamma, lam):
    """GAE as the textbook has it, a sequence and a token at a time."""
    advantages, start = [], 0
    for length, bootstrap in zip(lengths, last_values.tolist(), strict=True):
        r, v = (x[start : start + length].tolist() for x in (rewards, values))
        found, after = [], 0.0
        for t in reversed(range(length)):
            following = v[t + 1] if t + 1 < length else bootstrap
            after = r[t] + gamma * following - v[t] + gamma * lam * after
            found.append(after)
        advantages += found[::-1]
        start += length
    return torch.tensor(advantages, dtype=torch.float64)


LENGTHS = [7, 1, 16, 2, 33, 1, 5]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("lengths", [LENGTHS, [1], [64], [1, 1, 1]])
def test_gae_equals_a_loop_over_tokens(gamma, lam, lengths):
    rewards, values, last, sequence = rollout(lengths)
    found = gae(rewards, values, last, sequence, gamma, lam)
    want = loop(rewards, values, last, lengths, gamma, lam)
    torch.testing.assert_close(found.advantages, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.returns, want + values, rtol=1e-12, atol=1e-12)


def test_gae_by_hand():
    rewards, values, sequence = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0, 0, 1])
    ended = gae(rewards, values, torch.zeros(2), sequence, gamma=1.0, lam=0.5)
    # delta = 0 + .25 - .5, 1 + 0 - .25, 3 + 0 - 1
    assert ended.advantages.tolist() == [-0.25 + 0.5 * 0.75, 0.75, 2.0]
    cut = gae(rewards, values, torch.tensor([0.0, 4.0]), sequence, gamma=0.5, lam=0.5)
    assert cut.advantages[2].item() == 3 + 0.5 * 4 - 1


def test_with_lambda_one_returns_are_the_discounted_rewards_to_come():
    rewards, values, _, sequence = rollout(LENGTHS)
    found = gae(rewards, values, torch.zeros(len(LENGTHS)), sequence, gamma=0.9, lam=1.0)
    rest = rewards[sequence == 2]
    want = (rest * 0.9 ** torch.arange(len(rest), dtype=torch.float64)).sum()
    torch.testing.assert_close(found.returns[sequence == 2][0], want, rtol=1e-12, atol=0)


def test_a_sequence_does_not_hear_of_its_neighbors():
    """To the bit, so that a rollout may be split as memory wants."""
    rewards, values, last, sequence = rollout(LENGTHS, dtype=torch.float32)
    together = gae(rewards, values, last, sequence, 1.0, 0.95)
    for s in range(len(LENGTHS)):
        own = sequence == s
        alone = gae(rewards[own], values[own], last[s : s + 1], torch.zeros(LENGTHS[s], dtype=torch.long), 1.0, 0.95)
        assert torch.equal(alone.advantages, together.advantages[own])
    poisoned = rewards.clone()
    poisoned[sequence == 2] = float("nan")
    found = gae(poisoned, values, last, sequence, 1.0, 0.95).advantages
    assert torch.equal(found[sequence != 2], together.advantages[sequence != 2])


def test_half_precision_is_summed_in_fp32():
    rewards, values, last, sequence = rollout([512, 100], dtype=torch.bfloat16)
    found = gae(rewards, values, last, sequence, 1.0, 0.95)
    assert found.advantages.dtype == found.returns.dtype == torch.float32
    want = gae(rewards.double(), values.double(), last.double(), sequence, 1.0, 0.95)
    torch.testing.assert_close(found.advantages.double(), want.advantages, rtol=1e-4, atol=1e-4)


def test_the_score_is_paid_once_on_the_last_token():
    """A public stack added it to every token: a score of 2 over 4 tokens came to 8."""
    sequence = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    rewards = token_rewards(torch.zeros(7), torch.tensor([2.0, -1.0, 0.5]), sequence)
    assert rewards.tolist() == [0, 0, 0, 2, -1, 0, 0.5]
    kl = torch.tensor([0.1, -0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    rewards = token_rewards(0.5 * kl, torch.tensor([2.0, -1.0, 0.5]), sequence)
    want = torch.tensor([-0.05, 0.1, -0.15, 2 - 0.2, -1 - 0.25, -0.3, 0.5 - 0.35])
    torch.testing.assert_close(rewards, want)
    half = token_rewards(kl.bfloat16(), torch.tensor([2.0, -1.0, 0.5], dtype=torch.bfloat16), sequence)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("sequence", [[0, 0, 2], [0, 2, 2], [1, 0, 2], [0, 1, 0], [1, 1, 2], [0, 1, 3]])
def test_a_score_is_never_lost(sequence):
    with pytest.raises(ValueError, match="numbers 0 to 2 of the 3 sequences"):
        token_rewards(torch.zeros(3), torch.ones(3), torch.tensor(sequence))
    with pytest.raises(ValueError, match="ascending order"):
        gae(torch.zeros(3), torch.zeros(3), torch.zeros(3), torch.tensor(sequence), 1.0, 1.0)


# ------------------------------------------------------------------------------------------------- whitening


def numbers(n=1000, seed=3):
    return 2 + 3 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_whitened_by_the_population_variance():
    values = numbers()
    want = (values.numpy() - np.mean(values.numpy())) / np.sqrt(np.var(values.numpy()) + 1e-8)
    np.testing.assert_allclose(whiten(values).numpy(), want, rtol=1e-12, atol=1e-12)
    kept = whiten(values, shift_mean=False)
    assert kept.mean().item() == pytest.approx(values.mean().item())
    assert kept.std(correction=0).item() == pytest.approx(1)


def test_parts_are_whitened_as_the_whole():
    values = numbers()
    parts = values.split([1, 299, 700])
    empty = moments(torch.zeros(0, dtype=torch.float64))  # a rank without tokens
    whole = merge_moments(torch.stack([*map(moments, parts), empty]))
    torch.testing.assert_close(whole, moments(values), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([whiten(p, whole) for p in parts]), whiten(values), rtol=1e-12, atol=1e-12)


def test_a_large_mean_does_not_eat_the_variance():
    """The mean of squares less the squared mean is 0 or negative here, in fp32."""
    values = torch.tensor([10_000.0, 10_000.25, 10_000.5, 10_000.75])
    assert (values.square().mean() - values.mean().square()).sub(0.078125).abs() > 0.05
    torch.testing.assert_close(whiten(values), torch.tensor([-1.5, -0.5, 0.5, 1.5]) / 1.25**0.5)
    merged = merge_moments(torch.stack([moments(values[:1]), moments(values[1:])]))
    torch.testing.assert_close(merged, torch.tensor([4.0, 10_000.375, 0.3125]))


def test_weights_count_and_fillers_do_not():
    values, weight = torch.tensor([1.0, 5.0, 100.0]), torch.tensor([3.0, 1.0, 0.0])
    torch.testing.assert_close(moments(values, weight), moments(torch.tensor([1.0, 1.0, 1.0, 5.0])))
    assert moments(values, torch.zeros(3)).tolist() == [0, 0, 0]


def test_equal_values_become_zero():
    assert whiten(torch.full((5,), 0.5)).tolist() == [0] * 5
    assert whiten(torch.tensor([3.0])).tolist() == [0]
    assert whiten(torch.tensor([1.0, 2.0]).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("value", [0.1, -1.0, 1e4 / 3, 1e-7, 0.0])
@pytest.mark.parametrize("count", [1, 3, 1000])
@pytest.mark.parametrize("ranks", [1, 3])
def test_equal_values_are_not_blown_up(value, count, ranks):
    """Their mean in fp32 is off by rounding, and so is each distance from it: nothing may be divided by that."""
    values = torch.full((count,), value, requires_grad=True)
    whole = merge_moments(torch.stack([*map(moments, values.chunk(ranks)), moments(torch.zeros(0))]))
    assert variance(whole).item() == 0
    whitened = whiten(values, whole)
    assert whitened.tolist() == [0] * count
    kept = whiten(values, whole, shift_mean=False)
    torch.testing.assert_close(kept, values, rtol=1e-6, atol=0)
    (whitened.sum() + kept.sum()).backward()
    assert values.grad.isfinite().all()
    running = RunningMoments()
    for _ in range(3):
        running.update(whole.detach())
        assert (running.std, running.scale) == (0, 1)
    assert explained_variance(torch.randn(count), values).isnan()  # there is nothing to explain, and it says so


def test_a_small_spread_is_kept():
    values = 1000 + torch.tensor([-1.0, 1.0]) * 2e-2
    assert variance(moments(values)).sqrt().item() == pytest.approx(0.02, rel=1e-2)
    wide = 1e6 + torch.tensor([-1.0, 1.0], dtype=torch.float64) * 1e-3
    torch.testing.assert_close(whiten(wide), torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=1e-2, atol=0)
    running = RunningMoments()
    running.update(moments(torch.tensor([1e-9, -1e-9])))
    assert running.scale == pytest.approx(1e-9)


def test_what_does_not_count_may_be_no_number():
    values, weight = torch.tensor([1.0, float("nan"), 3.0, float("inf")]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    assert moments(values, weight).tolist() == [2, 2, 2]
    assert moments(values, torch.zeros(4)).tolist() == [0, 0, 0]
    assert whiten(torch.ones(2), moments(values, torch.zeros(4))).tolist() == [0, 0]


def test_nothing_at_all_is_defined():
    nothing = torch.zeros(0)
    assert whiten(nothing).tolist() == [] and variance(moments(nothing)) == 0
    assert token_rewards(nothing, nothing, torch.zeros(0, dtype=torch.long)).tolist() == []
    found = gae(nothing, nothing, nothing, torch.zeros(0, dtype=torch.long), 1.0, 0.95)
    assert found.advantages.tolist() == found.returns.tolist() == []
    assert (RunningMoments().std, RunningMoments().scale) == (0, 1)


def test_running_moments():
    values, running = numbers(), RunningMoments()
    assert (running.mean, running.std) == (0, 0)
    for part in values.split([8, 8, 484, 500]):
        ranks = torch.stack([moments(rank) for rank in part.chunk(2)])
        running.update(merge_moments(ranks))
    assert running.count == 1000
    assert running.mean == pytest.approx(values.numpy().mean(), rel=1e-12)
    assert running.std == pytest.approx(np.std(values.numpy()), rel=1e-12)
    again = RunningMoments()
    again.load_state_dict(running.state_dict())
    for one in (running, again):
        one.update(moments(torch.tensor([1.0, 2.0])))
    assert again.state_dict() == running.state_dict() and running.count == 1002
    with pytest.raises(ValueError, match="must be finite"):
        running.update(moments(torch.tensor([1.0, float("nan")])))
    assert again.state_dict() == running.state_dict()


# ------------------------------------------------------------------------------------------------- KL control


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
def test_the_controller_is_proportional_and_clipped(kl, error):
    assert adapt_kl_coef(0.1, kl, 6.0, 10_000, 256) == pytest.approx(0.1 * (1 + error * 256 / 10_000), rel=1e-12)


def test_the_controller_finds_its_target():
    """Where the KL falls as the coefficient rises, it ends at the target."""
    coef = 0.01
    for _ in range(2000):
        coef = adapt_kl_coef(coef, kl=1.0 / coef, target=8.0, horizon=10_000, samples=512)
    assert 1 / coef == pytest.approx(8.0, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target=0.0), "above 0"),
        (dict(horizon=-1.0), "above 0"),
        (dict(samples=50_000), "too short"),
        (dict(kl=float("nan")), "KL is nan"),
        (dict(kl=float("inf")), "KL is inf"),
    ],
)
def test_what_the_controller_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        adapt_kl_coef(**{"coef": 0.1, "kl": 1.0, "target": 6.0, "horizon": 10_000, "samples": 64, **settings})


def test_padded_rectangles_are_refused_with_the_way_to_pack_them():
    """As other libraries have them; read as rows of tokens they would give numbers that mean nothing."""
    rewards, values, last, sequence = rollout([3, 2])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    padded_rewards, padded_values = torch.zeros(2, 2, 3, dtype=torch.float64).unbind()
    padded_rewards[mask], padded_values[mask] = rewards, values
    for wrong in (
        lambda: gae(padded_rewards, padded_values, last, sequence, 1.0, 0.95),
        lambda: gae(padded_rewards, padded_values, last, mask, 1.0, 0.95),
        lambda: token_rewards(padded_rewards, last, sequence),
        lambda: gae(rewards[:-1], values, last, sequence, 1.0, 0.95),
    ):
        with pytest.raises(ValueError, match=r"must be \(N,\).*sequence=mask.nonzero\(\)\[:, 0\]"):
            wrong()
    with pytest.raises(ValueError, match=r"must be \(S,\), one per sequence; got \(2, 1\)"):
        gae(rewards, values, last[:, None], sequence, 1.0, 0.95)
    packed = gae(padded_rewards[mask], padded_values[mask], last, mask.nonzero()[:, 0], 1.0, 0.95)
    torch.testing.assert_close(packed.advantages, gae(rewards, values, last, sequence, 1.0, 0.95).advantages)
