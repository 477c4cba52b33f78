"""The rows that come with the package: well formed, distinct, varied, and counted rightly in their card."""

import ast
import importlib.resources
import json
import re
import unicodedata
from collections import Counter

import pytest

from lightning_rlhf.data.formats import to_conversation
from lightning_rlhf.data.instruction import InstructionDataModule
from lightning_rlhf.data.preference_formats import to_preference
from lightning_rlhf.data.sources import BadRows, bundled_seeds, read_rows

FOLDER = importlib.resources.files("lightning_rlhf.data") / "bundled"
LANGUAGES = ("en", "zh")
KEYS = {
    "instructions": ["messages", "lang", "category"],
    "seeds": ["messages", "lang", "category"],
    "preferences": ["prompt", "chosen", "rejected", "reason", "lang", "source"],
}
CATEGORIES = (
    *("question", "rewriting", "summary", "classification", "extraction", "translation", "code"),
    *("arithmetic", "reasoning", "planning", "writing", "refusal", "dialogue"),
)
REASONS = ("correct", "instruction", "honest", "safe", "concise")
CJK = re.compile(r"[\u4e00-\u9fff]")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EACH = pytest.mark.parametrize(("kind", "lang"), [(kind, lang) for kind in KEYS for lang in LANGUAGES])
EACH_LANGUAGE = pytest.mark.parametrize("lang", LANGUAGES)


def lines(kind: str, lang: str) -> list[str]:
    text = (FOLDER / f"{kind}.{lang}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")  # splitlines would also split at U+2028, which JSON may hold


def rows(kind: str, lang: str) -> list[dict]:
    return [json.loads(line) for line in lines(kind, lang)]


def messages(row: dict) -> list[dict]:
    return row["messages"] if "messages" in row else row["prompt"]


def answers(row: dict) -> list[str]:
    if "chosen" in row:
        return [row["chosen"], row["rejected"]]
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def roles(row: dict) -> list[str]:
    return [message["role"] for message in messages(row)]


def first_user_turn(row: dict) -> str:
    return next(message["content"] for message in messages(row) if message["role"] == "user")


def words(text: str, lang: str) -> set[str]:
    """Words of English, pairs of characters of Chinese."""
    if lang == "en":
        return set(re.findall(r"[a-z0-9']+", text.lower()))
    text = re.sub(r"\W", "", text)
    return {text[i : i + 2] for i in range(len(text) - 1)}


def longer(row: dict) -> bool:
    return len(row["chosen"]) > len(row["rejected"])


def table(kind: str) -> str:
    """The table of the data card, from the rows; in brackets, in how many of them the chosen answer is the longer."""
    found = {lang: rows(kind, lang) for lang in LANGUAGES}

    def count(part: list[dict]) -> str:
        return f"{len(part)} ({sum(map(longer, part))})" if kind == "preferences" else f"{len(part)}"

    key, groups = ("reason", REASONS) if kind == "preferences" else ("category", CATEGORIES)
    body = {name: [count([r for r in found[lang] if r[key] == name]) for lang in LANGUAGES] for name in groups}
    body["**all**"] = [count(part) for part in found.values()]
    if kind == "preferences":
        body["chosen is longer"] = [f"{sum(map(longer, part)) / len(part):.1%}" for part in found.values()]
    body["with a system prompt"] = [sum("system" in roles(row) for row in part) for part in found.values()]
    body["with several user turns"] = [sum(roles(row).count("user") > 1 for row in part) for part in found.values()]
    head = ["| | en | zh |", "| --- | ---: | ---: |"]
    return "\n".join(head + [f"| {name} | {en} | {zh} |" for name, (en, zh) in body.items()])


@EACH
def test_every_row_has_the_schema(kind, lang):
    found = lines(kind, lang)
    assert len(found) >= {"instructions": 100, "seeds": 60, "preferences": 70}[kind]
    for number, line in enumerate(found, 1):
        row = json.loads(line)
        assert line == json.dumps(row, ensure_ascii=False), f"line {number} is written in another way"
        assert list(row) == KEYS[kind] and row["lang"] == lang, f"line {number}"
        assert row.get("category", "code") in CATEGORIES and row.get("reason", "safe") in REASONS, f"line {number}"
        assert row.get("source", "bundled") == "bundled", f"line {number}"
        turns = roles(row)[1:] if roles(row)[0] == "system" else roles(row)
        ends = ["user"] if kind == "preferences" else []
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2) + ends, f"line {number}: {turns}"
        assert all(list(message) == ["role", "content"] for message in messages(row)), f"line {number}"
        for text in (*(message["content"] for message in messages(row)), *answers(row)):
            assert text and text == text.strip(), f"line {number}"


@EACH
def test_rows_are_what_their_format_says(kind, lang):
    for row in rows(kind, lang):
        if kind != "preferences":
            assert to_conversation(row).messages == tuple(row["messages"])
            continue
        preference = to_preference(row)
        assert preference.prompt == tuple(row["prompt"]) and preference.pairs == ((0, 1),)
        assert [answer[0]["content"] for answer in preference.answers] == answers(row)
        assert (preference.source, preference.lang) == ("bundled", lang)


