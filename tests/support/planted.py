"""What the fake endpoint says: lists of tasks, answers and verdicts, with known faults in them.

What it says to a request is a function of the request's body and a seed, so ``plant(body, seed)`` tells beforehand what
a run will get, item by item: a test can count what each filter must drop.
"""

import hashlib
import json
import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

BUNDLED = Path(__file__).parents[2] / "lightning_rlhf" / "data" / "bundled"
HAN = re.compile("[\u4e00-\u9fff]")
TOKEN = re.compile("[\u4e00-\u9fff]|[^\\W\u4e00-\u9fff]+|[^\\w\\s]")
NUMBERED = re.compile(r"^\s*(\d+)[.、)．]\s*(\S.*)$", re.MULTILINE)
ITEMS = 8

#: Shares of list items that are not new tasks.
SHARES = {
    "duplicate": 0.06,  # an example from the prompt again, or the list's own item before it
    "foreign": 0.04,  # in the other language
    "missing": 0.04,  # speaks of an input that is not there
    "personal": 0.04,  # a telephone number, mail address, identity number or card
    "refusal": 0.04,
    "repeated": 0.03,  # the same words over and over
    "short": 0.03,
    "nobody": 0.02,  # an address and a card that look like a person's and are nobody's
}
#: Share of whole lists that are broken, in one of these ways.
BROKEN_SHARE = 0.06
BROKEN = ("unnumbered", "one_line", "cut", "out_of_order", "empty_items")
#: Shares of answers that are not what was asked for.
ANSWER_SHARES = {"foreign": 0.04, "personal": 0.04, "refusal": 0.06, "repeated": 0.04}

