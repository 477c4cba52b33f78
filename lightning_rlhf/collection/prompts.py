"""What a model is asked when data are grown: a template for each language, style and kind of task.

A change of any wording here changes what models write, so it comes with a new :data:`VERSION`, which stands in the
provenance of every row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_rlhf.data.formats import Message

#: Version of all templates of this module.
VERSION = "1"

Style = Literal["list", "opening", "evolve"]

#: Parameters of a request whose last turn the model shall continue, by their names in vLLM's and our interface.
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}

#: Kinds of tasks that can be asked for by a description; other kinds are asked for by their name.
KINDS = {
    "question": {"en": "questions about the world, with a definite answer", "zh": "关于世界的问题，有明确的答案"},
    "rewriting": {
        "en": "rewrite a text that the task quotes, in another tone, length or style",
        "zh": "改写题目中给出的一段文字，换一种语气、长度或风格",
    },
    "summary": {"en": "sum up a text that the task quotes", "zh": "概括题目中给出的一段文字"},
    "classification": {
        "en": "sort something that the task quotes into one of several classes that it names",
        "zh": "把题目中给出的内容归入题目列出的某一类",
    },
    "extraction": {
        "en": "pull names, dates, figures or other facts out of a text that the task quotes",
        "zh": "从题目给出的文字中提取人名、日期、数字或其他信息",
    },
    "translation": {
        "en": "translate a sentence that the task quotes from or into English",
        "zh": "翻译题目中给出的句子，中译外或外译中",
    },
    "code": {"en": "write, explain or mend a short program", "zh": "编写、解释或修改一小段程序"},
    "arithmetic": {"en": "sums in words, with all numbers given", "zh": "应用题，所有数字都已给出"},
    "reasoning": {"en": "puzzles that take several steps of reasoning", "zh": "需要几步推理的题目"},
    "planning": {"en": "make a plan, a schedule or a checklist", "zh": "制定计划、日程或清单"},
    "writing": {
        "en": "write something new: a story, a letter, a poem, a notice",
        "zh": "写一段新的文字：故事、信、诗、通知等",
    },
    "dialogue": {
        "en": "what people say to begin a conversation about their day, their worries or their hobbies",
        "zh": "人们聊天时的开场白，谈日常、烦恼或爱好",
    },
}
#: Kinds that are never asked for, nor shown: a request for what a model should refuse brings more of that.
NOT_GROWN = ("refusal",)

_LIST = {
    "en": """\
Write tasks that people could give to an assistant who reads and writes text. Below are {shown} examples. Continue the \
list with {count} new ones, numbered {first} to {last}, each on a line of its own.

- Each task can be done in text alone, without pictures, files, links or today's news.
- A task about a text, a list or code contains it.
- No two are alike in topic or wording, and some are longer than others.
- Write the tasks in English, without their answers.{kind}

{examples}""",
    "zh": """\
请写出人们可能会交给一位只用文字交流的助手的任务。下面有{shown}个例子，请接着写{count}个新任务，编号从{first}到{last}，每个任务占一行。

- 每个任务都只用文字就能完成，不需要图片、文件、链接或当天的新闻。
- 如果任务要处理一段文字、列表或代码，就把它写在任务里。
- 任务的话题和说法各不相同，有长有短。
- 用中文写任务，不要写答案。{kind}

{examples}""",
}
_KIND = {"en": "\n- This time, only this kind of task: {}.", "zh": "\n- 这一次只写这一类任务：{}。"}

_EVOLVE = {
    "en": """\
Here is a task that somebody gave to an assistant who reads and writes text:

{task}

Write another task, made from this one: {way}. It must make sense by itself, be possible in text alone, and be at most \
{words} words long. Write it in English. Write the new task and nothing else: no answer, no heading.""",
    "zh": """\
下面是有人交给一位只用文字交流的助手的任务：

{task}

