"""Prompts: what they show, and that a change of wording changes the version."""

import hashlib
import json

import pytest

from lightning_rlhf.collection import prompts
from lightning_rlhf.collection.parse import parse_list

#: Hash of all templates by version. A changed template needs a new version, and a line here.
KNOWN = {"1": "1a43c28db3842f47"}


@pytest.mark.parametrize("lang", prompts.LANGUAGES)
def test_a_list_shows_examples_and_asks_for_the_next_numbers(lang):
    asked = prompts.ask_for_list(lang, "summary", ["One.\n\nTwo.", "Three."], 5)
    [message] = asked.messages
    assert message["content"].endswith("1. One.\nTwo.\n2. Three.")
    assert "3" in message["content"] and "7" in message["content"]
    assert prompts.KINDS["summary"][lang] in message["content"] and (asked.first, asked.count) == (None, 5)
    begun = prompts.ask_for_list(lang, "", ["One.", "Three."], 5, continues=True)
    assert begun.messages[1] == {"role": "assistant", "content": "1. One.\n2. Three.\n3."}
    assert "One." not in begun.messages[0]["content"] and begun.first == 3 and begun.extra == prompts.CONTINUE
    assert [piece.text for piece in parse_list(" Four.\n4. Five.", begun.first)] == ["Four.", "Five."]


@pytest.mark.parametrize("lang", prompts.LANGUAGES)
def test_every_kind_and_way_has_its_words(lang):
    for kind in (*prompts.KINDS, "my own kind"):
        asked = prompts.ask_for_list(lang, kind, ["One."], 5).messages[0]["content"]
        assert prompts.KINDS.get(kind, {}).get(lang, kind) in asked and "{" not in asked
    for way in prompts.WAYS:
        [message] = prompts.ask_to_evolve(lang, "Name {a} river.", way).messages
        assert prompts.WAYS[way][lang] in message["content"] and "Name {a} river." in message["content"]
    system, user = prompts.open_turn(lang, "code").messages
    assert prompts.KINDS["code"][lang] in system["content"] and user == {"role": "user", "content": ""}
    assert prompts.ask_for_answer(lang, "Why?")[-1] == {"role": "user", "content": "Why?"}


def test_a_changed_template_has_a_new_version():
    templates = {name: value for name, value in vars(prompts).items() if name.isupper() and name != "VERSION"}
    digest = hashlib.sha256(json.dumps(templates, sort_keys=True).encode()).hexdigest()[:16]
    assert KNOWN[prompts.VERSION] == digest, f"raise prompts.VERSION, and write {digest} here"