# A task takes one phrase of each of five columns of 23, by a Reed-Solomon code: two tasks share at most two phrases, so
# none is a near duplicate of another.
PHRASES = {
    "en": (
        """Write a thank-you letter|Draft a packing list|Compose a lullaby|Explain the history
        |Plan a weekend trip|Suggest five names|Compare two approaches|Outline a speech|Invent a riddle
        |Describe common mistakes|Give step-by-step instructions|Create a quiz|Estimate the costs
        |Name the advantages|Tell a bedtime story|Sketch a newspaper advert|Prepare interview questions
        |List safety rules|Make up a dialogue|Recommend some books|Define the key terms
        |Propose a small experiment|Write a limerick""",
        """about a leaking kitchen tap|concerning migratory birds|on homemade sourdough bread
        |about the invention of glass|regarding a community garden|on night trains across Europe
        |concerning volcanic islands|about learning the violin|on second-hand bicycles
        |regarding lost luggage|about chess openings|on rainwater barrels|concerning honey bees
        |about lighthouse keepers|regarding a school play|on marathon training|about old photographs
        |concerning solar panels|on mountain rescue dogs|about a power cut|regarding public libraries
        |on wild mushrooms|about tidal energy""",
        """for a retired sailor|for curious ten-year-olds|for busy nurses|aimed at first-time voters
        |for my new neighbours|to be read by engineers|for a village newsletter
        |for people who hate cooking|aimed at exchange students|for a shy colleague
        |to amuse grandparents|for night-shift workers|aimed at small shopkeepers|for amateur actors
        |to help beginners|for a football team|aimed at museum visitors|for parents of twins
        |to persuade the mayor|for taxi drivers|aimed at young farmers|for a radio audience
        |to comfort a friend""",
        """using fewer than fifty words|without any technical jargon|in a cheerful tone
        |as a numbered outline|with one surprising fact|in exactly three paragraphs
        |ending with a question|while avoiding adjectives|in formal language|with a concrete example
        |as if it were 1920|keeping every sentence short|with rough figures|in the second person
        |including a warning|with a memorable title|using plain verbs only|as a letter to yourself
        |with two counterarguments|in alphabetical order|mentioning the weather|starting from the end
        |with a short glossary""",
        """on a rainy Sunday|before the shops open|during a long train ride|while dinner is cooking
        |for next year's calendar|at the end of summer|in the middle of winter|between two meetings
        |after a sleepless night|ahead of the holidays|until the bus arrives|over a cup of tea
        |within a single evening|by tomorrow noon|at the start of term|shortly after midnight
        |throughout the harvest|around lunchtime|once the guests leave|every second Friday
        |despite the heat wave|near closing time|amid moving house""",
    ),
    "zh": (
        """写一封感谢信|列一份行李清单|创作一首摇篮曲|讲讲来龙去脉|安排周末行程|取五个名字|比较两种做法
        |拟一份演讲提纲|编一个谜语|指出常见错误|给出详细步骤|出一套小测验|估算大致花费|说明有哪些好处
        |讲个睡前故事|设计一则广告|准备采访问题|制定安全守则|编一段对话|推荐几本书|解释关键术语|设计一个小实验
        |作一首打油诗""",
        """围绕厨房漏水的龙头|关于候鸟迁徙|以自制酸面包为题|有关玻璃的发明|谈社区菜园|以欧洲夜班火车为背景|关于火山岛
        |就学拉小提琴一事|针对二手自行车|行李丢失这件事|说说围棋开局|以雨水收集桶为例|聚焦蜜蜂|写写灯塔看守人
        |校园话剧演出|马拉松备赛|一叠旧照片|屋顶太阳能板|山地搜救犬|突然停电的夜晚|公共图书馆|野生蘑菇|潮汐发电""",
        """写给退休水手|让十岁孩子看懂|供忙碌的护士参考|面向首次投票者|送给新邻居|给工程师阅读|登在村里小报上
        |适合讨厌做饭的人|对象是交换生|给害羞的同事|逗爷爷奶奶开心|给上夜班的人|帮助小店老板|演员们要用
        |照顾零基础读者|足球队专用|博物馆观众会看|双胞胎父母需要|用来说服市长|出租车司机听得懂|年轻农民用得上
        |在电台播出|安慰一位朋友""",
        """不超过五十字|别用专业词汇|语气要欢快|按编号列出|带一个惊人事实|正好分三段|最后提个问题|尽量少用形容词
        |措辞正式些|举具体例子|假装身处民国|每句都要短|附上粗略数字|用第二人称|加一条警告|起个好记的标题
        |只用简单动词|像写给自己|补充两个反方观点|依拼音排序|提到当天的天气|从结尾讲起|末尾附小词表""",
        """趁着下雨的周日|赶在商店开门前|坐长途火车时|一边做晚饭|明年日历要用|夏末完成|隆冬时节|两场会议之间
        |失眠之后|节前准备好|等公交车的工夫|喝杯茶的时间|一个晚上搞定|明天中午交|新学期伊始|午夜刚过|秋收期间
        |午饭前后|客人散去以后|每隔一个周五|顶着酷暑|临近打烊|搬家途中""",
    ),
}
PHRASES = {
    lang: tuple([phrase.strip() for phrase in column.split("|")] for column in columns)
    for lang, columns in PHRASES.items()
}
PLANTS = {
    "en": {
        "refusal": ["I'm sorry, but I cannot help with that request.", "As an AI language model, I can't do that."],
        "missing": ["Summarize the following article in one sentence.", "Correct the spelling in the text below."],
        "personal": [
            "Write a reminder to {first}.{last}@{host}.zz that the rent is due.",
            "Ask the plumber to call back at +44 20 7946 {number} before noon.",
            "Explain why the card 4012 8888 8888 1881 of {first} {last} was declined.",
        ],
        "nobody": [
            "Write a reminder to {first}.{last}@{host}.example.com that the rent is due.",
            "Explain why the card 4111 1111 1111 1111 of {first} {last} was declined.",
        ],
        "short": ["Why?", "Go on.", "Again"],
    },
    "zh": {
        "refusal": ["抱歉，我无法协助完成这个请求。", "作为一个人工智能语言模型，我不能回答这个问题。"],
        "missing": ["用一句话概括下面这篇文章。", "改正以下文字中的错别字。"],
        "personal": [
            "给 {first}.{last}@{host}.zz 写一封催交房租的邮件。",
            "请修水管的师傅在中午前回电 1381200{number}。",
            "说明身份证号 11010519491231002X 的持有人应当怎样办理居住证。",
        ],
        "nobody": [
            "给 {first}.{last}@{host}.example.com 写一封催交房租的邮件。",
            "说明 {first} {last} 的银行卡 4111 1111 1111 1111 为什么被拒。",
        ],
        "short": ["为何？", "继续", "再来"],
    },
}


@dataclass(frozen=True)
class Planted:
    """What a request is answered with.

    Attributes:
        mode: ``list``, ``answer`` or ``judge``.
        lang: ``en`` or ``zh``.
        text: The whole text.
        items: (kind, text) of each item: ``new``, or one of the kinds of :data:`SHARES`; of the one answer: ``good`` or
            one of the kinds of :data:`ANSWER_SHARES`; of a verdict: ``A``, ``B`` or ``tie``.
        broken: How the list is broken, one of :data:`BROKEN`. The items are those that were meant.
    """

    mode: str
    lang: str
    text: str
    items: tuple = ()
    broken: str | None = None

    def counts(self):
        """How often each kind occurs among the items."""
        found = {}
        for kind, _ in self.items:
            found[kind] = found.get(kind, 0) + 1
        return found


