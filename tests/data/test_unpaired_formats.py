"""Formats of single answers: labels, ratings, preferences taken apart, and what is refused."""

import math

import pytest

from lightning_rlhf.data.formats import Format, FormatError
from lightning_rlhf.data.unpaired_formats import UNPAIRED_FORMATS, to_unpaired

U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
BACK = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "r"}]


def texts(found):
    return [[turn["content"] for turn in answer] for answer in found.answers]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": True},
        {"prompt": "q", "response": "a", "label": "True"},  # as CSV has it
        {"prompt": [U], "completion": [A], "label": True},
        {"prompt": [U], "completion": A, "label": True, "kto_tag": True},
        {"prompt": "q", "completion": [U, A], "kto_tag": True},
        {"prompt": "q", "completion": "a", "label": None, "kto_tag": "true"},
        {"messages": [U, A], "label": True},
        {"messages": [{"from": "human", "content": "q"}, {"from": "assistant", "content": "a"}], "kto_tag": True},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "kto_tag": True},
        {"instruction": "q", "input": "", "output": "a", "kto_tag": True},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": "a", "label": True},
        {"prompt": "q", "completion": "a", "rating": 4},
        {"prompt": "q", "completion": "a", "score": "3.5"},
    ],
    ids=str,
)
def test_every_spelling_gives_the_same(row):
    found = to_unpaired(row, threshold=3.5)
    assert ([m["content"] for m in found.prompt], texts(found), found.labels) == (["q"], [["a"]], (True,))
    assert found.unread == ()
    other = {"True": "false", "true": "FALSE", "4": 3, "3.5": -1}
    bad = {k: other.get(str(v), v) for k, v in row.items()}
    assert to_unpaired(bad, threshold=3.5).labels == (False,)


def test_columns_beside_the_answer():
    row = {
        "prompt": [U, *BACK],
        "completion": "a",
        "label": False,
        "system": "s",
        "lang": "en",
        "source": "hh",
        "id": 3,
    }
    found = to_unpaired({**row, "rating": 5.0})
    assert [m["content"] for m in found.prompt] == ["s", "q", "b", "r"] and found.first_user_turn == "q"
    assert (found.source, found.lang, found.labels) == ("hh", "en", (False,))
    assert found.unread == ("id", "rating")  # the label says it


@pytest.mark.parametrize(
    ("row", "threshold", "labels"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, None, (True, False)),
        ({"chosen": [U, A], "rejected": [U, BACK[0]]}, None, (True, False)),
        ({"prompt": "q", "ranked": ["a", "b", "c"]}, None, (True, None, False)),
        ({"prompt": "q", "ranked": ["a", "b", "c", "d"]}, None, (True, True, False, False)),
        ({"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 7, 7]}, None, (True, True, False)),
        ({"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 7, 9]}, 8, (True, False, False)),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 9, "rejected_score": 8}, 8, (True, True)),
        ({"prompt": "q", "ranked": ["a", "b"]}, 8, (True, False)),
    ],
)
def test_preferences_are_taken_apart(row, threshold, labels):
    found = to_unpaired(row, threshold=threshold, take_apart=True)
    assert found.labels == labels and len(found.answers) == len(labels)
    parts = list(found.apart())
    assert [part.labels for part in parts] == [(label,) for label in labels]
    assert [part.answers for part in parts] == [(answer,) for answer in found.answers]


def test_what_is_not_read_is_counted_once():
    found = to_unpaired({"prompt": "q", "chosen": "a", "rejected": "b", "id": 3}, take_apart=True)
    assert [part.unread for part in found.apart()] == [("id",), ()]


GOOD = {"prompt": "q", "completion": "a", "label": True}


@pytest.mark.parametrize(
    ("kind", "words", "row"),
    [
        ("label", "the column 'label' is 1. Make it true or false", {**GOOD, "label": 1}),
        ("label", "the column 'label' is 'good'", {**GOOD, "label": "good"}),
        ("label", "the column 'kto_tag' is nan", {**GOOD, "kto_tag": math.nan}),
        ("two labels", "'label' and 'kto_tag' differ", {**GOOD, "kto_tag": False}),
        ("no label", "'label' is empty. Make it true or false", {"prompt": "q", "completion": "a", "label": None}),
        ("no threshold", "'rating' is a number, and nothing says", {"prompt": "q", "completion": "a", "rating": 4}),
        ("empty turn", r"with the answer, turn 2 \(assistant\) is empty", {**GOOD, "completion": " "}),
        ("no user turn", "doesn't follow a user", {"prompt": [U, BACK[0]], "completion": [U, A], "label": True}),
        ("unknown format", "no known format of single answers", {"prompt": "q", "completion": "a"}),
        ("pairs", "DPOModule and Reward.*take_apart", {"chosen": [U, A], "rejected": [U, *BACK[:1]]}),
        ("pairs", "PreferenceDataModule", {"prompt": "q", "ranked": ["a", "b"]}),
        ("weight", "last turn of 'messages' has the weight 0", {"messages": [U, {**A, "weight": 0}], "label": True}),
        ("'image'", "the row has 'image'", {**GOOD, "image": "x.png"}),
    ],
)  # fmt: skip
def test_bad_rows_say_what_to_do(kind, words, row):
    with pytest.raises(FormatError, match=words) as error:
        to_unpaired(row)
    assert error.value.kind == kind and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, "nan", "high", True, None, [1]])
def test_a_rating_is_a_finite_number(value):
    with pytest.raises(FormatError, match=r"rating|no known format"):
        to_unpaired({"prompt": "q", "completion": "a", "rating": value}, threshold=1.0)


def test_named_formats():
    assert to_unpaired(GOOD, "unpaired").labels == (True,)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert to_unpaired(pair, "pair", take_apart=True).labels == (True, False)
    with pytest.raises(FormatError, match="PreferenceDataModule"):
        to_unpaired(pair, "pair")
    with pytest.raises(FormatError, match="needs the column 'messages', 'label' or 'kto_tag' or 'rating' or 'score'"):
        to_unpaired({"prompt": "q"}, "messages")
    with pytest.raises(ValueError, match="The format of single answers 'unpared' is not known"):
        to_unpaired(GOOD, "unpared")
    assert set(UNPAIRED_FORMATS) == {"unpaired", "messages", "sharegpt", "alpaca"}


plain = Format("plain", ("q", "a"), lambda row: (({**U, "content": row["q"]},), ({**A, "content": row["a"]},)))


def test_a_format_of_ones_own():
    path = f"{__name__}.plain"
    assert to_unpaired({"q": "q", "a": "a", "label": False}, path).labels == (False,)
    with pytest.raises(FormatError, match="the row has no label"):
        to_unpaired({"q": "q", "a": "a"}, path)


def test_rows_to_predict_need_no_labels():
    for row in (
        {"prompt": "q", "completion": "a"},
        {"messages": [U, A]},
        {**GOOD, "label": 3},
        {**GOOD, "label": False},
    ):
        assert to_unpaired(row, labeled=False).labels == (None,)
    assert to_unpaired({"prompt": "q", "chosen": "a", "rejected": "b"}, labeled=False).labels == (None, None)
    with pytest.raises(FormatError, match="plain text without an answer"):
        to_unpaired({"text": "a"}, labeled=False)
