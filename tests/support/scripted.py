"""A generator without a model: what it writes is a function of the request, with known shares of what is wrong."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

from lightning_rlhf.collection.generators import Generator
from lightning_rlhf.endpoint import ChatRequest, Reply, Usage

_WORDS = re.compile("[a-zA-Z]+")
_EN = _WORDS.findall("""
apple bridge candle desert engine forest garden harbor island jacket kettle ladder market needle orchard pencil quarry
river saddle temple umbrella valley window yarn zebra anchor basket copper dragon eagle feather glacier hammer insect
jungle kitchen lantern mirror notebook ocean palace rabbit sailor thunder uncle village whistle winter autumn bakery
castle dancer editor farmer guitar hunter ladybug mountain nephew oyster painter recipe station teacher tunnel violin
weather puzzle ticket cotton silver planet meadow canyon pepper butter garlic salmon pigeon turtle walnut
""")
_VERBS = _WORDS.findall("""
Describe Explain Compare Name Invent Discuss Outline Praise Question Imagine Summarize Advertise
""")
_ZH = (
    "山水火木金土日月星云风雨雪花草树鸟鱼虫马牛羊狗猫书笔纸墨琴棋画茶酒米面糖盐油门窗桌椅灯钟车船桥"
    "路城村海江河湖春夏秋冬红黄蓝绿黑白高低快慢新旧冷热"
)


def new_task(rng: random.Random, lang: str) -> str:
    """A task that is like no other."""
    if lang == "zh":
        return f"请介绍{''.join(rng.choices(_ZH, k=12))}之间的关系。"
    return f"{rng.choice(_VERBS)} the {' '.join(rng.choices(_EN, k=8))} in detail."


class Scripted(Generator):
    """Writes lists of tasks, and answers.

    Args:
        name: Its name.
        broken: Share of the lists that are broken.
        known: Share of the tasks that repeat one of the examples' wording.
        refused: Share of the answers that refuse.
        write: Writes every reply instead.
    """

    continues = False

    def __init__(
        self,
        name: str = "scripted",
        broken: float = 0.1,
        known: float = 0.1,
        refused: float = 0.1,
        write: Callable[[ChatRequest, random.Random], str] | None = None,
    ) -> None:
        self.name, self.broken, self.known, self.refused, self.write = name, broken, known, refused, write
        self.sent: list[ChatRequest] = []
        self.did: Counter[str] = Counter()

    def generate(self, requests: Sequence[ChatRequest], ledger=None, budget=None, on_reply=None) -> list[Reply]:
        replies = []
        for i, request in enumerate(requests):
            key = request.key(self.name)
            reply = ledger.find(key) if ledger is not None else None
            if reply is None:
                self.sent.append(request)
                text = self._text(request, random.Random(key))
                reply = Reply(key, text, "stop", Usage(100, 0, 50))
                if ledger is not None:
                    ledger.record(request, self.name, reply, 0.0)
            replies.append(reply)
            if on_reply is not None:
                on_reply(i, reply)
        return replies

    def _text(self, request: ChatRequest, rng: random.Random) -> str:
        if self.write is not None:
            return self.write(request, rng)
        asked = request.messages[-1]["content"]
        lang = "zh" if re.search("[\u4e00-\u9fff]{4}", request.messages[0]["content"]) else "en"
        if len(request.messages) > 1:
            if rng.random() < self.refused:
                self.did["refused"] += 1
                return "抱歉，我无法提供这方面的帮助。" if lang == "zh" else "I'm sorry, but I can't help with that."
            return ("好的，" if lang == "zh" else "Certainly: ") + new_task(rng, lang)
        examples = re.findall(r"^\d+\. (.*)$", asked, re.MULTILINE)
        if not examples:
            return new_task(rng, lang)
        if rng.random() < self.broken:
            self.did["broken"] += 1
            return rng.choice(["", "I have no idea.", "The capital of France is Paris."])
        tasks = []
        for _ in range(8):
            repeats = rng.random() < self.known
            self.did["known"] += repeats
            tasks.append(rng.choice(examples) if repeats else new_task(rng, lang))
        return "\n".join(f"{number}. {task}" for number, task in enumerate(tasks, len(examples) + 1))