@dataclass(frozen=True)
class Shares:
    """How much of each fault there is; see the constants of these names."""

    items: dict = field(default_factory=lambda: dict(SHARES))
    answers: dict = field(default_factory=lambda: dict(ANSWER_SHARES))
    broken: float = BROKEN_SHARE


def digest(*what):
    """A number that is a function of JSON values."""
    return int.from_bytes(hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()[:8], "big")


def task(lang, a, b, c):
    """One of 23 ** 3 tasks. Two different ones have at most two of their five phrases in common."""
    places = (a, b, c, a + b + c, a + 2 * b + 3 * c)
    parts = [column[place % 23] for column, place in zip(PHRASES[lang], places, strict=True)]
    return "{} {} {} {}, {}.".format(*parts[:3], *parts[:2:-1]) if lang == "en" else "，".join(parts) + "。"


@lru_cache
def bundled_answers(lang):
    """The answers of the bundled rows of a language, of one turn each."""
    with (BUNDLED / f"instructions.{lang}.jsonl").open(encoding="utf-8") as rows:
        chats = [json.loads(row)["messages"] for row in rows]
    return [chat[-1]["content"] for chat in chats if len(chat) == 2]


def count_tokens(text):
    """Tokens as the fake server counts them: words, Chinese characters and marks."""
    return len(TOKEN.findall(text))


def language(text):
    """``zh`` if a fifth of the letters are Chinese characters, otherwise ``en``."""
    letters = sum(map(str.isalpha, text))
    return "zh" if 5 * len(HAN.findall(text)) > letters else "en"


def plant(body, seed=0, shares=None):
    """What a request's body is answered with.

    A last message with marked answers is a judge's question: the longer answer wins. With at least two numbered lines
    it asks for the list to be continued, by :data:`ITEMS` items. Otherwise it is an instruction to answer.
    """
    shares = shares or Shares()
    rng = random.Random(digest(body, seed))
    prompt = body["messages"][-1]["content"]
    lang = language(prompt)
    if "[answer A]" in prompt:
        a, b = (re.search(rf"\[answer {x}\]\n(.*?)\n\[end of answer {x}\]", prompt, re.DOTALL)[1] for x in "AB")
        verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
        return Planted("judge", lang, f"Length decides.\nVerdict: {verdict}", ((verdict, verdict),))
    examples = NUMBERED.findall(prompt)
    if len(examples) < 2:
        kind = _kind(rng, shares.answers, "good")
        text = _plant(kind, lang, rng, []) if kind != "good" else rng.choice(bundled_answers(lang))
        return Planted("answer", lang, text, ((kind, text),))
    items, shown = [], [text for _, text in examples]
    for _ in range(ITEMS):
        kind = _kind(rng, shares.items, "new")
        text = _plant(kind, lang, rng, shown)
        items.append((kind, text))
        shown = [*shown, text] if kind == "new" else shown
    broken = rng.choice(BROKEN) if rng.random() < shares.broken else None
    first = 1 + max(int(number) for number, _ in examples)
    return Planted("list", lang, _list([text for _, text in items], first, broken), tuple(items), broken)


def _kind(rng, shares, otherwise):
    at = rng.random()
    for kind, share in shares.items():
        at -= share
        if at < 0:
            return kind
    return otherwise


def _plant(kind, lang, rng, shown):
    a, b, c = (rng.randrange(23) for _ in range(3))
    other = {"en": "zh", "zh": "en"}[lang]
    if kind == "duplicate" and shown:
        return rng.choice(shown)
    if kind == "foreign":
        return task(other, a, b, c)
    if kind == "repeated":
        return (task(lang, a, b, c) + (" " if lang == "en" else "")) * 8
    if kind in PLANTS[lang]:
        # made-up people; .zz is no country, the telephone numbers are of ranges for films, the rest is from manuals
        names = {"first": f"kim{a}", "last": f"doe{b}", "host": f"mail{c}", "number": f"0{a:02d}{b % 10}"}
        return rng.choice(PLANTS[lang][kind]).format(**names)
    return task(lang, a, b, c)


def _list(texts, first, broken):
    numbers = list(range(first, first + len(texts)))
    if broken == "unnumbered":
        return "\n".join(texts)
    if broken == "out_of_order":
        numbers[1], numbers[2] = numbers[2], numbers[1]
    if broken == "empty_items":
        texts = ["" if i % 3 == 1 else text for i, text in enumerate(texts)]
    text = (" " if broken == "one_line" else "\n").join(f"{n}. {t}" for n, t in zip(numbers, texts, strict=True))
    return text[: -len(texts[-1]) // 2 - 1] if broken == "cut" else text
