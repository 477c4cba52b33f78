"""How many planted near duplicates are found, and how many rows are dropped that are none.

    pip install -e '.[collect]'
    python benchmarks/near_duplicates.py                     # 20,000 rows, half of them Chinese
    python benchmarks/near_duplicates.py --rows 2000 --seed 1

Rows are made of sentences of the bundled data: one sentence or two halves (short), three or four sentences (long). No
two originals are alike: their exact Jaccard similarity is below 0.7. Every tenth original gets one edited copy
somewhere in the file. Words are put in, taken out or exchanged in rows of 15 tokens or more, one in 33 tokens: in a
shorter row one word changes more than a fifth of what is compared, and most such pairs are different tasks ("a poem
about cats", "a poem about dogs"). They are planted too, as "exchanged, short", and reported without a goal.

Then 200 different tasks a language, made of ten templates: none of them is a near duplicate.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from lightning_rlhf.cleaning import clean, make_example
from lightning_rlhf.cleaning.filters import NearDuplicate
from lightning_rlhf.cleaning.near_duplicates import shingles
from lightning_rlhf.cleaning.text import tokens

LANGUAGES = ("en", "zh")
RECALL, PRECISION, TEMPLATES = 0.95, 0.99, 3
"""What must hold: shares of planted rows found, of dropped rows planted, and most tasks of templates dropped."""
SHORT = 15
NO_GOAL = "exchanged, short"
JOIN = {"en": " ", "zh": ""}


@dataclass(frozen=True)
class Planted:
    """A row of the set.

    Attributes:
        text: Its instruction.
        lang: Its language.
        of: Number of the original that it was made of; -1 for originals.
        original: Number of an original.
        kind: The kind of edit; empty for originals.
    """

    text: str
    lang: str
    of: int = -1
    original: int = -1
    kind: str = ""


# ---------------------------------------------------------------------------------------------- originals


def sentences() -> dict[str, list[str]]:
    """Different sentences of the bundled data, by language."""
    found: dict[str, dict[str, None]] = {lang: {} for lang in LANGUAGES}
    for lang in LANGUAGES:
        for file in sorted((importlib.resources.files("lightning_rlhf.data") / "bundled").iterdir(), key=str):
            if file.name.endswith(f".{lang}.jsonl"):
                for text in _texts([json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]):
                    for part in re.split(r"(?<=[.!?])\s+|(?<=[。！？；])|\n+", text):
                        words = tokens(part)
                        han = sum("\u4e00" <= word <= "\u9fff" for word in words)
                        if 7 <= len(words) <= 40 and (han > 0.7 * len(words) if lang == "zh" else han == 0):
                            found[lang].setdefault(part.strip(" -*#>\t"))
    return {lang: list(texts) for lang, texts in found.items()}


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            if key not in ("role", "lang", "category", "source", "reason", "id"):
                yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def originals(lang: str, pool: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """So many texts of which no two are alike."""
    made: list[str] = []
    sets: list[frozenset[str]] = []
    holders: defaultdict[str, list[int]] = defaultdict(list)
    while len(made) < count:
        text = _compose(lang, pool, rng)
        new = frozenset(shingles(tokens(text)))
        pairs = [shingle for shingle in new if " " in shingle]
        shared = Counter(number for pair in pairs for number in holders[pair])
        # texts whose similarity is 0.7 share well over half of their pairs
        alike = (number for number, n in shared.items() if n >= 0.5 * len(pairs))
        if any(len(new & sets[number]) >= 0.7 * len(new | sets[number]) for number in alike):
            continue
        for pair in pairs:
            holders[pair].append(len(made))
        made.append(text)
        sets.append(new)
    return made


def _compose(lang: str, pool: Sequence[str], rng: random.Random) -> str:
    if rng.random() < 0.5:
        return JOIN[lang].join(rng.sample(pool, rng.choice((3, 4))))
    parts = [text.split() if lang == "en" else list(text) for text in rng.sample(pool, 2)]
    if rng.random() < 0.2:
        return JOIN[lang].join(parts[0])
    return JOIN[lang].join(parts[0][: len(parts[0]) * 2 // 3] + parts[1][len(parts[1]) // 2 :])


# ---------------------------------------------------------------------------------------------- edits


WIDE = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}
HALF = str.maketrans("，。！？：；（）", ",.!?:;()")


def _words(lang: str, text: str) -> list[str]:
    return text.split() if lang == "en" else list(text)


def _edit_words(edit: Callable[[list[str], random.Random, Sequence[str]], None]) -> Callable[..., str]:
    def edited(lang: str, text: str, rng: random.Random, words: Sequence[str]) -> str:
        parts = _words(lang, text)
        for _ in range(max(1, round(len(tokens(text)) / 33))):
            edit(parts, rng, words)
        return JOIN[lang].join(parts)

    return edited


def _insert(parts: list[str], rng: random.Random, words: Sequence[str]) -> None:
    parts.insert(rng.randrange(len(parts)), rng.choice(words))


def _remove(parts: list[str], rng: random.Random, words: Sequence[str]) -> None:
    parts.pop(rng.randrange(len(parts)))


def _exchange(parts: list[str], rng: random.Random, words: Sequence[str]) -> None:
    parts[rng.randrange(len(parts))] = rng.choice(words)


def _case(lang: str, text: str, rng: random.Random, words: Sequence[str]) -> str:
    return rng.choice((text.upper(), text.lower(), text.title()))


def _width(lang: str, text: str, rng: random.Random, words: Sequence[str]) -> str:
    return text.translate(WIDE) if lang == "en" else text.translate(HALF)


def _punctuation(lang: str, text: str, rng: random.Random, words: Sequence[str]) -> str:
    ends = ("!", "?", " .", "", "...") if lang == "en" else ("！", "？", "", "。。", "~")
    return re.sub(r"[,;，、]", "", text).rstrip(".!?。！？；") + rng.choice(ends)


def _spaces(lang: str, text: str, rng: random.Random, words: Sequence[str]) -> str:
    return "  ".join(text.split()) if lang == "en" else re.sub("(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])", " ", text)


def _please(lang: str, text: str, rng: random.Random, words: Sequence[str]) -> str:
    return f"Please {text[0].lower()}{text[1:]}" if lang == "en" else f"请{text}"


EDITS: dict[str, Callable[..., str]] = {
    "punctuation": _punctuation,
    "width": _width,
    "spaces": _spaces,
    "please": _please,
    "put in": _edit_words(_insert),
    "taken out": _edit_words(_remove),
    "exchanged": _edit_words(_exchange),
    "case": _case,
}
IN_LONG_ROWS = ("put in", "taken out", "exchanged")


def plant(count: int, seed: int) -> list[Planted]:
    """The set: so many rows, half of each language, a tenth of the originals with a copy."""
    rng = random.Random(seed)
    pools = sentences()
    rows: list[Planted] = []
    for lang in LANGUAGES:
        pool = pools[lang]
        words = [word for text in pool for word in _words(lang, text) if word.isalpha()]
        texts = originals(lang, pool, round(count / 1.1 / 2), rng)
        start = len(rows)
        rows += [Planted(text, lang, original=start + i) for i, text in enumerate(texts)]
        for i in rng.sample(range(len(texts)), len(texts) // 10):
            kind = rng.choice([kind for kind in EDITS if lang == "en" or kind != "case"])
            text = EDITS[kind](lang, texts[i], rng, words)
            if kind in IN_LONG_ROWS and len(tokens(texts[i])) < SHORT:
                text, kind = EDITS["exchanged"](lang, texts[i], rng, words), NO_GOAL
            rows.append(Planted(text, lang, of=start + i, kind=kind))
    rng.shuffle(rows)
    return rows


# ---------------------------------------------------------------------------------------------- templates


TASKS = {
    "en": (
        *(
            "Write a short poem about {}.",
            "What is the capital of {}?",
            "Explain how {} works.",
            "Name three uses of {}.",
        ),
        *(
            "Translate the word {} into French.",
            "Who invented {}, and when?",
            "Write a tagline for a shop that sells {}.",
        ),
        *("Describe {} to a child of six.", "List five facts about {}.", "Is it healthy to eat {} every day?"),
    ),
    "zh": (
        *("写一首关于{}的短诗。", "{}的首都是哪里？", "解释一下{}的工作原理。", "说出{}的三种用途。"),
        *("把“{}”翻译成法语。", "{}是谁发明的？", "给一家卖{}的店写一句广告语。"),
        *("向六岁的孩子描述{}。", "列出关于{}的五个事实。", "每天吃{}健康吗？"),
    ),
}
THINGS = {
    "en": "bread,Norway,a bicycle,rice,the radio,paper,cheese,glass,Peru,soap,a compass,honey,Kenya,ink,steam,"
    "garlic,a mirror,Japan,olive oil,rope",
    "zh": "面包,挪威,自行车,大米,收音机,纸,奶酪,玻璃,秘鲁,肥皂,指南针,蜂蜜,肯尼亚,墨水,蒸汽,大蒜,镜子,日本,橄榄油,绳子",
}


def tasks(lang: str) -> list[str]:
    """200 different tasks of ten templates."""
    return [template.format(thing) for template, thing in product(TASKS[lang], THINGS[lang].split(","))]


# ---------------------------------------------------------------------------------------------- measuring


def dropped(texts: Sequence[str]) -> set[int]:
    """The rows that are dropped, by number."""
    examples = (make_example({"prompt": text}, str(i), "prompt", "prompt") for i, text in enumerate(texts))
    return set(range(len(texts))) - {int(example.where) for example in clean(examples, [NearDuplicate()])}


def score(rows: Sequence[Planted], gone: set[int]) -> tuple[dict[tuple[str, str], tuple[int, int]], dict[str, float]]:
    """What was found of what was planted, by language and kind of edit; and the precision by language.

    Args:
        rows: The set.
        gone: Numbers of the rows that were dropped.
    """
    places = {row.original: i for i, row in enumerate(rows) if row.of < 0}
    later = {max(i, places[row.of]): (row.lang, row.kind) for i, row in enumerate(rows) if row.of >= 0}
    planted = Counter(later.values())
    found = Counter(key for i, key in later.items() if i in gone)
    right = Counter(rows[i].lang for i in gone if i in later)
    total = Counter(rows[i].lang for i in gone)
    precision = {lang: right[lang] / total[lang] if total[lang] else 1.0 for lang in LANGUAGES}
    return {key: (found[key], planted[key]) for key in sorted(planted)}, precision


def main(arguments: Sequence[str] | None = None) -> None:
    """Plants, cleans, and prints what was found. Fails if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="rows to plant")
    parser.add_argument("--seed", type=int, default=0, help="seed of the set")
    options = parser.parse_args(arguments)
    rows = plant(options.rows, options.seed)
    found, precision = score(rows, dropped([row.text for row in rows]))
    missed = []
    print(f"{'lang':6s}{'edit':20s}{'planted':>8s}{'found':>8s}{'recall':>8s}")
    for (lang, kind), (n, planted) in found.items():
        print(f"{lang:6s}{kind:20s}{planted:8,}{n:8,}{n / planted:8.3f}{'  no goal' if kind == NO_GOAL else ''}")
        if kind != NO_GOAL and n < RECALL * planted:
            missed.append(f"{lang}: recall of {kind} is {n / planted:.3f}, below {RECALL}")
    for lang in LANGUAGES:
        counts = [count for (name, kind), count in found.items() if name == lang and kind != NO_GOAL]
        recall = sum(n for n, _ in counts) / sum(planted for _, planted in counts)
        lost = len(dropped(tasks(lang)))
        print(f"{lang}: recall {recall:.4f}, precision {precision[lang]:.4f}; {lost} of 200 tasks of templates dropped")
        if precision[lang] < PRECISION:
            missed.append(f"{lang}: precision is {precision[lang]:.4f}, below {PRECISION}")
        if lost > TEMPLATES:
            missed.append(f"{lang}: {lost} tasks of templates were dropped, more than {TEMPLATES}")
    if missed:
        sys.exit("Missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
