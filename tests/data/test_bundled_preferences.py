"""The preference rows that come with the package: well formed, distinct, balanced, counted rightly in their card."""

import ast
import importlib.resources
import json
import re
import unicodedata
from collections import Counter

import pytest

from lightning_rlhf.data.formats import to_conversation
from lightning_rlhf.data.preference_formats import to_preference

FOLDER = importlib.resources.files("lightning_rlhf.data") / "bundled"
LANGUAGES = ("en", "zh")
REASONS = ("correct", "instruction", "honest", "safe", "concise")
CJK = re.compile(r"[\u4e00-\u9fff]")
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def lines(name: str) -> list[str]:
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text.endswith("\n")
    return text[:-1].split("\n")  # splitlines would also split at U+2028, which JSON may hold


def rows(lang: str) -> list[dict]:
    return [json.loads(line) for line in lines(f"preferences.{lang}.jsonl")]


def texts(row: dict) -> list[str]:
    return [*(message["content"] for message in row["prompt"]), row["chosen"], row["rejected"]]


def roles(row: dict) -> list[str]:
    return [message["role"] for message in row["prompt"]]


def longer(row: dict) -> bool:
    return len(row["chosen"]) > len(row["rejected"])


def table() -> str:
    """The table of the data card, from the rows; in brackets, in how many of them the chosen answer is the longer."""
    found = {lang: rows(lang) for lang in LANGUAGES}
    body = {}
    for reason in REASONS:
        parts = [[row for row in found[lang] if row["reason"] == reason] for lang in LANGUAGES]
        body[reason] = [f"{len(part)} ({sum(map(longer, part))})" for part in parts]
    body["**all**"] = [f"{len(part)} ({sum(map(longer, part))})" for part in found.values()]
    body["chosen is longer"] = [f"{sum(map(longer, part)) / len(part):.1%}" for part in found.values()]
    body["with a system prompt"] = [sum("system" in roles(row) for row in part) for part in found.values()]
    body["with several user turns"] = [sum(roles(row).count("user") > 1 for row in part) for part in found.values()]
    head = ["| | en | zh |", "| --- | ---: | ---: |"]
    return "\n".join(head + [f"| {name} | {en} | {zh} |" for name, (en, zh) in body.items()])


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_row_has_the_schema(lang):
    found = lines(f"preferences.{lang}.jsonl")
    assert len(found) >= 70
    for number, line in enumerate(found, 1):
        row = json.loads(line)
        assert line == json.dumps(row, ensure_ascii=False), f"line {number} is written in another way"
        assert list(row) == ["prompt", "chosen", "rejected", "reason", "lang", "source"], f"line {number}"
        assert (row["lang"], row["source"]) == (lang, "bundled"), f"line {number}"
        assert row["reason"] in REASONS, f"line {number}"
        for message in row["prompt"]:
            assert list(message) == ["role", "content"], f"line {number}"
        turns = roles(row)[1:] if roles(row)[0] == "system" else roles(row)
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"], f"line {number}: {turns}"
        for text in texts(row):
            assert text and text == text.strip(), f"line {number}"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_rows_become_one_pair_each(lang):
    for row in rows(lang):
        preference = to_preference(row)
        assert preference.prompt == tuple(row["prompt"])
        assert [answer[0]["content"] for answer in preference.answers] == [row["chosen"], row["rejected"]]
        assert preference.pairs == ((0, 1),)
        assert (preference.source, preference.lang) == ("bundled", lang)


def test_first_user_turns_are_distinct_and_not_those_of_the_instructions():
    firsts = Counter(to_preference(row).first_user_turn for lang in LANGUAGES for row in rows(lang))
    for lang in LANGUAGES:
        firsts.update(to_conversation(json.loads(line)).first_user_turn for line in lines(f"instructions.{lang}.jsonl"))
    assert [turn for turn, count in firsts.items() if count > 1] == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_answers_are_distinct(lang):
    assert all(row["chosen"] != row["rejected"] for row in rows(lang))
    counts = Counter(row["chosen"] for row in rows(lang))
    assert [answer for answer, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_texts_hold_no_control_characters(lang):
    for number, row in enumerate(rows(lang), 1):
        for text in texts(row):
            odd = {character for character in text if unicodedata.category(character)[0] == "C"} - {"\n"}
            assert not odd, f"line {number}: {odd}"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_length_does_not_give_the_better_answer_away(lang):
    """A reward model that learns 'longer is better' must lose, and 'shorter is better' must win little."""
    found = rows(lang)
    assert all(len(row["chosen"]) != len(row["rejected"]) for row in found)
    assert 0.4 <= sum(map(longer, found)) / len(found) <= 0.5
    for reason in REASONS:
        share = [longer(row) for row in found if row["reason"] == reason]
        if reason == "concise":
            assert not any(share)
        else:
            assert 0.4 <= sum(share) / len(share) <= 0.5, reason


@pytest.mark.parametrize("lang", LANGUAGES)
def test_reasons_are_spread(lang):
    counts = Counter(row["reason"] for row in rows(lang))
    assert set(counts) == set(REASONS)
    assert min(counts.values()) >= 10


def test_prompts_are_in_their_language():
    for lang in LANGUAGES:
        for number, row in enumerate(rows(lang), 1):
            assert any(CJK.search(message["content"]) for message in row["prompt"]) == (lang == "zh"), f"line {number}"
            assert lang == "zh" or not any(map(CJK.search, texts(row))), f"line {number}"


@pytest.mark.parametrize("lang", LANGUAGES)
def test_python_in_answers_compiles(lang):
    answers = [row[side] for row in rows(lang) for side in ("chosen", "rejected")]
    blocks = [block for answer in answers for block in PYTHON_BLOCK.findall(answer)]
    assert len(blocks) == sum(answer.count("```python") for answer in answers) > 0
    for block in blocks:
        ast.parse(block)


def test_the_card_has_the_right_counts():
    assert table() in (FOLDER / "README.md").read_text(encoding="utf-8"), f"The table should be:\n{table()}"
