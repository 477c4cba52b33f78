"""Drops instructions about an input that is not there."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter

_THING = (
    r"(?:text|sentences?|paragraphs?|passages?|articles?|e-?mails?|statements?|words?|reviews?|code|snippet|program|"
    r"function|data|table|list|poem|story|essay|document|conversation|dialogue?|information|facts|input|quotes?|"
    r"numbers?|equations?|phrases?|options|tweets?|context|image|picture|photo|chart|graph|excerpt|book review)"
)
_REFERS = re.compile(
    "|".join(
        (
            rf"\b(?:following|given|provided|below|attached) (?:\w+ ){{0,2}}?{_THING}\b",
            rf"\b(?:the|this|these) {_THING} (?:below|attached|provided|given here)\b",
            r"(?:以下|下面|下列|给定|所给|给出的|提供的)(?:的|这|中的|所给的|给定的)?(?:一?[个段篇句首组些份张条则])?(?:\w{0,4}?)"
            r"(?:文章|文本|段落|句子|短文|内容|文字|材料|诗|代码|邮件|数据|表格|列表|词语|单词|词|对话|新闻|评论|信息|图片|图像|数字|故事)",
            r"(?:这段|这篇|这句|此段|该段)(?:文章|文本|段落|话|文字|代码|对话|新闻)",
        )
    ),
    re.IGNORECASE,
)
#: What may be the input: something in quotes, behind a colon, or in a paragraph of its own.
_INPUT = re.compile(
    r"\S[^\n]*\n\s*\S|[:：]\s*\S|[\"“”«「『《`'‘]\S[^\n]*?\S[\"“”»」』》`'’]|[?？。!！.;；]\s*\S.{20}", re.DOTALL
)
#: Characters of an instruction that are looked at; more hold an input.
_ENOUGH = 4000
_OPEN_END = re.compile(r"[:：]\s*$")


@dataclass(frozen=True)
class MissingInput(Filter):
    """Drops instructions that speak of a text, code or picture which they don't contain.

    ``Summarize the following article.`` is dropped, and so is one line that ends with a colon. An input counts as
    there if the instruction has quotes, a second paragraph, or words behind a colon or behind the sentence.
    """

    def __call__(self, example: Example) -> str | None:
        """Looks at the first user turn."""
        text = example.instruction[:_ENOUGH].strip()
        if "\n" not in text and _OPEN_END.search(text):
            return "ends with a colon"
        found = _REFERS.search(text)
        if found and not _INPUT.search(text):
            return "speaks of an input that is not there"
        return None
