"""What does not fit into the context."""

from types import SimpleNamespace

import pytest
from in_loop import in_loop

from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.truncation import fit


def turns(*texts):
    """A system prompt, then turns of user and assistant."""
    roles = ["system", *["user", "assistant"] * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@in_loop
async def test_too_long_says_both_numbers(running):
    async with running() as app:
        prompt = "word " * 300
        found = (await app.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})).json()["error"]
        length = len(app.server.find(None).encode(prompt))
        assert (found["code"], found["param"]) == ("context_length_exceeded", "prompt")
        assert f" 512 tokens, but the request has {length} tokens of the prompt" in found["message"]
        body = {"messages": turns("Be kind.", "Hi"), "max_completion_tokens": 500}
        found = (await app.client.post("/v1/chat/completions", json=body)).json()["error"]
        length = len(app.server.find(None).encode(body["messages"]))
        assert (found["code"], found["param"]) == ("context_length_exceeded", "messages")
        assert f"{length} tokens of the prompt and 500 of the answer ({length + 500} in all)" in found["message"]
        body["max_completion_tokens"] = 512 - length
        assert (await app.client.post("/v1/chat/completions", json={**body, "temperature": 0})).status_code == 200
        echo = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
        found = (await app.client.post("/v1/completions", json=echo)).json()["error"]
        assert found["code"] == "context_length_exceeded"


@in_loop
async def test_truncation_drops_the_oldest_turns_and_says_how_many(running):
    long = "word " * 60
    messages = turns("Be kind.", long + "1", long + "2", long + "3", long + "4", "last")
    async with running() as app:
        body = {"messages": messages, "max_tokens": 8, "temperature": 0}
        refused = await app.client.post("/v1/chat/completions", json=body)
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        found = (await app.client.post("/v1/chat/completions", json={**body, "truncation": "auto"})).json()
        assert found["dropped_messages"] == 2
        rest = [messages[0], *messages[3:]]
        plain = (await app.client.post("/v1/chat/completions", json={**body, "messages": rest})).json()
        assert found["choices"] == plain["choices"] and found["usage"] == plain["usage"]
        assert "dropped_messages" not in plain
        streamed = await app.client.post("/v1/chat/completions", json={**body, "truncation": "auto", "stream": True})
        assert '"dropped_messages":2' in streamed.text.split("\n")[0]
        alone = {**body, "messages": turns("Be kind.", "word " * 600), "truncation": "auto"}
        refused = await app.client.post("/v1/chat/completions", json=alone)
        assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("space, kept", [(100, "sabcde"), (17, "scde"), (12, "scde"), (11, "se"), (4, "se"), (1, "se")])
def test_what_is_left_begins_with_a_question(space, kept):
    """Each turn is 4 tokens long here, and the system prompt 0."""
    made = SimpleNamespace(context=space + 5, encode=lambda m: [0] * (4 * (len(m) - 1)))
    messages = turns(*"sabcde")
    left, ids, dropped = fit(made, messages, 5)
    assert "".join(turn["content"] for turn in left) == kept
    assert dropped == 6 - len(kept) and len(ids) == 4 * (len(kept) - 1)
    assert isinstance(made, SimpleNamespace) and Served


def test_a_conversation_that_ends_with_the_assistant_keeps_that_turn():
    made = SimpleNamespace(context=10, encode=lambda m: [0] * (4 * len(m)))
    messages = turns("s", "a", "b")[1:]
    left, _, dropped = fit(made, messages, 5)
    assert [turn["content"] for turn in left] == ["b"] and dropped == 1