请由它改编出一个新任务：{way}。新任务要能单独看懂，只用文字就能完成，长度不超过{words}个字，用中文写。只写新任务本身，不要写答案，也不要加标题。""",
}
#: Ways to evolve a task: deeper versions of it, and broader ones. The first word is the way's name in provenance.
WAYS = {
    "constraint": {"en": "add one condition that the answer must meet", "zh": "增加一个答案必须满足的条件"},
    "depth": {"en": "ask about a cause or a consequence that it only touches", "zh": "追问它只是顺带提到的原因或后果"},
    "concrete": {
        "en": "put a concrete case, with names and numbers, in place of what is general",
        "zh": "把笼统的说法换成有名称、有数字的具体情况",
    },
    "steps": {"en": "make it need one more step of reasoning", "zh": "让它多需要一步推理"},
    "input": {
        "en": "quote a short text, table or piece of code that the answer must work with",
        "zh": "给出一小段文字、表格或代码，让答案必须用到它",
    },
    "rare": {
        "en": "keep the field, but choose a topic that is asked about less often",
        "zh": "领域不变，换一个更少人问的话题",
    },
    "other": {"en": "keep the topic, but ask for another kind of work", "zh": "话题不变，换一种要做的事情"},
}
_WORDS = {"en": 100, "zh": 150}

_OPENING = {
    "en": "You are a helpful assistant. The user writes in English and asks one thing.{kind}",
    "zh": "你是一个乐于助人的中文助手。用户用中文提问，一次只问一件事。{kind}",
}
_OPENING_KIND = {"en": " The user's request is of this kind: {}.", "zh": "用户的请求属于这一类：{}。"}

_ANSWER = {
    "en": "You are a helpful assistant. Answer in the language of the question unless asked otherwise. Be correct and "
    "to the point, and say so if something cannot be known.",
    "zh": "你是一个乐于助人的助手。除非另有要求，请用中文回答。回答要正确、切题；无法知道的事情请直接说明。",
}
#: The languages for which there are templates.
LANGUAGES = tuple(_LIST)


@dataclass(frozen=True)
class Prompt:
    """A request for new tasks, before it has a model and sampling settings.

    Attributes:
        messages: The turns.
        extra: Further parameters of the request.
        first: The number that the prompt itself wrote before the model's text; None if it wrote none.
        count: How many tasks it asks for.
    """

    messages: list[Message]
    extra: dict[str, Any]
    first: int | None
    count: int


def ask_for_list(lang: str, kind: str, examples: Sequence[str], count: int, continues: bool = False) -> Prompt:
    """Asks for new tasks that continue a numbered list of examples.

    Args:
        lang: One of :data:`LANGUAGES`.
        kind: Kind of the new tasks; empty: any.
        examples: The examples.
        count: Number of tasks to ask for.
        continues: Begin the list in the model's turn, and let it continue there. A small model then writes a list
            more often.

    Returns:
        The prompt.
    """
    first = len(examples) + 1
    listed = "\n".join(f"{number}. {_compact(text)}" for number, text in enumerate(examples, 1))
    text = (
        _LIST[lang]
        .format(
            shown=len(examples),
            count=count,
            first=first,
            last=first + count - 1,
            kind=_KIND[lang].format(_about(kind, lang)) if kind else "",
            examples="" if continues else listed,
        )
        .rstrip()
    )
    messages: list[Message] = [{"role": "user", "content": text}]
    if not continues:
        return Prompt(messages, {}, None, count)
    messages.append({"role": "assistant", "content": f"{listed}\n{first}."})
    return Prompt(messages, dict(CONTINUE), first, count)


def ask_to_evolve(lang: str, task: str, way: str) -> Prompt:
    """Asks for another task that is made from one.

    Args:
        lang: One of :data:`LANGUAGES`.
        task: The task to begin with.
        way: One of :data:`WAYS`.

    Returns:
        The prompt.
    """
    text = _EVOLVE[lang].format(task=task.strip(), way=WAYS[way][lang], words=_WORDS[lang])
    return Prompt([{"role": "user", "content": text}], {}, None, 1)


def open_turn(lang: str, kind: str) -> Prompt:
    """Lets the model begin the user's turn itself, after a system turn that says who asks (Xu et al. 2024, Magpie).

    Args:
        lang: One of :data:`LANGUAGES`.
        kind: Kind of the task; empty: any.

    Returns:
        The prompt.
    """
    about = _OPENING_KIND[lang].format(_about(kind, lang)) if kind else ""
    system: Message = {"role": "system", "content": _OPENING[lang].format(kind=about)}
    return Prompt([system, {"role": "user", "content": ""}], dict(CONTINUE), None, 1)


def ask_for_answer(lang: str, instruction: str) -> list[Message]:
    """The turns that ask for the answer to an instruction."""
    return [{"role": "system", "content": _ANSWER[lang]}, {"role": "user", "content": instruction}]


def _about(kind: str, lang: str) -> str:
    return KINDS[kind][lang] if kind in KINDS else kind


def _compact(text: str) -> str:
    """A text without empty lines, which would seem to end a list."""
    return re.sub(r"\n\s*\n", "\n", text.strip())
