"""Rewards by a reward model: the tokens that were sampled, no more and no less."""

import pytest
import torch
from reward_models import save_reward_adapter
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.data.templates import set_chat_template
from lightning_rlhf.data.tokens import encode_prompt
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rewards import BadScores, RewardModelReward, Samples

PROMPTS = [[{"role": "user", "content": "Say fox"}], [{"role": "user", "content": "你好"}]]


@pytest.fixture
def reward_dir(tiny_model_dir, tiny_tokenizer, tmp_path):
    torch.manual_seed(1)
    model = load_reward_model(tiny_model_dir, pad_token_id=tiny_tokenizer.pad_token_id)
    model.config.score_offset = 0.5
    save_pretrained(model, tiny_tokenizer, tmp_path / "reward")
    return tmp_path / "reward"


def sampled(tokenizer, texts=(("the dog", "a fox"), ("很好", "no")), cut=(False, True, False, False)):
    """Completions as they are sampled: their tokens, and a stop token unless the length limit cut them."""
    stop, flags = tokenizer.eos_token_id, iter(cut)
    trees = []
    for prompt, answers in zip(PROMPTS, texts, strict=True):
        branches = []
        for text in answers:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            branches.append(Branch(ids if next(flags) else [*ids, stop]))
        trees.append(Tree(encode_prompt(tokenizer, prompt), branches))
    prompts = [p for p, answers in zip(PROMPTS, texts, strict=True) for _ in answers]
    return Samples(pack(trees), prompts, [t for a in texts for t in a], list(cut), {})


def plain_scores(directory, samples):
    """Of plain transformers, one sequence at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    ids = samples.batch.input_ids.tolist()
    scores = []
    for prompt, branches in samples.batch.forest.trees:
        for b in branches:
            row = ids[prompt.start : prompt.start + prompt.length] + ids[b.start : b.start + b.length]
            scores.append(model(torch.tensor([row])).logits[0, 0].item())
    return torch.tensor(scores)


def test_scores_are_those_of_the_sampled_tokens_less_the_offset(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    reward.load()
    assert reward.same_tokens
    samples = sampled(tiny_tokenizer)
    found = reward(samples).total
    torch.testing.assert_close(found, plain_scores(reward_dir, samples) - 0.5, rtol=1e-5, atol=1e-5)
    small = RewardModelReward(reward_dir, tiny_tokenizer, max_tokens=40)
    small.load()
    torch.testing.assert_close(small(samples).total, found, rtol=1e-5, atol=1e-5)


def test_it_is_frozen_and_in_evaluation_mode(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    assert not list(reward.parameters())  # light until loaded
    reward.load()
    reward.train()
    assert not any(p.requires_grad for p in reward.parameters())
    assert not any(m.training for m in reward.modules())
    assert not reward(sampled(tiny_tokenizer)).total.requires_grad


def test_another_tokenizer_reads_the_texts_by_its_own_template(reward_dir, tiny_tokenizer, tiny_model_dir):
    """The same conversation gets the same score, whatever tokens the policy sampled it in."""
    policy = AutoTokenizer.from_pretrained(tiny_model_dir)
    set_chat_template(policy, "plain")
    reward = RewardModelReward(reward_dir, policy)
    reward.load()
    assert not reward.same_tokens
    theirs = sampled(policy)
    want = RewardModelReward(reward_dir, tiny_tokenizer)
    want.load()
    torch.testing.assert_close(reward(theirs).total, want(sampled(tiny_tokenizer)).total, rtol=1e-5, atol=1e-5)


def test_plain_texts_are_read_in_two_pieces(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    reward.load()
    reward.same_tokens = False
    ids = tiny_tokenizer("Once upon", add_special_tokens=False).input_ids
    answer = tiny_tokenizer(" a time", add_special_tokens=False).input_ids
    trees = [Tree(ids, [Branch([*answer, tiny_tokenizer.eos_token_id]), Branch(answer)])]
    samples = Samples(pack(trees), ["Once upon"] * 2, [" a time"] * 2, [False, True], {})
    torch.testing.assert_close(reward(samples).total, plain_scores(reward_dir, samples) - 0.5, rtol=1e-5, atol=1e-5)


def test_adapters_are_a_reward_model_too(tiny_model_dir, tiny_tokenizer, tmp_path):
    found = []
    for directory in save_reward_adapter(tiny_model_dir, tiny_tokenizer, tmp_path).values():
        reward = RewardModelReward(directory, tiny_tokenizer)
        reward.load()
        found.append(reward(sampled(tiny_tokenizer)).total)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_language_model_is_no_reward_model(tiny_model_dir, tiny_tokenizer):
    reward = RewardModelReward(tiny_model_dir, tiny_tokenizer)
    with pytest.raises(ValueError, match="is not a reward model"):
        reward.load()


def test_a_budget_below_one_prompt(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer, max_tokens=5)
    reward.load()
    with pytest.raises(ValueError, match="over the reward's max_tokens=5"):
        reward(sampled(tiny_tokenizer))


def test_a_score_that_is_no_number_names_its_sample(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    reward.load()
    reward.model.transformer.score.weight.data[0, 0] = float("nan")
    with pytest.raises(BadScores, match=r"reward model .* returned nan for completion 0.* finite number.*Prompt: "):
        reward(sampled(tiny_tokenizer))
