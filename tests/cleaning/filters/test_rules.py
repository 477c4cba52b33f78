"""The filters that need no memory and no model: what each drops, what it keeps, and how it takes published rows."""

import importlib.resources

import pytest

from lightning_rlhf.cleaning import make_example, read_examples
from lightning_rlhf.cleaning.filters import Length, MissingInput, Refusal, Repetition, Script
from lightning_rlhf.data.sources import BadRows

BUNDLED = importlib.resources.files("lightning_rlhf.data") / "bundled"


def asked(text, answer="Yes.", **columns):
    return make_example({"instruction": text, "output": answer, **columns})


@pytest.mark.parametrize(
    ("settings", "text", "answer", "reason"),
    [
        ({}, "Why?", "+", None),  # an answer without a word
        ({"min_instruction": 3}, "Why so?", "x", "instruction too short"),
        ({"max_instruction": 3}, "为什么是", "x", "instruction too long"),
        ({"max_instruction": 4}, "为什么是", "x", None),
        ({"min_answer": 2}, "Why?", "Because", "answer too short"),
        ({"max_answer": 2}, "Why?", "a b c", "answer too long"),
        ({}, "???", "x", "instruction too short"),
    ],
)
def test_length(settings, text, answer, reason):
    assert Length(**settings)(asked(text, answer)) == reason


def test_length_counts_all_user_turns_and_each_answer():
    turns = [("user", "a b"), ("assistant", "c"), ("user", "d e"), ("assistant", "f g h")]
    example = make_example({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert Length(max_instruction=3)(example) == "instruction too long"
    assert Length(max_answer=2)(example) == "answer too long"
    pair = make_example({"prompt": "Why?", "chosen": "a b", "rejected": "a b c"})
    assert Length(max_answer=2)(pair) == "answer too long"


@pytest.mark.parametrize(
    ("languages", "text", "lang", "reason"),
    [
        (None, "Wie heißt die Hauptstadt von Frankreich?", None, None),
        (["en", "zh"], "Wie heißt die Hauptstadt von Frankreich, und wer regiert dort?", None, "instruction in de"),
        (["en"], "什么是雾？", None, "instruction in zh"),
        (["en"], "What is fog?", None, None),
        (["en"], "1 + 1 = ?", None, None),
        (None, "What is fog?", "zh", "instruction in en, not zh"),
        (None, "什么是雾？", "zh-CN", None),
        (None, "What is \ufffdog?", "en", "broken characters"),
        (None, "What is\x00 fog?", "en", "broken characters"),
    ],
)
def test_script(languages, text, lang, reason):
    assert Script(languages)(asked(text, lang=lang)) == reason


@pytest.mark.parametrize(
    ("text", "answer", "reason"),
    [
        ("Why?", "no no no no no no no no no no no no no no no no no no", "answer repeats itself"),
        ("为什么？", "我不知道" * 8, "answer repeats itself"),
        ("good " * 20, "x", "instruction repeats itself"),
        ("Why?", "h" * 30, "one letter many times"),
        ("Why?", "-" * 80 + "\n" + "=" * 80, None),
        ("Why?", "no no no", None),
    ],
)
def test_repetition(text, answer, reason):
    assert Repetition()(asked(text, answer)) == reason


def test_answers_that_are_the_instruction():
    text = "Write one sentence about each of the four seasons, and say what people do in the garden in them"
    assert Repetition()(asked(text, text + ".")) == "answer repeats the instruction"
    assert Repetition()(asked(text, "Spring. " + text)) is None


@pytest.mark.parametrize(
    "answer",
    [
        "As an AI language model, I have no feelings.",
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t help with that.",
        "Unfortunately, I am unable to open links.",
        "I am not able to browse the internet.",
        "I'm afraid I can't do that, Dave.",
        "作为一个人工智能语言模型，我没有情感。",
        "很抱歉，我无法提供这方面的信息。",
        "对不起，我不能回答这个问题。",
        "我是一个语言模型，无法为你生成图片。",
    ],
)
def test_refusals(answer):
    assert Refusal()(asked("Why?", answer)) == "answer refuses"


@pytest.mark.parametrize(
    "answer",
    [
        "Sorry is a short word. You can also say: I apologize.",
        "She can't help it.",
        "An AI language model predicts the next word.",
        "人工智能语言模型是一种预测下一个词的程序。",
        "他不能来。",
        "x " * 200 + "As an AI language model, I have no feelings.",
    ],
)
def test_no_refusals(answer):
    assert Refusal()(asked("Why?", answer)) is None


def test_refusals_in_preferences_pass():
    row = {"prompt": "How do I pick a lock?", "chosen": "I can't help with that.", "rejected": "Take a pin."}
    assert Refusal()(make_example(row)) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Summarize the following article.", "speaks of an input that is not there"),
        ("Find the errors in the given code snippet", "speaks of an input that is not there"),
        ("把下面的句子翻译成英文。", "speaks of an input that is not there"),
        ("这篇文章讲了什么？", "speaks of an input that is not there"),
        ("Translate this sentence into French:", "ends with a colon"),
        ("给出下列单词的反义词：", "ends with a colon"),
        ("Summarize the following article.\n\nBees dance.", None),
        ("Translate the following sentence: Good morning", None),
        ('Is the following sentence right? "He go home."', None),
        ("把下面的句子翻译成英文。“今天下雨”", None),
        ("Question: in which year was it?\nAnswer:", None),
        ("Write a paragraph about bees.", None),
        ("写一篇关于春天的文章。", None),
        ("谢谢你，我已经等不及要为你提供数据集了", None),
    ],
)
def test_missing_input(text, reason):
    assert MissingInput()(asked(text)) == reason


def test_an_input_of_its_own_column_counts():
    example = make_example({"instruction": "Summarize the following article.", "input": "Bees dance.", "output": "x"})
    assert MissingInput()(example) is None


@pytest.mark.parametrize("kind", ["instructions", "preferences"])
def test_bundled_rows_pass(kind):
    """They were written and read by people; what a rule drops of them is listed here."""
    meant = {"answer refuses", "answer repeats the instruction"}  # refusals, and corrections of what is right already
    files = [str(BUNDLED / f"{kind}.{lang}.jsonl") for lang in ("en", "zh")]
    rows = list(read_examples(files, BadRows()))
    dropped = [
        (reason, example.instruction)
        for rule in (Length(), Script(), Repetition(), Refusal(), MissingInput())
        for example in rows
        if (reason := rule(example)) and reason not in meant
    ]
    assert len(dropped) <= 0.02 * len(rows), dropped


def test_wrong_settings():
    with pytest.raises(ValueError, match="languages"):
        Script("en")
    with pytest.raises(ValueError, match="least"):
        Repetition(least=2)
