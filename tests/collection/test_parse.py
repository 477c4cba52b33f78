"""Lists of tasks as models write them, and as they break them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.collection.parse import Piece, parse_list, parse_one, same


def items(reply: str, **options) -> list[str]:
    return [piece.text for piece in parse_list(reply, **options) if piece.problem is None]


def problems(reply: str, **options) -> list[str | None]:
    return [piece.problem for piece in parse_list(reply, **options) if piece.problem]


@pytest.mark.parametrize(
    "reply",
    [
        "9. Name a river.\n10. Name a lake.",
        "9) Name a river.\n10) Name a lake.",
        "(9) Name a river.\n(10) Name a lake.",
        "９．Name a river.\n１０．Name a lake.",
        "9、Name a river.\n10、Name a lake.",
        "⑨ Name a river.\n⑩ Name a lake.",
        "九、Name a river.\n十、Name a lake.",
        "**9.** Name a river.\n**10.** Name a lake.",
        "### Task 9: Name a river.\n### Task 10: Name a lake.",
        '9. **Name a river.**\n10. "Name a lake."',
        "10. Name a river.\n9. Name a lake.",  # out of order
        "1. Name a river.\n1. Name a lake.",  # all the same
        "9. Name a river. 10. Name a lake.",  # on one line
        "- Name a river.\n- Name a lake.",  # no numbers
        "  9.   Name a river.  \n\n\n 10.\tName a lake.\n\n",
        "9. Task: Name a river.\n10. Instruction: Name a lake.",
        "9.\nName a river.\n10.\nName a lake.",
    ],
)
def test_items_of_a_list_however_it_is_numbered(reply):
    assert items(reply) == ["Name a river.", "Name a lake."]
    assert problems(reply) == []


def test_chinese_items_on_one_line_and_with_their_own_lines():
    assert items("1.写一首诗。2.介绍长城。") == ["写一首诗。", "介绍长城。"]
    assert items("任务1：翻译成英文：\n今天很冷。\n任务2：介绍长城。") == ["翻译成英文：\n今天很冷。", "介绍长城。"]


def test_a_reply_that_goes_on_where_the_prompt_stopped():
    assert items(" Name a river.\n10. Name a lake.", first=9) == ["Name a river.", "Name a lake."]
    assert items(" Name a river. 10. Name a lake.", first=9) == ["Name a river.", "Name a lake."]
    assert items("9. Name a river.\n10. Name a lake.", first=9) == ["Name a river.", "Name a lake."]
    assert items(" Name a river.", first=9) == ["Name a river."]


def test_numbers_within_a_task_begin_no_item():
    reply = "1. Round 3.14 and 2. 5 to whole numbers.\n2. Add 1. and 7."
    assert items(reply) == ["Round 3.14 and 2. 5 to whole numbers.", "Add 1. and 7."]


@pytest.mark.parametrize(
    ("reply", "options", "kinds"),
    [
        ("", {}, ["empty"]),
        (" \n\t\n", {}, ["empty"]),
        ("The capital of France is Paris.", {}, ["no list"]),
        ("Sure! Here are some tasks:\n1. Name a river.", {}, ["text before the list"]),
        ("1. Name a river.\n\nI hope this helps!", {}, ["text after the list"]),
        ("1. Name a river.\n2. Write about the la", {"cut": True}, ["cut"]),
        ("1. Name a river.\n2.", {}, ["empty item"]),
        ("1. Name a river.\n2. ...", {}, ["empty item"]),
        ("1. Name a river.<|im_end|>\n2. Name a lake.", {}, ["template tokens"]),
        (
            "1. I'm sorry, but I can't help with that.\n2. 抱歉，我无法提供。\n3. Sure! Here it is.",
            {},
            ["an answer"] * 3,
        ),
        ("1. Name a river.\n2. [INST] Name a lake. [/INST]", {}, ["template tokens"]),
        ("1. Name a river.\nAnswer: the Rhine\n2. Name a lake.", {}, ["holds an answer"]),
        ("1. 说出一条河。\n答案：长江\n2. 说出一个湖。", {}, ["holds an answer"]),
        ("1. name a RIVER\n2. Name a lake.", {"examples": ["Name a river."]}, ["repeats an example"]),
        ("1. Name a lake.\n2. Name a lake!", {}, ["repeats itself"]),
    ],
)
def test_what_is_no_task_is_counted_by_kind(reply, options, kinds):
    assert problems(reply, **options) == kinds


def test_one_task():
    assert parse_one('"Name a river."\n') == [Piece('"Name a river."\n', "Name a river.")]
    assert parse_one("New task: Name a river.")[0].text == "Name a river."
    assert parse_one("Sure! Here is a new task:\n\nName a river.")[0].text == "Name a river."
    assert parse_one("下面是改编后的新任务：\n说出一条河。")[0].text == "说出一条河。"
    quoting = "Here is a text:\nThe river rises.\nSum it up."
    assert parse_one(quoting)[0].text == quoting
    assert parse_one("Name a ri", cut=True)[0].problem == "cut"
    assert parse_one("1. Name a river.\n2. Name a lake.")[0].problem == "a list"
    assert parse_one("Name a river", shown=["Name a river."])[0].problem == "repeats an example"
    assert parse_one("")[0].problem == "empty"
    assert parse_one("Name a river.\nAnswer: the Rhine")[0].problem == "holds an answer"


_broken = st.lists(
    st.one_of(
        st.text(max_size=30),
        st.sampled_from(
            [
                "\n",
                "\n\n",
                " ",
                "1.",
                "2) ",
                "10. ",
                "３、",
                "⑳",
                "十一、",
                "- ",
                "**4.** ",
                "## Task 5: ",
                "Answer: x",
                "<|im_end|>",
            ]
        ),
        st.sampled_from(["Name a river.", "写一首诗。", "3.14", "[/INST]", '"', "“”"]),
    ),
    max_size=20,
).map("".join)


@settings(max_examples=500, deadline=None)
@given(_broken, st.sampled_from([None, 1, 9]), st.booleans(), st.lists(st.text(max_size=10), max_size=3))
def test_every_character_of_a_reply_is_in_one_piece(reply, first, cut, examples):
    pieces = parse_list(reply, first, cut, examples)
    assert "".join(piece.source for piece in pieces) == reply
    shown = {same(example) for example in examples}
    for piece in pieces:
        assert bool(piece.text) == (piece.problem is None)
        assert piece.text == piece.text.strip() and piece.text in piece.source
        assert not piece.text or (same(piece.text) and same(piece.text) not in shown)
        assert "<|im_end|>" not in piece.text
    texts = [same(piece.text) for piece in pieces if piece.text]
    assert len(texts) == len({*texts})
    assert not (cut and pieces[-1].text)


@settings(max_examples=300, deadline=None)
@given(_broken, st.booleans())
def test_a_single_reply_is_one_piece(reply, cut):
    [piece] = parse_one(reply, cut)
    assert piece.source == reply and bool(piece.text) == (piece.problem is None)


@given(st.lists(st.text("abc xyz", min_size=1).filter(str.strip), min_size=1, max_size=9, unique_by=same))
def test_a_clean_list_comes_back(tasks):
    reply = "\n".join(f"{number}. {task}" for number, task in enumerate(tasks, 9))
    assert items(reply) == [task.strip() for task in tasks]
