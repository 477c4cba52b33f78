"""The GRPO family as a textbook would write it: padded rectangles, loops over groups, no packing, no engine.

It shares nothing with the package: the model is a plain transformers one, log-probs come from whole logits, and
statistics are Python's. Samples are given, one list per prompt.
"""

import statistics
from dataclasses import dataclass

import torch


@dataclass
class Settings:
    baseline: str = "mean"  # mean, leave_one_out, none
    std: bool = True
    whiten: bool = False
    ratio: str = "token"  # token, sequence, none
    low: float = 0.2
    high: float = 0.2
    mean: str = "sequence"  # token, sequence, constant
    longest: int = 10
    temperature: float = 1.0
    kl_coef: float = 0.0
    kl_where: str = "loss"
    drop: bool = False
    penalty: float = 0.0
    cache: int = 0
    mask: bool = False
    entropy_coef: float = 0.0
    max_norm: float = 1.0


@dataclass
class Sample:
    prompt: list
    completion: list
    score: float
    truncated: bool
    sampled: list | None = None  # for each token of the completion, whether the policy sampled it; None: all
    counts: bool = True
    old: torch.Tensor | None = None
    ref: torch.Tensor | None = None
    advantages: torch.Tensor | None = None


def token_scores(model, samples, temperature):
    """For each sample the log-probs and entropies of the tokens that the policy sampled."""
    width = max(len(s.prompt) + len(s.completion) for s in samples)
    ids, mask = torch.zeros(2, len(samples), width, dtype=torch.long).unbind()
    for i, s in enumerate(samples):
        row = torch.tensor([*s.prompt, *s.completion])
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits / temperature
    found = []
    for i, s in enumerate(samples):
        first, end = len(s.prompt), len(s.prompt) + len(s.completion)
        every = torch.log_softmax(logits[i, first - 1 : end - 1], -1)
        picked = every[torch.arange(len(s.completion)), torch.tensor(s.completion)]
        own = torch.tensor(s.sampled or [True] * len(s.completion))
        found.append((picked[own], -(every.exp() * every).sum(-1)[own]))
    return found


@torch.no_grad()
def judge(policy, reference, groups, s):
    every = [sample for group in groups for sample in group]
    for sample, (logp, _) in zip(every, token_scores(policy, every, s.temperature), strict=True):
        sample.old = logp
    if s.kl_coef:
        for sample, (logq, _) in zip(every, token_scores(reference, every, s.temperature), strict=True):
            sample.ref = logq
    for group in groups:
        rewards, scores = [], []
        for sample in group:
            score = sample.score - (s.penalty if sample.truncated else 0.0)
            if s.cache:
                over = len(sample.old) - (s.longest - s.cache)
                score -= min(1.0, max(0.0, over / s.cache))
            scores.append(score)
            away = sample.old - sample.ref if s.kl_coef and s.kl_where == "reward" else torch.zeros_like(sample.old)
            reward = -s.kl_coef * away
            reward[-1] += score
            rewards.append(reward)
        flat = all(score == scores[0] for score in scores)
        totals = [reward.sum().item() for reward in rewards]
        for sample, reward, total in zip(group, rewards, totals, strict=True):
            sample.counts = not (s.drop and flat) and not (s.mask and sample.truncated)
            if s.baseline == "none":
                sample.advantages = reward.flip(0).cumsum(0).flip(0)
                continue
            others = [t for t, x in zip(totals, group, strict=True) if x is not sample]
            center = sum(others) / len(others) if s.baseline == "leave_one_out" else sum(totals) / len(totals)
            advantage = total - center
            if s.std:
                advantage /= statistics.stdev(totals) + 1e-4
            if all(t == totals[0] for t in totals):
                advantage = 0.0
            sample.advantages = torch.full_like(reward, advantage)
    if s.whiten:
        flat = torch.cat([sample.advantages for sample in every if sample.counts])
        mean, std = flat.mean(), (flat.var(unbiased=False) + 1e-8).sqrt()
        for sample in every:
            sample.advantages = (sample.advantages - mean) / std


def loss_of(policy, groups, s):
    every = [sample for group in groups for sample in group]
    counted = [sample for sample in every if sample.counts]
    tokens = sum(len(sample.old) for sample in counted)
    loss = extra = 0.0
    for sample, (logp, entropy) in zip(every, token_scores(policy, every, s.temperature), strict=True):
        if not sample.counts:
            continue
        change, a = logp - sample.old, sample.advantages
        if s.ratio == "none":
            by_token = -a * logp
        else:
            ratio = (change.mean().expand_as(change) if s.ratio == "sequence" else change).exp()
            by_token = -torch.min(ratio * a, ratio.clamp(1 - s.low, 1 + s.high) * a)
        further = -s.entropy_coef * entropy
        if s.kl_coef and s.kl_where == "loss":
            away = logp - sample.ref
            further = further + s.kl_coef * ((-away).exp() - 1 + away)
        share = 1 / len(counted)
        weight = {"token": 1 / tokens, "sequence": share / len(logp), "constant": share / s.longest}
        loss = loss + weight[s.mean] * by_token.sum()
        extra = extra + weight[s.mean] * further.sum()
    return loss, loss + extra


def update(policy, groups, s, parameters, optimizer):
    """One optimizer step."""
    found = loss_of(policy, groups, s)
    found[1].backward()
    torch.nn.utils.clip_grad_norm_(parameters, s.max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return [loss.item() for loss in found]
