"""Tokens, scripts and languages, on texts as people write them."""

import json

import pytest

from lightning_rlhf.cleaning.text import language_of, request, scripts, tokens


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't stop, 24/7!", ["don", "t", "stop", "24", "7"]),
        ("ＡＢＣ１２３　ｘ", ["abc123", "x"]),
        ("用Python写个函数", ["用", "python", "写", "个", "函", "数"]),
        ("カタカナと漢字", list("カタカナと漢字")),
        ("snake_case", ["snake", "case"]),
        ("ﬁne ①", ["fine", "1"]),
        ("𠮷野家", ["𠮷", "野", "家"]),
        ("...！？", []),
        ("", []),
    ],
)
def test_tokens_are_words_and_single_han_characters(text, found):
    assert tokens(text) == found


def test_case_width_white_space_and_punctuation_make_no_difference():
    assert tokens("Hello,  WORLD! 你好，世界。") == tokens("ｈｅｌｌｏ world 你 好 世 界")


def test_scripts_are_counted_by_letters():
    assert scripts("Hello, 你好 こん 안녕 Привет 123") == {"han": 2, "kana": 2, "hangul": 2, "latin": 5, "cyrillic": 6}
    assert scripts("12 + 30 = ?") == {}
    assert scripts("สวัสดี") == {"other": 4}  # vowel signs are no letters


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is a volcano?", "en"),
        ("hello!", "en"),
        ("Translate 你好 into English.", "en"),
        ("把“good morning, how are you today”翻译成中文", "zh"),
        ("WLAN 是什么", "zh"),
        ("请用 Python 写一个函数 def bubble_sort(numbers): return sorted(numbers)", "zh"),
        ("東京の天気はどうですか。", "ja"),
        ("서울은 어디에 있습니까?", "ko"),
        ("Wie heißt die Hauptstadt von Frankreich, und wie viele Menschen leben dort?", "de"),
        ("¿Cuál es la capital de Francia y cuánta gente vive allí?", "es"),
        ("Какая столица Франции и сколько людей там живёт?", "ru"),
        ("3 * 4 = ?", ""),
        ("", ""),
    ],
)
def test_language(text, language):
    assert language_of(text) == language


def test_what_is_asked_decides_rather_than_what_is_quoted():
    asked = 'What does "Il vaut mieux prévenir que guérir" mean in English?'
    assert language_of(request(asked)) == "en"
    assert request("Summarize this article:\n\nEs war einmal") == "Summarize this article"
    assert request("它是什么：hello world") == "它是什么"
    assert request("Fix: a b c") == "Fix: a b c"  # one word says too little
    assert request("It's Ann's and Bob's idea") == "It's Ann's and Bob's idea"


def published(folder):
    """The 980 published instructions with their languages."""
    for name, lang in (("self_instruct_seed_tasks", "en"), ("belle_zh_seed_tasks", "zh")):
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["instruction"], lang
    for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        yield row["prompt"], row["lang"]


@pytest.mark.parametrize("read", [language_of, lambda text: language_of(request(text))], ids=["text", "request"])
def test_language_of_published_instructions(assets, read):
    rows = list(published(assets / "data"))
    assert len(rows) == 980
    wrong = [(text, lang) for text, lang in rows if read(text) != lang]
    assert len(wrong) <= 0.01 * len(rows), wrong
