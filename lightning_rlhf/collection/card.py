"""The card of a data set: what is in it, how it came about, what was left out, and what it cost."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_rlhf.cleaning.text import tokens
from lightning_rlhf.collection.grow import Count, Growth
from lightning_rlhf.collection.preferences import Preferences
from lightning_rlhf.collection.trace import write_atomically
from lightning_rlhf.collection.words import verbs_and_nouns
from lightning_rlhf.endpoint import Totals
from lightning_rlhf.report.page import article, details, document, escape, table
from lightning_rlhf.utils.text import one_line

#: Rows that a card shows, drawn at random.
SHOWN = 10
_CHARACTERS = 400


@dataclass(frozen=True)
class Table:
    """A table; cells are plain text."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Quotes:
    """Texts that are quoted, each below a prompt or a note. They may be folded behind a summary."""

    texts: Sequence[tuple[str, Sequence[str]]]
    summary: str = ""


@dataclass
class Card:
    """A card, to be written as Markdown and as a page.

    Attributes:
        title: Heading.
        sections: Heading and content of each section; a text is a paragraph.
    """

    title: str
    sections: list[tuple[str, list[str | Table | Quotes]]] = field(default_factory=list)

    def markdown(self) -> str:
        """The card as Markdown."""
        parts = [f"# {self.title}\n"]
        for heading, blocks in self.sections:
            parts.append(f"## {heading}\n")
            parts += [_markdown(block) for block in blocks]
        return "\n".join(parts)

    def page(self) -> str:
        """The card as one HTML page."""
        return document(self.title, [(name, "".join(map(_html, blocks))) for name, blocks in self.sections])

    def write(self, folder: Path) -> None:
        """Writes ``card.md`` and ``card.html``."""
        write_atomically(folder / "card.md", [self.markdown()])
        write_atomically(folder / "card.html", [self.page()])


def growth_card(growth: Growth, splits: Mapping[str, int], totals: Totals, prices: bool) -> Card:
    """The card of instructions that were grown.

    Args:
        growth: The growth.
        splits: Number of rows of each part.
        totals: The ledger's sums.
        prices: Whether there are prices, so that money can be told.
    """
    rows, plan = growth.rows, growth.plan
    made = ", ".join(f"{count.rows:,} in {lang}" for lang, count in growth.counts.items())
    parts = ", ".join(f"{name} {count:,}" for name, count in splits.items()) or "none"
    models = dict.fromkeys([growth.generator.name, growth.answerer.name])
    about = [
        f"{len(rows):,} instructions with answers ({made}), written by {' and '.join(models)} in {growth.round} rounds "
        f"of self-instruct from {len(growth.seeds):,} seeds, style {plan.style}, seed {plan.seed}. Parts: {parts}.",
        "The texts come from a model. They may be wrong, and its license and terms apply to them.",
    ]
    sections: list[tuple[str, list[str | Table | Quotes]]] = [("About", list(about))]
    sections.append(("Rows by language and kind", [_kinds(rows)]))
    for lang in growth.counts:
        texts = [_instruction(row) for row in rows if row["lang"] == lang]
        if texts:
            sections.append((f"Verbs and nouns: {lang}", [_VERBS, _verbs(texts, lang)]))
    sections.append(("Lengths", [_TOKENS, _lengths(rows)]))
    sections.append(("Likeness to seeds and earlier rows", [_LIKENESS, _likeness(rows)]))
    for lang, count in growth.counts.items():
        sections.append((f"What was left out: {lang}", left_out(count)))
    sections.append(("Requests and cost", cost(totals, prices)))
    sections.append((f"{min(SHOWN, len(rows))} rows at random", [sample(rows, plan.seed)]))
    return Card("Instructions grown by self-instruct", sections)


