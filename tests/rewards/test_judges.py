"""A judge as a reward: all pairs of a prompt in both orders."""

import pytest
import torch

from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.rewards import BadScores, JudgedReward, Samples
from lightning_rlhf.rewards.judges import Judge, Verdict


class Asked(Judge):
    """Judges by a function of two texts, and keeps the questions."""

    def __init__(self, decide):
        self.decide, self.questions = decide, []

    def compare(self, questions):
        self.questions += questions
        return [Verdict(self.decide(q.first.text, q.second.text)) for q in questions]


def samples(*groups):
    """Prompts with completions."""
    trees = [Tree([1], [Branch([2]) for _ in group]) for group in groups]
    texts = [text for group in groups for text in group]
    prompts = [f"prompt {i}" for i, group in enumerate(groups) for _ in group]
    columns = {"wanted": [i for i, group in enumerate(groups) for _ in group]}
    return Samples(pack(trees, rows=range(len(trees))), prompts, texts, [text == "cut" for text in texts], columns)


def longer(first, second):
    return "first" if len(first) > len(second) else "second" if len(second) > len(first) else "tie"


def test_a_score_is_the_share_of_comparisons_that_are_won():
    judge = Asked(longer)
    scores = JudgedReward(judge)(samples(["a", "ccc", "bb", "dd"], ["x", "cut"])).total
    assert torch.allclose(scores, torch.tensor([0.0, 1.0, 0.5, 0.5, 0.0, 1.0]))
    assert len(judge.questions) == 2 * (6 + 1)
    one, other = judge.questions[-2:]
    assert (one.first, one.second) == (other.second, other.first) and other.first.truncated
    assert one.prompt == "prompt 1" and one.columns == {"wanted": 1}


def test_orders_that_disagree_are_ties():
    assert JudgedReward(Asked(lambda first, second: "first"))(samples(["a", "b", "c"])).total.tolist() == [0.5] * 3


def test_verdicts_that_can_not_be_read_count_for_neither():
    judge = Asked(lambda first, second: None if "b" in first + second else longer(first, second))
    with pytest.raises(BadScores, match=r"The judge Asked returned nan for completion 1 \(row 0 of the prompts\)") as e:
        JudgedReward(judge)(samples(["aa", "b", "c"]))
    assert e.value.scores.total.nan_to_num(nan=9.0).tolist() == [1.0, 9.0, 0.0]


def test_what_is_no_judge_is_named():
    with pytest.raises(ValueError, match=r"^judge is a function: give a Judge, .* give it as reward\.$"):
        JudgedReward(longer)
