"""The verifier of mathematical answers: what is equal, and that no completion makes it hang."""

import random

import pytest

from lightning_rlhf.rewards import FunctionReward
from lightning_rlhf.rewards.verifiers import math

EQUAL = [
    (r"It is \boxed{\frac{1}{2}}.", "0.5", 1.0),
    (r"so $x = \frac12$", r"\frac{1}{2}", 1.0),
    (r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
    (r"\boxed{[0, 1)}", r"0 \le x < 1", 1.0),
    ("#### 1,000", 1000, 1.0),
    (r"\boxed{红楼梦}", "红楼梦", 1.0),  # math-verify alone says no
    ("答案：红楼梦", "红楼梦", 1.0),
    (r"\boxed{红楼}", "红楼梦", 0.0),
    (r"\boxed{4} or \boxed{5}", "4", 0.0),
    (r"\boxed{0.6}", "0.5", 0.0),
    ("", "3", 0.0),
    ("no answer", "3", 0.0),
    (r"\boxed{", "3", 0.0),
    ("anything", None, None),
]


def test_what_is_equal():
    texts, answers, wanted = zip(*EQUAL, strict=True)
    assert math([""] * len(texts), texts, answers, timeout=20.0) == list(wanted)


def test_what_was_read_is_named_once():
    assert math.explain("It is 4.", "#### 5") == "'4'; wanted '5'"


def test_what_hangs_ends_in_the_deadline_and_is_counted():
    texts = [r"\boxed{9^{9^{9}}}", r"\boxed{999999999999!}", r"\boxed{3}"]
    with pytest.warns(UserWarning, match="math: a completion could not be judged, as it took too long; it scores -1"):
        found = math([""] * 3, texts, ["1", "1", "3"], timeout=1.0, failed_score=-1.0)
    assert found == [{"score": -1.0, "timeout": 1.0}] * 2 + [1.0]


def test_settings_and_answers_are_checked():
    for options, message in [
        ({"timeout": 0}, "math: the option timeout is 0: give a number of seconds above 0"),
        ({"timeout": [5.0]}, "math: the data have a column timeout: rename it, or give a number of seconds"),
        ({"failed_score": "none"}, "give a finite number, or null"),
    ]:
        with pytest.raises(ValueError, match=message):
            math([""], ["1"], ["1"], **options)
    with pytest.raises(ValueError, match=r"math: the column answer has ' ': it is empty\. Give an answer"):
        math([""], ["1"], [" "])


PIECES = [r"\frac{", r"\boxed{", "}", "{", "$", "^", "_", r"\sqrt{", "9^{9^{9}}", "1e999999", "10^{10^{10}}", "(", ")",
          "红楼梦", "答案：", "三分之一", "１２", r"\int_0^1 x dx", r"\sum_{n=1}^{\infty}", "!", "=", "x", "7", ",",
          r"\text{", r"\begin{pmatrix} 1 & 2", r"\end{pmatrix}", "\n", "\x00", "\ud800", "😀", r"\infty", "0/0", "%",
          r"\left(", "__import__('os')", "****", "#### ", "Answer: ", "-" * 40]  # fmt: skip


def fuzzed(seed):
    pick = random.Random(seed)
    text = "".join(pick.choice(PIECES) for _ in range(pick.randint(1, 25)))
    if seed % 10 == 0:
        text = r"\frac{" * pick.randint(10, 400) + text
    if seed % 10 == 1:
        text = "(" * pick.randint(10, 2000) + text
    return rf"\boxed{{{text}}}" if seed % 2 else text


@pytest.mark.filterwarnings("ignore:math. a completion could not be judged")
def test_fuzzed_completions_are_scored_or_counted():
    texts = [fuzzed(seed) for seed in range(100)]
    answers = [random.Random(seed).choice(["7", r"\frac{1}{2}", "红楼梦", r"\{1, 2\}"]) for seed in range(100)]
    found = math([""] * 100, texts, answers, timeout=0.3)
    for score in found:
        assert score in (0.0, 1.0) or (score["score"] == 0.0 and {*score} <= {"score", "timeout", "error"})
    assert sum(isinstance(score, float) for score in found) >= 50
    assert FunctionReward(math).needs == {"answer"}
