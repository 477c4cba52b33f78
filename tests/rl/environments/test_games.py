"""The environments that come with the package."""

import math
import re
from fractions import Fraction

import pytest

from lightning_rlhf.rl.environments import Calculator, GuessNumber
from lightning_rlhf.rl.environments.calculator import evaluate, last_number, show_number

ASK = {"messages": [{"role": "user", "content": "What is 12 times 7?"}]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12 * 7", 84),
        ("I compute (3 + 4) x 5.", 35),
        ("1,000 ÷ 8 =", 125),
        ("In 2020, 3 + -4", -1),
        ("3 * 4 = 13\n5 * 5", 12),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("-2 - 3", -5),
        ("12345678901234567890.5 + 0.25", Fraction(49382715604938271563, 4)),
        ("12345678901234567890.0 * 10", 123456789012345678900),
    ],
)
def test_expressions_have_exact_values(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("eighty-four", "no expression, such as"),
        ("84", "no expression, such as"),
        ("3 / 0", "division by zero"),
        ("3 + + * 4", "no expression"),
        ("9 ** 9 ** 9", "no expression"),
        ("1+" * 200 + "1", "too long"),
        ("1 + " + "9" * 5000, "too long"),
        ("(" * 150 + "1 + 1", "no expression"),
    ],
)
def test_what_is_no_expression_says_why(text, why):
    with pytest.raises(ValueError, match=why):
        evaluate(text)


def test_numbers_are_read_and_written_as_people_do():
    assert last_number("from 1,200 to 35.5.") == Fraction("35.5") and last_number("none") is None
    assert last_number("1" * 5000) is None  # a policy that repeats a digit, which must not end the run
    assert [show_number(Fraction(*x)) for x in ((84, 1), (1, 3), (5, 2))] == ["84", "0.3333", "2.5"]
    large, small = Fraction(10**20 + 1, 2), Fraction(-1, 10**6)
    assert [show_number(x) for x in (large, -large, small)] == [
        "50000000000000000000.5", "-50000000000000000000.5", "0",
    ]  # fmt: skip


def test_a_calculation_takes_two_turns():
    calculator = Calculator(tool_reward=0.2)
    opening = calculator.reset({**ASK, "answer": 84}, 0)
    assert opening[-1] == ASK["messages"][0] and opening[0]["role"] == "system"
    turn = calculator.step(opening, "12 * 7")
    assert (turn.messages[0]["content"], turn.reward, turn.done) == ("84", 0.2, False)
    assert calculator.step(opening, "It is 84.") == ((), 1.0, True)
    calculator.reset({**ASK, "answer": "84"}, 0)
    turn = calculator.step(opening, "Well")
    assert turn.reward == 0 and turn.messages[0]["content"].startswith("Error: there is no expression")
    assert calculator.step(opening, "83").reward == 0
    assert Calculator(shown=False).reset({**ASK, "answer": 84}, 0) == ASK["messages"]
    with pytest.raises(ValueError, match="the column 'answer' is None"):
        calculator.reset(ASK, 0)


@pytest.mark.parametrize(
    ("given", "value"),
    [(10**25 + 1, 10**25 + 1), (1e20, 10**20), (0.1, Fraction(1, 10)), ("1,000 eggs", 1000), (-3, -3)],
)
def test_the_answer_of_a_row_is_read_exactly(given, value):
    calculator = Calculator(shown=False)
    calculator.reset({**ASK, "answer": given}, 0)
    assert calculator.answer == value


@pytest.mark.parametrize("given", [None, True, math.nan, math.inf, "none", [1]])
def test_an_answer_that_is_no_number_is_named(given):
    with pytest.raises(ValueError, match=re.escape(f"the column 'answer' is {given!r}. Give the number that is right")):
        Calculator().reset({**ASK, "answer": given}, 0)


@pytest.mark.parametrize("value", [math.inf, math.nan, "1", True])
def test_the_reward_of_the_tool_is_a_finite_number(value):
    with pytest.raises(ValueError, match=rf"tool_reward must be a number, got {value!r}"):
        Calculator(tool_reward=value)


@pytest.mark.parametrize("high", [0, 1, -3, 2.5, math.nan, math.inf, "ten", True, [3], 10**19])
def test_a_number_that_can_not_be_drawn_is_named(high):
    with pytest.raises(ValueError, match=re.escape(f"the column 'high' is {high!r}. Give a whole number, at least 2")):
        GuessNumber().reset({**ASK, "high": high}, 0)
    with pytest.raises(ValueError, match="high must be "):
        GuessNumber(high=high)


@pytest.mark.parametrize(("high", "largest"), [(None, 10), (7, 7), (7.0, 7), ("7", 7)])
def test_the_largest_number_of_a_row_may_come_from_a_table(high, largest):
    game = GuessNumber()
    game.reset({**ASK, "high": high}, 0)
    assert game.largest == largest


def test_all_digits_of_a_guess_count():
    """The first of them may be the number."""
    game = GuessNumber(high=10**9, max_turns=3)
    game.reset(ASK, 0)
    for more in ("0", "0" * 5000):
        turn = game.step([], f"{game.number:09d}{more}")
        assert not turn.done and turn.reward == 0 and "lower than" in turn.messages[0]["content"]
    assert game.step([], str(game.number)).reward == pytest.approx(1 / 3)


def test_a_number_is_drawn_by_the_seed_and_found_by_halving():
    game = GuessNumber(high=100, max_turns=7)
    numbers = []
    for seed in range(20):
        low, high, opening = 1, 100, game.reset(ASK, seed)
        assert "from 1 to 100" in opening[-1]["content"]
        numbers.append(game.number)
        for _ in range(7):
            guess = (low + high) // 2
            turn = game.step(opening, f"I guess {guess}!")
            if turn.done:
                break
            low, high = (guess + 1, high) if "higher" in turn.messages[0]["content"] else (low, guess - 1)
        assert turn.reward == pytest.approx(1 - (game.guesses - 1) / 7) and turn.done
    game.reset(ASK, 3)
    assert game.number == numbers[3] and len(set(numbers)) > 10
    game.reset({**ASK, "high": 2}, 0)
    assert game.number <= 2 and "Write a number from 1 to 2" in game.step([], "hm").messages[0]["content"]
    turns = [game.step([], "99999") for _ in range(6)]
    assert turns[-1].done and turns[-1].reward == 0
