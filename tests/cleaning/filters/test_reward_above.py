"""Rewards as filters: functions and reward models."""

import math

import pytest
from reward_models import save_reward_adapter

from lightning_rlhf.cleaning import clean, make_example
from lightning_rlhf.cleaning.filters import NearDuplicate, PersonalData, RewardAbove

ROWS = [
    {"instruction": "Why?", "output": "x" * 9},
    {"instruction": "Why?", "output": "x"},
    {"prompt": "Why?", "chosen": "x" * 8, "rejected": "y"},
    {"prompt": "Why?", "completion": "nan"},
    {"question": "Why?"},
]


def length(prompts, completions, **columns):
    return [math.nan if text == "nan" else float(len(text)) for text in completions]


def test_a_function():
    look = RewardAbove(length, least=5)
    rows = [make_example(row, str(i)) for i, row in enumerate(ROWS)]
    assert [example.where for example in clean(rows, [look])] == ["0", "2", "4"]
    assert rows[0].notes == {"reward": 9.0} and rows[4].notes == {}
    assert look(rows[3]) == "score not finite"
    assert look(rows[1]) == "score too low"


def test_a_score_is_never_that_of_an_example_before():
    look = RewardAbove(length, least=5)
    for size in [9, 1] * 20:
        example = make_example({"instruction": "Why?", "output": "x" * size})
        assert look(example) == (None if size == 9 else "score too low")
        del example  # the next gets its id


def test_an_answer_that_another_filter_changed_is_scored_as_it_is():
    rows = [{"prompt": f"{i}?", "completion": f"{i} ann.lee@mail.cn"} for i in range(3)]
    look = RewardAbove(length, least=0)
    kept = list(clean(map(make_example, rows), [NearDuplicate(), PersonalData(), look]))
    assert [example.notes["reward"] for example in kept] == [len("0 [EMAIL]")] * 3


def test_a_function_gets_the_columns_that_it_asks_for():
    def score(prompts, completions, wanted):
        return [float(text == want) for text, want in zip(completions, wanted, strict=True)]

    row = {"instruction": "Why?", "output": "So.", "wanted": "So."}
    assert RewardAbove(score, least=1)(make_example(row)) is None
    assert RewardAbove(score, least=1)(make_example({**row, "wanted": "No."})) == "score too low"


def test_a_reward_model(tiny_model_dir, tiny_tokenizer, tmp_path):
    folder = str(save_reward_adapter(tiny_model_dir, tiny_tokenizer, tmp_path)[False])
    rows = [make_example({"instruction": f"Why {i}?", "output": f"So {i}."}) for i in range(4)]
    look = RewardAbove(folder, least=-1e9)
    assert len(list(clean(rows, [look]))) == 4
    scores = [row.notes["reward"] for row in rows]
    assert len(set(scores)) == 4
    middle = sorted(scores)[2]
    assert len(list(clean(rows, [RewardAbove([{"source": folder}], least=middle)]))) == 2


def test_a_limit_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="RewardAbove: least is nan"):
        RewardAbove(length, least=math.nan)
