"""Texts that are far too long are known by how they begin."""

import random

import pytest
from exported import STORIES
from in_loop import in_loop

from lightning_rlhf.data.tokens import encode_prompt
from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.serving.lengths import far_over

CONTEXT = 64
TEXTS = {
    "words": "once upon a time ",
    "one letter": "a",
    "spaces": " ",
    "lines": "\n",
    "Chinese": "今天天气很好。",
    "emoji": "🙂",
    "unknown": "\u0007\u0301",
    "words and spaces": "word" + " " * 40,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(STORIES)


@pytest.mark.parametrize("piece", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("characters", [10, 500, 1025, 5000, 40_000])
def test_what_is_refused_is_too_long_and_what_fits_is_not_refused(tokenizer, piece, characters):
    text = (piece * characters)[:characters]
    length = len(encode_prompt(tokenizer, text))
    cuts = sorted(random.Random(characters).randrange(characters) for _ in range(3))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, characters], strict=True)]
    for texts in ([text], parts, [text, *[""] * 10_000]):
        found = far_over(tokenizer, texts, CONTEXT)
        assert not found or length > 2 * CONTEXT
        assert found or length <= 2 * CONTEXT or characters <= 16 * CONTEXT or piece.count(" ") > 10


def test_a_long_text_is_not_tokenized(tokenizer, monkeypatch):
    read = []
    kind = type(tokenizer)
    whole = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, text, **k: (read.append(len(text)), whole(self, text, **k))[1])
    assert far_over(tokenizer, ["word " * 1_000_000], CONTEXT)
    assert not far_over(tokenizer, ["word"], CONTEXT)
    assert read == [16 * CONTEXT]


@in_loop
async def test_every_route_refuses_it(running, monkeypatch):
    long = "word " * 20_000
    turn = {"role": "user", "content": long}
    bodies = [
        ("/v1/completions", {"prompt": long}),
        ("/v1/completions", {"prompt": long, "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/completions", {"prompt": [5] * 20_000}),
        ("/v1/chat/completions", {"messages": [turn]}),
        ("/v1/chat/completions", {"messages": [turn], "truncation": "auto"}),
    ]
    async with running() as app:
        served = app.server.find(None)
        monkeypatch.setattr("lightning_rlhf.serving.models.encode_prompt", None)  # a call would be a 500
        for path, body in bodies:
            found = await app.client.post(path, json=body)
            assert found.status_code == 400
            error = found.json()["error"]
            assert error["code"] == "context_length_exceeded"
            assert f"{served.context} tokens" in error["message"]
            assert ("more than 1024 tokens" in error["message"]) == (body.get("prompt") != [5] * 20_000)


@in_loop
async def test_a_long_turn_is_dropped_without_being_tokenized(running):
    messages = [
        {"role": "user", "content": "word " * 20_000},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Tell a story."},
    ]
    async with running() as app:
        body = {"messages": messages, "truncation": "auto", "max_tokens": 2, "temperature": 0}
        found = await app.client.post("/v1/chat/completions", json=body)
        alone = await app.client.post("/v1/chat/completions", json={**body, "messages": messages[2:]})
    assert found.json()["dropped_messages"] == 2
    assert found.json()["choices"] == alone.json()["choices"]
