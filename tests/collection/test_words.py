"""Verbs and nouns of instructions."""

import pytest

from lightning_rlhf.collection.words import verb_and_noun, verbs_and_nouns


@pytest.mark.parametrize(
    ("text", "lang", "verb", "noun"),
    [
        ("Write a story about a cat.", "en", "write", "story"),
        ("Could you please explain how rust forms?", "en", "explain", "how"),
        ("What is the capital of France?", "en", "what", "capital"),
        ("!!!", "en", "", ""),
        ("把这句话翻译成英文：今天很冷。", "zh", "翻译", "英文"),
        ("为什么天空是蓝色的？", "zh", "为什么", "天空"),
        ("用一句话概括：社区图书室开放了。", "zh", "概括", "社区"),
        ("你好", "zh", "", ""),
    ],
)
def test_verb_and_noun(text, lang, verb, noun):
    assert verb_and_noun(text, lang) == (verb, noun)


def test_the_commonest_come_first():
    texts = ["Write a poem.", "Write a story.", "Write a poem.", "Name a river.", "Explain."]
    assert verbs_and_nouns(texts, "en", most=2) == [
        ("write", 3, [("poem", 2), ("story", 1)]),
        ("explain", 1, []),
    ]
