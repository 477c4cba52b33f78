"""The official client, unchanged, and its types."""

import json

import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who was Ben?"}]


@pytest.fixture(scope="module")
def official(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def strictly(kind, found):
    """Checks an answer by its type, which must know every field."""
    content = found.model_dump()
    if kind is Completion:  # null where OpenAI sends null too, although its types do not say so
        for choice in content["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
            if choice["logprobs"] is not None:
                lists = choice["logprobs"]
                lists["token_logprobs"] = [0.0 if p is None else p for p in lists["token_logprobs"]]
                lists["top_logprobs"] = [{} if top is None else top for top in lists["top_logprobs"]]
    made = kind.model_validate(content, strict=True)
    assert set(made.model_extra) <= {"context_length"}
    assert not [choice.model_extra for choice in getattr(made, "choices", ()) if choice.model_extra]


def test_models(official):
    models = official.models.list().data
    assert [model.id for model in models] == ["ppo", "sft", "base"]
    for model in models:
        strictly(Model, model)
    assert official.models.retrieve("sft").id == "sft"
    with pytest.raises(openai.NotFoundError, match="did you mean sft") as caught:
        official.models.retrieve("stf")
    assert caught.value.code == "model_not_found"


def test_a_chat(official):
    found = official.chat.completions.create(
        model="sft", messages=MESSAGES, max_completion_tokens=8, n=2, seed=1, logprobs=True, top_logprobs=3
    )
    strictly(ChatCompletion, found)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage.completion_tokens == 16 and found.usage.total_tokens == found.usage.prompt_tokens + 16
    for choice in found.choices:
        assert choice.finish_reason == "length" and len(choice.logprobs.content) == 8
        for entry in choice.logprobs.content:
            assert len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].logprob >= entry.logprob - 1e-6
            assert bytes(entry.bytes).decode(errors="replace") == entry.token or entry.token.startswith("bytes:")
        joined = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode(errors="replace")
        assert joined.lstrip() == choice.message.content.lstrip()


def test_a_streamed_chat(official):
    body = dict(model="sft", messages=MESSAGES, max_tokens=8, seed=1, logprobs=True, top_logprobs=2)
    whole = official.chat.completions.create(**body)
    chunks = list(official.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        strictly(ChatCompletionChunk, chunk)
    *parts, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == "length"
    entries = [entry for part in parts if part.choices[0].logprobs for entry in part.choices[0].logprobs.content]
    assert [entry.model_dump() for entry in entries] == [e.model_dump() for e in whole.choices[0].logprobs.content]


def test_completions(official):
    found = official.completions.create(
        model="sft", prompt=["Once upon", "Ben"], max_tokens=4, n=2, seed=1, echo=True, logprobs=2
    )
    strictly(Completion, found)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert all(choice.text.startswith(["Once upon", "Ben"][i // 2]) for i, choice in enumerate(found.choices))
    alone = official.completions.create(model="sft", prompt="Ben", max_tokens=4, n=2, seed=1, echo=True, logprobs=2)
    assert [c.text for c in alone.choices] == [c.text for c in found.choices[2:]]
    for choice in found.choices:
        names = choice.logprobs.tokens
        assert len(names) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.top_logprobs)
        assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
        starts = choice.logprobs.text_offset
        for name, start, end in zip(names, starts, [*starts[1:], len(choice.text)], strict=True):
            assert name in ("<s>", choice.text[start:end], f" {choice.text[start:end]}")


def test_a_streamed_completion(official):
    body = dict(model="sft", prompt="Once", max_tokens=6, seed=3, echo=True, logprobs=1)
    whole = official.completions.create(**body)
    chunks = list(official.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        strictly(Completion, chunk)
    *parts, last = chunks
    assert last.usage == whole.usage
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    tokens = [token for part in parts for token in part.choices[0].logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens


def test_errors_are_those_that_the_client_knows(official):
    with pytest.raises(openai.BadRequestError) as caught:
        official.chat.completions.create(model="sft", messages=MESSAGES, temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="no field tools"):
        official.chat.completions.create(
            model="sft", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match="512") as caught:
        official.completions.create(model="sft", prompt="a", max_tokens=600)
    assert caught.value.code == "context_length_exceeded"


def test_what_lm_eval_sends_for_log_likelihoods(client, served):
    """``local-completions`` sends token ids with ``echo``, and reads the log-probs behind the context's."""
    import torch

    ids = [served.tokenizer(text)["input_ids"] for text in ("Once upon a time there was", "Ben was a big dog")]
    body = {
        "model": "base",
        "prompt": ids,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = client.post("/v1/completions", json=body).json()["choices"]
    for choice, row in zip(choices, ids, strict=True):
        logits = served.policy.transformer(torch.tensor([row])).logits[0].log_softmax(-1)
        want = logits[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
        assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(want, abs=1e-4)
        best = logits[:-1].max(-1).values.tolist()
        tops = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][1:-1]]
        assert tops == pytest.approx(best, abs=1e-4)
        pairs = zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True)
        greedy = [token == max(top.values()) for token, top in list(pairs)[1:-1]]
        assert greedy == [token == best for token, best in zip(row[1:], logits[:-1].argmax(-1).tolist(), strict=True)]
    scored = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()
    assert scored["choices"][0]["logprobs"]["tokens"] == choices[0]["logprobs"]["tokens"][:-1]
    assert scored["usage"]["completion_tokens"] == 0


def test_coatis_routes(client):
    history = [{"instruction": "Hi", "response": "Hello"}, {"instruction": "Who was Ben?", "response": ""}]
    body = {"history": history, "max_new_tokens": 20, "top_k": 1}
    whole = client.post("/generate", json=body)
    assert isinstance(whole.json(), str) and whole.json()
    lines = client.post("/generate/stream", json=body).text.split("\n\n")
    names = [line.split("\n")[0] for line in lines if line]
    assert names == ["event: generate"] * (len(names) - 1) + ["event: end"]
    texts = ["\n".join(part.removeprefix("data: ") for part in line.split("\n")[1:]) for line in lines if line]
    assert "".join(texts) == whole.json()
    for change in ({"max_new_tokens": 513}, {"top_k": 0}, {"top_p": 1.0}, {"temperature": 1.0}, {"history": []},
                   {"history": history[:1]}, {"stream": True}):  # fmt: skip
        refused = client.post("/generate", json={**body, **change})
        assert refused.status_code == 400, change
        assert json.loads(refused.text)["error"]["message"]
