"""Many requests at once over HTTP: each answer is that of the request alone."""

import asyncio
import random

import httpx
import pytest
from in_loop import in_loop, streamed

NAMES = ("Tim", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Lucy")
STOPS = (" the", "day", ".", "a", " was ", "e ")


def mixed(count, seed=0):
    """Requests of all kinds: (path, body)."""
    rng = random.Random(seed)
    for i in range(count):
        text = f"Once upon a time, {rng.choice(NAMES)} and {rng.choice(NAMES)} went" * rng.choice((1, 1, 1, 6))
        body = {
            "model": rng.choice(("base", "sft", "ppo")),
            "max_tokens": rng.randint(4, 40),
            "seed": i,
            "temperature": rng.choice((0, 0.5, 1, 3)),
            **rng.choice(({}, {"top_p": 0.9}, {"top_k": 8}, {"min_p": 0.05}, {"repetition_penalty": 1.3})),
            **rng.choice(({}, {"presence_penalty": 1.0}, {"frequency_penalty": 0.5}, {"logit_bias": {"290": 3.0}})),
            **rng.choice(({}, {"stop": rng.choice(STOPS)}, {"stop": list(STOPS[:2])})),
            **rng.choice(({}, {}, {"n": 2})),
        }
        if i % 2:
            yield "/v1/completions", {**body, "prompt": text, **rng.choice(({}, {"logprobs": 2}, {"echo": True}))}
        else:
            messages = [{"role": "user", "content": text}]
            yield "/v1/chat/completions", {**body, "messages": messages, **rng.choice(({}, {"logprobs": True}))}


async def plain(client, path, body):
    """(text, what ended it, tokens of the log-probs) of each choice."""
    found = await client.post(path, json=body)
    assert found.status_code == 200, found.text
    return [
        (
            choice["text"] if "text" in choice else choice["message"]["content"],
            choice["finish_reason"],
            tokens_of(choice["logprobs"]),
        )
        for choice in found.json()["choices"]
    ]


def tokens_of(logprobs):
    if logprobs is None:
        return []
    return logprobs["tokens"] if "tokens" in logprobs else [entry["token"] for entry in logprobs["content"]]


async def stream(client, path, body):
    """The same from a stream."""
    found = {i: ["", None, []] for i in range(body.get("n", 1))}
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        lines = [line async for line in response.aiter_lines()]
    for event in streamed(lines):
        for choice in event["choices"]:
            mine = found[choice["index"]]
            mine[0] += choice["text"] if "text" in choice else choice["delta"].get("content", "")
            mine[1] = choice["finish_reason"] or mine[1]
            mine[2] += tokens_of(choice["logprobs"])
    return [tuple(mine) for mine in found.values()]


@in_loop
async def test_64_at_once_equal_each_alone(server):
    requests = list(mixed(64))
    rng = random.Random(1)
    delays = [rng.uniform(0, 1.0) for _ in requests]

    async def join(client, i):
        await asyncio.sleep(delays[i])
        return await (stream if i % 3 else plain)(client, *requests[i])

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        together = await asyncio.gather(*(join(client, i) for i in range(len(requests))))
        alone = [await (plain if i % 3 else stream)(client, *request) for i, request in enumerate(requests)]
    assert together == alone
    assert len({str(answer) for answer in alone}) > 55
    for (_, body), choices in zip(requests, alone, strict=True):
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
        answers = [text.removeprefix(body["prompt"] if body.get("echo") else "") for text, _, _ in choices]
        assert not [text for text in answers for stop in stops if stop in text]


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_string_cuts_what_would_have_come(client, stop):
    body = {"model": "base", "prompt": "Once upon a time", "max_tokens": 60, "seed": 3}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    cut = client.post("/v1/completions", json={**body, "stop": stop}).json()["choices"][0]
    assert stop in whole
    assert (cut["text"], cut["finish_reason"]) == (whole[: whole.index(stop)], "stop")


@in_loop
async def test_no_half_characters_in_hot_streams(server):
    hot = {"model": "base", "prompt": "Once", "max_tokens": 20, "temperature": 3.0, "n": 5, "top_p": 0.99}
    bodies = [{**hot, "seed": i} for i in range(100)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        gate = asyncio.Semaphore(12)

        async def one(how, body):
            async with gate:
                return await how(client, "/v1/completions", body)

        streams = await asyncio.gather(*(one(stream, body) for body in bodies))
        whole = await asyncio.gather(*(one(plain, body) for body in bodies[::4]))
    assert streams[::4] == whole
    assert sum(map(len, streams)) == 500
    texts = "".join(text for answer in streams for text, _, _ in answer)
    assert any(ord(c) > 127 and c != "\ufffd" for c in texts), "no character of several bytes was sampled"
