"""The functions that come with the package."""

import re
from itertools import pairwise

import pytest

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.rewards import FunctionReward, Samples
from lightning_rlhf.rewards.functions import answer_match, format_match, length_window


def samples(completions, **columns):
    batch = pack([Tree([5], [Branch([7]) for _ in completions])])
    size = len(completions)
    return Samples(batch, ["q"] * size, list(completions), [False] * size, columns)


def test_by_import_path_with_columns():
    reward = FunctionReward("lightning_rlhf.rewards.functions.length_window")
    assert reward(samples(["a" * 8, "b" * 8], low=[4, 16], high=[8, 20], answer=[1, 2])).total.tolist() == [1.0, 0.5]
    reward = FunctionReward("lightning_rlhf.rewards.functions:answer_match")
    assert reward(samples(["Answer: 72", "71"], answer=["so many\n#### 72", 72])).total.tolist() == [1.0, 0.0]


def test_the_window_has_no_step():
    lengths = range(0, 60)
    scores = length_window([""] * 60, ["x" * n for n in lengths], low=10, high=20)
    assert scores[0] == 0 and scores[10:21] == [1.0] * 11 and scores[40:] == [0.0] * 20
    assert max(abs(a - b) for a, b in pairwise(scores)) <= 0.1 + 1e-12
    with pytest.raises(ValueError, match="low=5 and high=4"):
        length_window([""], ["x"], low=5, high=4)


def test_the_whole_completion_matches():
    texts = ["<a>\nx\n</a>\n", "so <a>x</a>", "<a>x</a> so", ""]
    assert format_match([""] * 4, texts, "<a>.*</a>") == [1, 0, 0, 0]
    assert format_match([""] * 2, ["12", "ab"], [r"\d+", r"\d+"]) == [1, 0]


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so \\boxed{12}", 12, 1),
        ("first \\boxed{3}, no, \\boxed{4}", "4", 1),
        ("#### 1,234.0", "1234", 1),
        ("The answer: $5$.", "5", 1),
        ("答案：北京。", "北京", 1),
        ("PARIS.", "Paris", 1),
        ("It is Paris", "Paris", 0),
        ("12", "-12", 0),
        ("1,2", "12", 0),
        ("nan", "nan", 1),
        ("", "5", 0),
        # braces inside
        ("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1),
        ("so \\boxed{\\frac{1}{2}}", "the half: $\\boxed{\\frac{1}{2}}$", 1),
        ("so \\boxed{\\frac{1}{2}}", "2", 0),
        ("\\boxed{\\text{5}} no, \\boxed{x^{2_{1}}}", "x^{2_{1}}", 1),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", 1),
        ("\\boxed{\\boxed{5}}", 5, 1),
        ("\\boxed{4} and then \\boxed{5", 4, 1),  # cut: it never closes
        # who names several doesn't know
        ("4 or 5", 5, 0),
        ("\\boxed{4 or 5}", 5, 0),
        ("\\boxed{4} or \\boxed{5}", 5, 0),
        ("\\boxed{4} or \\boxed{5}", 4, 0),
        ("$\\boxed{4}$ or maybe $\\boxed{5}$", 5, 0),
        ("\\boxed{4} \\text{ or } \\boxed{5}", 5, 0),
        ("\\boxed{4}, \\boxed{5}", 5, 0),
        ("\\boxed{4}或\\boxed{5}", 5, 0),
        ("Answer: 4 or 5", 5, 0),
        ("Answer: 4 or\nAnswer: 5", 5, 0),
        ("#### 4\nor\n#### 5", 5, 0),
        ("\\boxed{4} or \\boxed{5}", "4 or 5", 1),
        ("\\boxed{4}, \\boxed{5}", "4, 5", 1),
        ("#### 4\nNo:\n#### 5", 5, 1),
        ("Answer: north or", "north", 1),
        ("Answer: doctor", "doctor", 1),
        ("Answer: nor", "nor", 1),
    ],
)
def test_answers(text, answer, score):
    assert answer_match([""], [text], [answer]) == [score]


def test_a_module_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text(
        "def shout(prompts, completions):\n    return [c.count('!') for c in completions]\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    assert FunctionReward("my_own_rewards.shout")(samples(["a!", "!!"])).total.tolist() == [1.0, 2.0]
    with pytest.raises(ImportError, match=r"has no whisper\. It has: .*shout"):
        FunctionReward("my_own_rewards:whisper")
    for path, near in (
        ("my_own_rewards.shuot", "shout"),
        ("my_own_reward.shout", "my_own_rewards"),
        ("lightning_rlhf.rewards.functionals.length_window", "lightning_rlhf.rewards.functions"),
    ):
        with pytest.raises(ImportError, match=rf"; did you mean {re.escape(near)}\? "):
            FunctionReward(path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):  # its own fault, not the path's
        FunctionReward("my_broken_rewards.f")