def preference_card(work: Preferences, splits: Mapping[str, int], totals: Totals, prices: bool) -> Card:
    """The card of rankings.

    Args:
        work: The rankings.
        splits: Number of rows of each part.
        totals: The ledger's sums.
        prices: Whether there are prices, so that money can be told.
    """
    count, names = work.count, list(dict.fromkeys(generator.name for generator in work.generators))
    parts = ", ".join(f"{name} {number:,}" for name, number in splits.items()) or "none"
    about: list[str | Table | Quotes] = [
        f"{count.rows:,} rankings with {count.pairs:,} pairs: answers by {' and '.join(names)}, {work.samples} of each "
        f"to {count.prompts:,} prompts, ranked by {work.ranker.name}. Parts: {parts}.",
        f"{count.on_length} Far from 50 %, a reward model can learn length in place of quality.",
        "The texts come from models. They may be wrong, and the models' licenses and terms apply to them.",
    ]
    body = [("prompts", f"{count.prompts:,}"), ("answers asked for", f"{count.answers:,}")]
    body += [(kind, f"{number:,}") for kind, number in count.problems.items() if number]
    body += [("rankings", f"{count.rows:,}"), ("pairs", f"{count.pairs:,}")]
    sizes = sorted(len(tokens(text)) for row in work.rows for text in row["ranked"])
    margins = sorted(row["scores"][0] - row["scores"][-1] for row in work.rows)
    sections: list[tuple[str, list[str | Table | Quotes]]] = [
        ("About", about),
        ("What was left out", [Table(("step", "number"), body)]),
        ("Lengths of answers", [_TOKENS, Table(_FIGURES[1:], [figures(sizes)])]),
        ("Distance of best and worst score", [Table(_FIGURES[1:], [figures(margins)])]),
    ]
    if len(count.wins) > 1:
        wins = [(name, f"{won:,}", f"{lost:,}") for name, (won, lost) in sorted(count.wins.items())]
        sections.append(("Pairs of different models", [Table(("model", "won", "lost"), wins)]))
    sections.append(("Requests and cost", cost(totals, prices)))
    drawn = random.Random(f"card {work.seed}").sample(range(len(work.rows)), min(SHOWN, len(work.rows)))
    texts = [
        (
            work.rows[i]["prompt"][-1]["content"],
            [f"{score:g}: {text}" for score, text in zip(work.rows[i]["scores"], work.rows[i]["ranked"], strict=True)],
        )
        for i in sorted(drawn)
    ]
    sections.append((f"{len(texts)} rows at random", [Quotes(texts)]))
    return Card("Ranked answers", sections)


_FIGURES = ("", "least", "median", "mean", "95 %", "most")
_VERBS = (
    "The verb or question word that an instruction begins with, and the first meaningful word after it. English words "
    "are taken by their place, Chinese ones from a list of verbs: read this as a hint, not as grammar."
)
_TOKENS = "In tokens: words, and single Chinese characters."
_LIKENESS = (
    "The highest ROUGE-L (F) of each instruction with a seed or an instruction that was accepted before it. Above the "
    "limit an instruction is dropped."
)


def _kinds(rows: Sequence[Mapping[str, Any]]) -> Table:
    langs = list(dict.fromkeys(row["lang"] for row in rows))
    counts = Counter((row["category"] or "none", row["lang"]) for row in rows)
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    body = [[kind, *(f"{counts[kind, lang]:,}" for lang in langs)] for kind in kinds]
    return Table(("kind asked for", *langs), [*body, ["all", *(_of(rows, lang) for lang in langs)]])


def _of(rows: Sequence[Mapping[str, Any]], lang: str) -> str:
    return f"{sum(row['lang'] == lang for row in rows):,}"


def _verbs(texts: Sequence[str], lang: str) -> Table:
    body = [
        (verb, f"{count:,}", ", ".join(f"{noun} {n}" for noun, n in nouns))
        for verb, count, nouns in verbs_and_nouns(texts, lang)
    ]
    return Table(("verb", "rows", "nouns"), body)


def _lengths(rows: Sequence[Mapping[str, Any]]) -> Table:
    body = []
    for lang in dict.fromkeys(row["lang"] for row in rows):
        for name, place in (("instruction", 0), ("answer", -1)):
            sizes = sorted(len(tokens(row["messages"][place]["content"])) for row in rows if row["lang"] == lang)
            body.append((f"{lang} {name}", *figures(sizes)))
    return Table(_FIGURES, body)


def figures(sizes: Sequence[float]) -> tuple[str, ...]:
    """Least, median, mean, 95th percentile and most of sorted numbers."""
    if not sizes:
        return ("",) * 5
    high = sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))]
    found = (sizes[0], statistics.median(sizes), round(statistics.fmean(sizes), 2), high, sizes[-1])
    return tuple(f"{value:,.6g}" for value in found)


def _likeness(rows: Sequence[Mapping[str, Any]]) -> Table:
    langs = list(dict.fromkeys(row["lang"] for row in rows))
    bins: dict[str, Counter[int]] = {lang: Counter() for lang in langs}
    for row in rows:
        bins[row["lang"]][min(9, int(10 * row["provenance"]["filters"].get("novelty", 0.0)))] += 1
    used = sorted({place for counts in bins.values() for place in counts})
    body = [[f"{i / 10:.1f} to {(i + 1) / 10:.1f}", *(f"{bins[lang][i]:,}" for lang in langs)] for i in used]
    return Table(("ROUGE-L", *langs), body)


