"""The functions that come with the package."""

import re

import pytest

from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.rewards import FunctionReward, Samples
from lightning_rlhf.rewards.functions import answer_match


def samples(completions, **columns):
    batch = pack([Tree([5], [Branch([7]) for _ in completions])])
    size = len(completions)
    return Samples(batch, ["q"] * size, list(completions), [False] * size, columns)


def test_by_import_path_with_columns():
    reward = FunctionReward("lightning_rlhf.rewards.verifiers.length")
    assert reward(samples(["a" * 8, "b" * 8], low=[4, 16], high=[8, 20], answer=[1, 2])).total.tolist() == [1.0, 0.5]
    reward = FunctionReward("lightning_rlhf.rewards.functions:answer_match")
    assert reward(samples(["Answer: 72", "71"], answer=["so many\n#### 72", 72])).total.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "text",
    ["#### x" + " " * 50_000 + "x", r"\boxed{" * 20_000, r"\boxed{" * 9000 + "}" * 9000, r"\boxed{1}" * 9000,
     r"\boxed{1} or" + " " * 50_000 + r"x \boxed{2}", "#### 1 or\n" * 9000, "#### " + "or " * 50_000],
    ids=lambda text: text[:12],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_no_text_makes_it_hang(text):
    """Blanks behind a mark took time in their cube: minutes for these."""
    assert answer_match([""], [text], ["7"]) == [0.0]


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
        ("lightning_rlhf.rewards.functionals.length", "lightning_rlhf.rewards.functions"),
    ):
        with pytest.raises(ImportError, match=rf"; did you mean {re.escape(near)}\? "):
            FunctionReward(path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):  # its own fault, not the path's
        FunctionReward("my_broken_rewards.f")
