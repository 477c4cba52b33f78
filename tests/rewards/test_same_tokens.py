"""When a reward model may read the sampled tokens, and what it reads otherwise."""

import pytest
import torch
from transformers import AutoTokenizer

from lightning_rlhf.data.packed import Branch, Tree, pack, unpack
from lightning_rlhf.data.tokens import encode_prompt
from lightning_rlhf.models import load_reward_model
from lightning_rlhf.models.reward import set_distinct_pad_token
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rewards import RewardModelReward, Samples
from lightning_rlhf.rewards.model import same_tokens, within_budget

PROMPT = [{"role": "user", "content": "Say fox"}]


@pytest.fixture
def pair(tiny_model_dir):
    return [AutoTokenizer.from_pretrained(tiny_model_dir) for _ in range(2)]


@pytest.fixture
def reward_dir(tiny_model_dir, tiny_tokenizer, tmp_path):
    model = load_reward_model(tiny_model_dir, pad_token_id=tiny_tokenizer.pad_token_id)
    save_pretrained(model, tiny_tokenizer, tmp_path / "reward")
    return tmp_path / "reward"


def test_alike(pair, reward_dir):
    policy, reward = pair
    assert same_tokens(policy, reward) and same_tokens(policy, AutoTokenizer.from_pretrained(reward_dir))
    policy("a text", padding="max_length", max_length=20, truncation=True)  # leaves settings behind
    policy.pad_token = "<unk>"
    assert same_tokens(policy, reward)


def test_a_pad_token_of_its_own_is_no_difference(pair):
    policy, reward = pair
    stops = policy.convert_tokens_to_ids(["<|im_end|>", "</s>", "<unk>", "<|im_start|>"])
    set_distinct_pad_token(reward, stops)
    assert len(reward) == len(policy) + 1 and same_tokens(policy, reward)
    assert not same_tokens(reward, policy)  # a policy could sample what the reward model does not know


@pytest.mark.parametrize("change", ["template", "eos", "added", "merges"])
def test_differences(change, pair):
    policy, reward = pair
    if change == "template":
        reward.chat_template += " "
    elif change == "eos":
        reward.eos_token = "</s>"
    elif change == "added":
        policy.add_tokens(["fox"])
    else:
        from tokenizers import normalizers

        reward.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not same_tokens(policy, reward)


def samples(tokenizer, cut):
    ids = tokenizer("a fox", add_special_tokens=False).input_ids
    branches = [Branch(ids if c else [*ids, tokenizer.eos_token_id]) for c in cut]
    batch = pack([Tree(encode_prompt(tokenizer, PROMPT), branches)])
    return Samples(batch, [PROMPT] * len(cut), ["a fox"] * len(cut), list(cut), {})


def test_rendered_again_a_conversation_is_the_sampled_one(reward_dir, tiny_tokenizer):
    """One tree for a prompt's completions, the stop token where it was sampled, nothing behind it."""
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    given = samples(tiny_tokenizer, [False, True, False])
    assert reward._rendered(given) == [
        Tree(tree.prompt, [Branch(b.input_ids) for b in tree.branches]) for tree in unpack(given.batch)
    ]


def test_a_cut_completion_without_text_has_a_score(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    reward.load()
    reward.same_tokens = False
    given = samples(tiny_tokenizer, [True])
    given.completions[0] = ""
    score = reward(given).total
    prompt = encode_prompt(tiny_tokenizer, PROMPT)
    want = reward.model(pack([Tree(prompt[:-1], [Branch(prompt[-1:])])]))
    torch.testing.assert_close(score, want, rtol=1e-5, atol=1e-6)


def test_a_conversation_over_the_context_is_refused(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    reward.load()
    batch = pack([Tree([5] * 200, [Branch([6] * 57)])])
    with pytest.raises(ValueError, match="reads 256 tokens, and a conversation has 257"):
        reward(Samples(batch, [PROMPT], ["x"], [True], {}))


def test_what_the_template_refuses_names_the_completion(reward_dir, tiny_tokenizer):
    reward = RewardModelReward(reward_dir, tiny_tokenizer)
    reward.same_tokens = False
    reward.tokenizer.chat_template = "{{ raise_exception('no chats today') }}"
    with pytest.raises(ValueError, match=r"can't read completion 0: .*no chats today"):
        reward._rendered(samples(tiny_tokenizer, [False]))


def test_templates_need_known_tokens(reward_dir, tiny_tokenizer):
    with pytest.raises(ValueError, match="does not know the tokens of chat_template='llama3'"):
        RewardModelReward(reward_dir, tiny_tokenizer, chat_template="llama3")


@pytest.mark.parametrize(("budget", "number"), [(7, 9), (10, 6), (13, 4), (1000, 1)])
def test_rows_keep_order_and_budget(budget, number):
    trees = [Tree([1] * n, [Branch([i, j, 9]) for j in range(k)]) for i, (n, k) in enumerate([(4, 3), (2, 1), (3, 5)])]
    rows = within_budget(trees, budget)
    assert all(sum(tree.num_tokens for tree in row) <= budget for row in rows)
    flat = [(tree.prompt, branch) for row in rows for tree in row for branch in tree.branches]
    assert flat == [(tree.prompt, branch) for tree in trees for branch in tree.branches]
    assert len(rows) == number
