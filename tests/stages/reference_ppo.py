"""PPO as a textbook would write it: padded rectangles, loops over tokens, no packing, no engine, one device.

It shares nothing with the package: the models are plain transformers ones, log-probs come from whole logits, GAE is the
recursion itself. Samples are given.
"""

from dataclasses import dataclass, field

import torch


@dataclass
class Settings:
    temperature: float = 1.0
    kl_coef: float = 0.05
    kl_penalty: str = "reward"
    clip: float = 0.2
    clip_high: float = 0.2
    clip_value: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    bootstrap: bool = False
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    clip_scores: float | None = None
    missing_stop_penalty: float = 0.0
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    loss_mean: str = "token"
    max_norm: float = 1.0


@dataclass
class Sample:
    prompt: list
    completion: list
    score: float
    truncated: bool
    numbers: dict = field(default_factory=dict)


def rectangle(samples):
    width = max(len(s.prompt) + len(s.completion) for s in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(samples):
        row = torch.tensor([*s.prompt, *s.completion])
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


def token_scores(model, samples, temperature):
    """For each sample the log-probs and entropies of its completion's tokens."""
    ids, mask = rectangle(samples)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits / temperature
    found = []
    for i, s in enumerate(samples):
        first, end = len(s.prompt), len(s.prompt) + len(s.completion)
        every = torch.log_softmax(logits[i, first - 1 : end - 1], -1)
        picked = every[torch.arange(len(s.completion)), torch.tensor(s.completion)]
        found.append((picked, -(every.exp() * every).sum(-1)))
    return found


def token_values(critic, samples):
    """For each sample the values before each token of its completion, and behind the last."""
    ids, mask = rectangle(samples)
    values = critic(ids, mask)
    found = []
    for i, s in enumerate(samples):
        first, end = len(s.prompt), len(s.prompt) + len(s.completion)
        found.append((values[i, first - 1 : end - 1], values[i, end - 1]))
    return found


def advantages_of(rewards, values, last, gamma, lam):
    advantages = torch.zeros_like(values)
    following, carried = last, 0.0
    for t in reversed(range(len(values))):
        delta = rewards[t] + gamma * following - values[t]
        carried = delta + gamma * lam * carried
        advantages[t], following = carried, values[t]
    return advantages


def whitened(columns, shift=True):
    flat = torch.cat(columns)
    mean, std = flat.mean(), (flat.var(unbiased=False) + 1e-8).sqrt()
    return [(c - mean) / std + (0 if shift else mean) for c in columns]


@torch.no_grad()
def judge(policy, reference, critic, samples, s):
    old, ref = token_scores(policy, samples, s.temperature), token_scores(reference, samples, s.temperature)
    values = token_values(critic, samples)
    rewards = []
    for sample, (logp, _), (logq, _) in zip(samples, old, ref, strict=True):
        score = sample.score - (s.missing_stop_penalty if sample.truncated else 0.0)
        if s.clip_scores is not None:
            score = max(-s.clip_scores, min(s.clip_scores, score))
        reward = -s.kl_coef * (logp - logq) if s.kl_penalty == "reward" else torch.zeros_like(logp)
        reward[-1] += score
        rewards.append(reward)
        sample.numbers["reward"] = reward.sum().item()
    if s.whiten_rewards:
        rewards = whitened(rewards, shift=False)
    raw = []
    for sample, reward, (v, last) in zip(samples, rewards, values, strict=True):
        end = last if s.bootstrap and sample.truncated else torch.zeros_like(last)
        raw.append(advantages_of(reward, v, end, s.gamma, s.lam))
    final = whitened(raw) if s.whiten_advantages else raw
    for sample, (logp, _), (logq, _), (v, _), a, w in zip(samples, old, ref, values, raw, final, strict=True):
        sample.numbers |= {"old": logp, "ref": logq, "values": v, "returns": a + v, "advantages": w}


def losses(policy, critic, samples, s):
    """Policy loss, value loss and all together, of a minibatch."""
    tokens = sum(len(x.completion) for x in samples)
    policy_sum = value_sum = extra = 0.0
    now, values = token_scores(policy, samples, s.temperature), token_values(critic, samples)
    for x, (logp, entropy), (v, _) in zip(samples, now, values, strict=True):
        n = x.numbers
        weight = 1 / tokens if s.loss_mean == "token" else 1 / len(samples) / len(x.completion)
        ratio = (logp - n["old"]).exp()
        bounded = torch.clamp(ratio, 1 - s.clip, 1 + s.clip_high)
        policy_sum = policy_sum + weight * -torch.min(ratio * n["advantages"], bounded * n["advantages"]).sum()
        error = (v - n["returns"]) ** 2
        if s.clip_value is not None:
            near = n["values"] + (v - n["values"]).clamp(-s.clip_value, s.clip_value)
            error = torch.max(error, (near - n["returns"]) ** 2)
        value_sum = value_sum + weight * 0.5 * error.sum()
        away = logp - n["ref"]
        if s.kl_penalty == "k2":
            extra = extra + weight * s.kl_coef * (away**2 / 2).sum()
        if s.kl_penalty == "k3":
            extra = extra + weight * s.kl_coef * ((-away).exp() - 1 + away).sum()
        extra = extra - weight * s.entropy_coef * entropy.sum()
    return policy_sum, value_sum, policy_sum + extra + s.value_coef * value_sum


def update(policy, critic, samples, s, groups, optimizers):
    """One optimizer step; ``groups`` are the parameters of policy and of critic, each clipped by its own norm."""
    found = losses(policy, critic, samples, s)
    found[2].backward()
    for parameters in groups:
        torch.nn.utils.clip_grad_norm_(parameters, s.max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return [loss.item() for loss in found]