def left_out(count: Count) -> list[str | Table | Quotes]:
    """Lists what was left out in a language, step by step, with examples."""
    body = [(f"tasks asked for, in {count.requests:,} requests", f"{count.asked:,}", "")]
    quotes: list[tuple[str, list[str]]] = []
    body += _problems("not read", count.unread, count, quotes)
    body.append(("tasks read", f"{count.tasks:,}", ""))
    body += _dropped(count.instruction, quotes)
    if count.surplus:
        body.append(("not needed any more", f"{count.surplus:,}", ""))
    body.append(("answers asked for", f"{count.answers:,}", ""))
    body += _problems("answer not used", count.unanswered, count, quotes)
    body += _dropped(count.row, quotes)
    body.append(("rows", f"{count.rows:,}", f"{count.share:.1%} of the tasks asked for"))
    blocks: list[str | Table | Quotes] = [Table(("step", "number", ""), body)]
    return [*blocks, Quotes(quotes, "Examples of what was left out")] if quotes else blocks


def _problems(
    step: str, problems: Counter[str], count: Count, quotes: list[tuple[str, list[str]]]
) -> list[tuple[str, str, str]]:
    for kind, _ in problems.most_common():
        if texts := [text for text in count.examples.get(kind, []) if text]:
            quotes.append((f"{step}: {kind}", texts))
    return [(f"{step}: {kind}", f"{number:,}", "") for kind, number in problems.most_common()]


def _dropped(tally: Mapping[str, Any], quotes: list[tuple[str, list[str]]]) -> list[tuple[str, str, str]]:
    body = []
    for name, found in tally.get("filters", {}).items():
        for reason, number in found["reasons"].items():
            body.append((f"{name}: {reason}", f"{number:,}", f"of {found['seen']:,} seen"))
            if texts := [example["text"] for example in found["examples"] if example["reason"] == reason]:
                quotes.append((f"{name}: {reason}", texts))
        if found["changed"]:
            body.append((f"{name}: changed", f"{found['changed']:,}", f"of {found['seen']:,} seen"))
    return body


def cost(totals: Totals, prices: bool) -> list[str | Table | Quotes]:
    """Lists what was asked and paid, by the ledger."""

    def money(amount: float) -> str:
        return f"{amount:,.4f}" if prices else "no price given"

    usage = totals.usage
    body = [
        ("different requests", f"{totals.requests:,}", ""),
        ("with a usable reply", f"{totals.answered:,}", ""),
        ("sent over HTTP, further attempts included", f"{totals.sent:,}", ""),
        ("tokens of prompts", f"{usage.prompt:,}", f"{usage.cached:,} of them cached"),
        ("tokens of replies", f"{usage.completion:,}", ""),
        ("paid", f"{totals.paid.tokens:,} tokens", money(totals.paid.money)),
        (
            f"perhaps paid and lost, in {totals.lost:,} attempts",
            f"{totals.lost_cost.tokens:,} tokens",
            money(totals.lost_cost.money),
        ),
    ]
    blocks: list[str | Table | Quotes] = [Table(("", "number", ""), body)]
    if totals.kinds:
        blocks.append(
            Table(
                ("problems and oddities of attempts", "number"), [(k, f"{n:,}") for k, n in totals.kinds.most_common()]
            )
        )
    return blocks


def sample(rows: Sequence[Mapping[str, Any]], seed: int) -> Quotes:
    """Rows drawn at random, not picked."""
    drawn = random.Random(f"card {seed}").sample(range(len(rows)), min(SHOWN, len(rows)))
    return Quotes([(_instruction(rows[i]), [rows[i]["messages"][-1]["content"]]) for i in sorted(drawn)])


def _instruction(row: Mapping[str, Any]) -> str:
    return str(next(turn["content"] for turn in row["messages"] if turn["role"] == "user"))


# ------------------------------------------------------------------------------------------------------------- writing


def _markdown(block: str | Table | Quotes) -> str:
    if isinstance(block, str):
        return block + "\n"
    if isinstance(block, Table):
        lines = [_line(block.head), _line(["---", *["---:"] * (len(block.head) - 1)])]
        return "\n".join([*lines, *map(_line, block.rows)]) + "\n"
    parts = [f"{block.summary}:\n"] if block.summary else []
    for above, texts in block.texts:
        parts.append("- " + _plain(one_line(above, _CHARACTERS)))
        parts += [f"    - {_plain(one_line(text, _CHARACTERS))}" for text in texts]
    return "\n".join(parts) + "\n"


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(_plain(' '.join(str(cell).split())) for cell in cells)} |"


def _plain(text: str) -> str:
    """A text that Markdown shows as it is."""
    for mark in "\\`*_<>[]|#$":
        text = text.replace(mark, f"\\{mark}")
    return text


def _html(block: str | Table | Quotes) -> str:
    if isinstance(block, str):
        return f"<p>{escape(block)}</p>"
    if isinstance(block, Table):
        return table([*map(escape, block.head)], [[escape(cell) for cell in row] for row in block.rows])
    texts = "".join(
        article(above, [f'<p class="text" dir="auto">{escape(text)}</p>' for text in texts])
        for above, texts in block.texts
    )
    return details(block.summary, texts) if block.summary else texts