def test_first_user_turns_are_distinct():
    firsts = Counter(first_user_turn(row) for kind in KEYS for lang in LANGUAGES for row in rows(kind, lang))
    assert [turn for turn, count in firsts.items() if count > 1] == []


def test_questions_are_short_distinct_and_in_no_other_file():
    found = rows("questions", "en")
    texts = [row["prompt"] for row in found]
    assert found == [{"prompt": text, "lang": "en"} for text in texts]
    assert f"holds {len(set(texts))} short questions" in (FOLDER / "README.md").read_text(encoding="utf-8")
    assert len(set(texts)) == len(texts)
    assert all(re.fullmatch(r"(What|Why|How) [^?]{4,50}\?", text) for text in texts)
    others = {message["content"] for kind in KEYS for row in rows(kind, "en") for message in messages(row)}
    assert others.isdisjoint(texts)


@EACH_LANGUAGE
def test_no_seed_is_nearly_another_row(lang):
    seeds = [first_user_turn(row) for row in rows("seeds", lang)]
    others = [first_user_turn(row) for kind in KEYS if kind != "seeds" for row in rows(kind, lang)]
    others += [row["prompt"] for row in rows("questions", "en")]
    for i, seed in enumerate(seeds):
        mine = words(seed, lang)
        for other in others + seeds[:i]:
            theirs = words(other, lang)
            assert len(mine & theirs) < len(mine | theirs) / 3, f"{seed!r} is nearly {other!r}"


@EACH_LANGUAGE
def test_seeds_and_instructions_are_found_together(lang):
    found = [row.value for row in read_rows(bundled_seeds(lang), BadRows())]
    assert found == rows("instructions", lang) + rows("seeds", lang) and len(found) == 200
    spread = Counter(row["category"] for row in rows("seeds", lang))
    assert set(spread) == set(CATEGORIES) and set(spread.values()) == {5, 6}


def test_another_language_has_no_seeds():
    with pytest.raises(ValueError, match=r"no seeds in the language 'de'\. Choose en or zh"):
        bundled_seeds("de")


def test_training_on_bundled_leaves_the_seeds_out(tiny_tokenizer):
    data = InstructionDataModule("bundled", tokenizer=tiny_tokenizer, max_length=100_000)
    data.setup("fit")
    assert sum(map(len, data._rows.values())) == sum(len(rows("instructions", lang)) for lang in LANGUAGES)


@EACH_LANGUAGE
def test_groups_are_spread(lang):
    counts = Counter(row["category"] for row in rows("instructions", lang))
    assert len(counts) >= 8 and max(counts.values()) <= counts.total() / 8
    counts = Counter(row["reason"] for row in rows("preferences", lang))
    assert set(counts) == set(REASONS) and min(counts.values()) >= 10


@EACH
def test_rows_are_in_their_language(kind, lang):
    for number, row in enumerate(rows(kind, lang), 1):
        if row.get("category") == "translation" and lang == "en":
            continue
        texts = [message["content"] for message in messages(row)]
        assert any(map(CJK.search, texts)) == (lang == "zh"), f"line {number}"
        assert lang == "zh" or not any(map(CJK.search, answers(row))), f"line {number}"


@EACH
def test_python_in_answers_compiles(kind, lang):
    found = [answer for row in rows(kind, lang) for answer in answers(row)]
    blocks = [block for answer in found for block in PYTHON_BLOCK.findall(answer)]
    assert len(blocks) == sum(answer.count("```python") for answer in found) > 0
    for block in blocks:
        ast.parse(block)


@pytest.mark.parametrize("kind", KEYS)
def test_the_card_has_the_right_counts(kind):
    assert table(kind) in (FOLDER / "README.md").read_text(encoding="utf-8"), f"The table should be:\n{table(kind)}"


# -------------------------------------------------------------------------------------------------------- preferences


@EACH_LANGUAGE
def test_answers_are_distinct_and_hold_no_control_characters(lang):
    found = rows("preferences", lang)
    assert all(row["chosen"] != row["rejected"] for row in found)
    assert len({row["chosen"] for row in found}) == len(found)
    for number, row in enumerate(found, 1):
        for text in (*(message["content"] for message in messages(row)), *answers(row)):
            odd = {character for character in text if unicodedata.category(character)[0] == "C"} - {"\n"}
            assert not odd, f"line {number}: {odd}"


@EACH_LANGUAGE
def test_length_does_not_give_the_better_answer_away(lang):
    """A reward model that learns 'longer is better' must lose, and 'shorter is better' must win little."""
    found = rows("preferences", lang)
    assert all(len(row["chosen"]) != len(row["rejected"]) for row in found)
    assert 0.4 <= sum(map(longer, found)) / len(found) <= 0.5
    for reason in REASONS:
        share = [longer(row) for row in found if row["reason"] == reason]
        if reason == "concise":
            assert not any(share)
        else:
            assert 0.4 <= sum(share) / len(share) <= 0.5, reason
