"""What instructions begin with: verbs and what they are about, without a tagger."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from lightning_rlhf.cleaning.text import tokens

_LEADING = {"please", "can", "could", "would", "will", "you", "kindly", "i", "need", "want", "to", "help", "me", "let"}
_SMALL = {
    *(
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "my",
        "your",
        "our",
        "his",
        "her",
        "their",
        "its",
        "me",
        "us",
    ),
    *(
        "of",
        "for",
        "to",
        "in",
        "on",
        "at",
        "by",
        "with",
        "from",
        "about",
        "as",
        "into",
        "is",
        "are",
        "was",
        "were",
        "do",
    ),
    *(
        "does",
        "did",
        "can",
        "it",
        "and",
        "or",
        "some",
        "one",
        "two",
        "three",
        "any",
        "each",
        "all",
        "following",
        "short",
    ),
    *("brief", "new", "simple", "you", "i", "we", "there", "be", "would", "should", "if", "s", "many", "much"),
}
_VERBS_ZH = (
    "改写|改成|改为|翻译|译成|概括|总结|归纳|解释|说明|介绍|列出|列举|判断|计算|算一算|提取|找出|分类|归类|比较|设计|制定|推荐|"
    "描述|分析|编写|撰写|回答|修改|润色|生成|整理|安排|规划|推理|证明|续写|创作|写|算|译|为什么|如何|怎么|怎样|什么|多少|哪|谁|几"
)
_VERB_ZH = re.compile(_VERBS_ZH)
_BEFORE_NOUN = re.compile(
    r"(?:[一两几三四五六七八九十这那下以上面列]|首|篇|段|个|份|封|句|条|种|则|张|套|关于|给|为|把|将|出|到|成|的|地|得|了|吗|是|在|我|你|[^\w])+"
)
_HAN = re.compile("[\u4e00-\u9fff]{2}")


def verb_and_noun(text: str, lang: str) -> tuple[str, str]:
    """The verb or question word that an instruction begins with, and the first word after it that carries meaning.

    English: the first word that is no polite opening, and the first after it that is no function word. Chinese: the
    first of a list of verbs and question words, and two characters after it. Both may be empty.

    Example:
        >>> verb_and_noun("Please write a short poem about rain.", "en")
        ('write', 'poem')
        >>> verb_and_noun("请写一首关于雨的诗。", "zh")
        ('写', '雨的')
    """
    if lang == "zh":
        found = _VERB_ZH.search(text)
        if found is None:
            return "", ""
        start = found.end()
        skipped = _BEFORE_NOUN.match(text, start)
        noun = _HAN.match(text, skipped.end() if skipped else start)
        return found[0], noun[0] if noun else ""
    words = tokens(text)
    while words and words[0] in _LEADING:
        words.pop(0)
    return (words[0] if words else ""), next((word for word in words[1:] if word not in _SMALL), "")


def verbs_and_nouns(
    texts: Iterable[str], lang: str, most: int = 15, nouns: int = 4
) -> list[tuple[str, int, list[tuple[str, int]]]]:
    """The commonest verbs of instructions, each with its count and its commonest nouns.

    Args:
        texts: Instructions.
        lang: Their language.
        most: Number of verbs.
        nouns: Number of nouns per verb.
    """
    found: dict[str, Counter[str]] = {}
    for text in texts:
        verb, noun = verb_and_noun(text, lang)
        if verb:
            found.setdefault(verb, Counter())[noun] += 1
    order = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))[:most]
    return [
        (verb, counts.total(), [(noun, n) for noun, n in _ordered(counts) if noun][:nouns]) for verb, counts in order
    ]


def _ordered(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
