"""Drops conversations whose answer is a refusal, or speaks of being a language model."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter

#: Characters at the beginning of an answer, in which a refusal is looked for.
_OPENING = 160
_CANT = r"(?:can(?:no|')t|can not|won't be able to)"
_DO = (
    r"(?:help|assist|provide|comply|fulfil+|answer|create|generate|write|access|browse|open|view|see|do that|offer|"
    r"support|complete|process|engage|discuss|give)"
)
_REFUSAL = re.compile(
    "|".join(
        (
            r"\bas an? (?:ai|artificial intelligence|large language|language)(?: language)?(?: model| assistant)?\b",
            r"\bi(?: am|'m) (?:just |only )?an? (?:ai|artificial intelligence|(?:large )?language)\b",
            rf"\bi {_CANT} {_DO}",
            rf"\bi(?:'m| am) (?:afraid (?:that )?i {_CANT}|(?:not able|unable) to {_DO})",
            r"\b(?:sorry|apologi[sz]e|unfortunately|regret)\b[^.!?]{0,60}"
            rf"\bi(?: {_CANT}|(?:'m| am) unable| must decline)",
            r"作为(?:一个|一名|一款)?(?:人工智能|大?语言模型|ai|智能助手)",
            r"我(?:只)?是(?:一个|一名|一款)(?:人工智能|大?语言模型|ai)",
            r"(?:抱歉|对不起|不好意思|很遗憾)[^。！？]{0,20}?(?:无法|不能|没有办法|没办法|不会|拒绝)",
            r"我(?:无法|不能|没有办法|没办法)(?:提供|回答|帮助|协助|满足|完成|生成|执行|访问|浏览|查看|打开|替你|帮你|为您|为你|帮您)",
        )
    ),
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Refusal(Filter):
    """Drops conversations with an answer that begins by refusing, or by saying that it comes from a language model.

    Preferences pass: among their answers a refusal is often meant to be the better or the worse one.
    """

    def __call__(self, example: Example) -> str | None:
        """Looks at the beginning of each answer."""
        if example.kind != "instruction":
            return None
        for answer in example.answers:
            if _REFUSAL.search(answer[:_OPENING].replace("’", "'")):
                return "answer refuses"
        return None
