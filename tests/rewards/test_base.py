"""What holds for every reward: what it is given is its own, and what it returns is checked."""

import pytest
import torch

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.rewards import Reward, Samples, Scores, WeightedReward, make_reward


def samples():
    prompt = [{"role": "user", "content": "say a"}]  # one object for both completions
    batch = pack([Tree([5, 6], [Branch([7]), Branch([8, 4])])])
    return Samples(batch, [prompt, prompt], ["a", "b c"], [True, False], {"wanted": [["a"], ["b"]]})


class Returns(Reward):
    """Returns what it is told to, whatever that is."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, samples):
        return self.value


class Writes(Reward):
    """Counts tokens, then spoils all that it was given."""

    def forward(self, samples):
        scores = samples.batch.lengths.float() + len(samples.prompts[0])
        for name in ("input_ids", "position_ids", "target", "predictor", "last", "weight"):
            getattr(samples.batch, name).zero_()
        samples.prompts[0].append({"role": "assistant", "content": "a"})
        samples.prompts[0][0]["content"] = ""
        samples.columns["wanted"][0].clear()
        samples.completions.clear()
        samples.truncated.clear()
        return Scores(scores)


def chats(prompts, completions, wanted):
    """Makes chats of what it is given, as one easily does: a completion at the end of its prompt."""
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt.append({"role": "assistant", "content": completion})
    return [float(len(prompt)) + len(wanted.pop()) for prompt, wanted in zip(prompts, wanted, strict=True)]


@pytest.mark.parametrize(
    ("reward", "scores"),
    [
        (Writes(), [2.0, 3.0]),
        (make_reward(chats, None), [3.0, 3.0]),
        (make_reward([WeightedReward(Writes()), WeightedReward(chats), WeightedReward(Writes(), 2.0)], None), [9, 12]),
    ],
    ids=["class", "function", "list"],
)
def test_a_reward_may_write_into_what_it_is_given(reward, scores):
    given, same = samples(), samples()
    assert reward(given).total.tolist() == reward(given).total.tolist() == scores
    assert (given.prompts, given.completions, given.truncated, given.columns) == (
        same.prompts, same.completions, same.truncated, same.columns
    )  # fmt: skip
    for name in ("input_ids", "position_ids", "target", "predictor", "last", "weight"):
        assert torch.equal(getattr(given.batch, name), getattr(same.batch, name)), name


@pytest.mark.parametrize("place", ["alone", "in a list"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2), r"The reward Returns returned a Tensor for 2 completions\. Return .*Scores\(total\).*\(2,\)"),
        ([0.0, 1.0], r"The reward Returns returned a list for 2 completions\."),
        (Scores(torch.zeros(2, 1)), r"returned scores of shape \(2, 1\) for 2 completions\. Return .* of shape \(2,\)"),
    ],
)
def test_a_reward_that_does_not_return_scores_is_told_what_to_return(value, message, place):
    reward = Returns(value) if place == "alone" else make_reward([WeightedReward(Returns(value))], None)
    with pytest.raises((TypeError, ValueError), match=message):
        reward(samples())
