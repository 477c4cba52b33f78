"""The instruction rows that come with the package: well formed, distinct, varied, and counted rightly in their card."""

import ast
import importlib.resources
import json
import re
from collections import Counter

import pytest

from lightning_rlhf.data.formats import to_conversation

FOLDER = importlib.resources.files("lightning_rlhf.data") / "bundled"
LANGUAGES = ("en", "zh")
CATEGORIES = (
    *("question", "rewriting", "summary", "classification", "extraction", "translation", "code"),
    *("arithmetic", "reasoning", "planning", "writing", "refusal", "dialogue"),
)
CJK = re.compile(r"[\u4e00-\u9fff]")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines(lang: str) -> list[str]:
    text = (FOLDER / f"instructions.{lang}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")  # splitlines would also split at U+2028, which JSON may hold


def rows(lang: str) -> list[dict]:
    return [json.loads(line) for line in lines(lang)]


def answers(row: dict) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def table() -> str:
    """The table of the data card, from the rows."""
    by_lang = {lang: rows(lang) for lang in LANGUAGES}
    counts = {lang: Counter(row["category"] for row in found) for lang, found in by_lang.items()}
    body = {category: [counts[lang][category] for lang in LANGUAGES] for category in CATEGORIES}
    body["**all**"] = [len(by_lang[lang]) for lang in LANGUAGES]
    body["with a system prompt"] = [
        sum(row["messages"][0]["role"] == "system" for row in by_lang[lang]) for lang in LANGUAGES
    ]
    body["with several user turns"] = [sum(len(answers(row)) > 1 for row in by_lang[lang]) for lang in LANGUAGES]
    head = ["| | en | zh |", "| --- | ---: | ---: |"]
    return "\n".join(head + [f"| {name} | {en} | {zh} |" for name, (en, zh) in body.items()])


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_row_has_the_schema(lang):
    found = lines(lang)
    assert len(found) >= 100
    for number, line in enumerate(found, 1):
        row = json.loads(line)
        assert line == json.dumps(row, ensure_ascii=False), f"line {number} is written in another way"
        assert list(row) == ["messages", "lang", "category"], f"line {number}"
        assert row["lang"] == lang, f"line {number}"
        assert row["category"] in CATEGORIES, f"line {number}"
        for message in row["messages"]:
            assert list(message) == ["role", "content"], f"line {number}"
            assert message["content"] and message["content"] == message["content"].strip(), f"line {number}"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_roles_alternate_and_the_assistant_ends(lang):
    for number, row in enumerate(rows(lang), 1):
        roles = [message["role"] for message in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns and turns == ["user", "assistant"] * (len(turns) // 2), f"line {number}: {roles}"
        assert to_conversation(row).messages == tuple(row["messages"])


def test_first_user_turns_are_distinct_across_languages():
    firsts = Counter(to_conversation(row).first_user_turn for lang in LANGUAGES for row in rows(lang))
    assert [turn for turn, count in firsts.items() if count > 1] == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_categories_are_spread(lang):
    counts = Counter(row["category"] for row in rows(lang))
    assert len(counts) >= 8
    assert max(counts.values()) <= len(rows(lang)) / 8


def test_rows_are_in_their_language():
    for lang in LANGUAGES:
        for number, row in enumerate(rows(lang), 1):
            chinese = any(CJK.search(message["content"]) for message in row["messages"])
            if lang == "zh" or row["category"] != "translation":
                assert chinese == (lang == "zh"), f"line {number} of {lang}"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_python_in_answers_compiles(lang):
    blocks = [block for row in rows(lang) for answer in answers(row) for block in PYTHON_BLOCK.findall(answer)]
    fences = sum(answer.count("```python") for row in rows(lang) for answer in answers(row))
    assert len(blocks) == fences > 0
    for block in blocks:
        ast.parse(block)


def test_the_card_has_the_right_counts():
    assert table() in (FOLDER / "README.md").read_text(encoding="utf-8"), f"The table should be:\n{table()}"
