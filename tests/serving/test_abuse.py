"""Whatever is sent, the answer has the documented form, never status 500, and the next request is right."""

import asyncio
import json
import math
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from in_loop import in_loop
from server_process import serving

from lightning_rlhf.serving.bodies import BODIES
from lightning_rlhf.serving.limits import Limits

GOOD = {
    "/v1/completions": {"prompt": "Ben", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Ben"}], "max_tokens": 2},
    "/v1/rewards": {"conversations": [{"prompt": "Ben", "answers": ["a"]}]},
    "/generate": {"history": [{"instruction": "Ben", "response": ""}], "max_new_tokens": 2},
    "/generate/stream": {"history": [{"instruction": "Ben", "response": ""}], "max_new_tokens": 2},
}

numbers = st.sampled_from([0, 1, -1, 2, 0.5, 1e-320, 1e308, 10**9, 2**63, -(2**63), 10**400, math.nan, math.inf, 3])
texts = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "auto", "user", "text", "\ud800", "\x00", "</s>", "<s>a", "é", "👍"])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
turns = st.fixed_dictionaries(
    {}, optional={"role": st.one_of(st.sampled_from(["system", "user", "assistant", "developer"]), values),
                  "content": st.one_of(texts, values), "name": texts}
)  # fmt: skip
# values that a field might take, so that whole requests are also met
likely = {
    "messages": st.lists(turns, max_size=3),
    "prompt": st.one_of(texts, st.lists(texts, max_size=2), st.lists(st.integers(0, 600), max_size=3)),
    "n": st.integers(0, 5),
    "stop": st.one_of(texts, st.lists(texts, max_size=3)),
    "logit_bias": st.dictionaries(st.integers(-1, 600).map(str), st.floats(-120, 120), max_size=3),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "conversations": st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "prompt": st.one_of(texts, st.lists(turns, max_size=2)),
                "answers": st.lists(texts, max_size=2),
                "messages": st.lists(turns, max_size=3),
                "truncated": st.lists(st.booleans(), max_size=2),
            },
        ),
        max_size=2,
    ),
    "history": st.lists(st.fixed_dictionaries({"instruction": texts, "response": st.just("")}), max_size=2),
    **dict.fromkeys(("stream", "echo", "reward"), st.booleans()),
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens", "top_logprobs", "min_tokens"),
                    st.integers(1, 8)),
    **dict.fromkeys(("temperature", "top_p", "min_p", "frequency_penalty"), st.floats(0.1, 1.1)),
}  # fmt: skip


@st.composite
def requests(draw):
    """A path and a body: a good one in which a few fields are given other values."""
    path = draw(st.sampled_from(sorted(GOOD)))
    body = dict(GOOD[path])
    fields = st.sampled_from(sorted(BODIES[path].model_fields))
    for name in draw(st.lists(st.one_of(fields, fields, fields, texts), max_size=3)):
        fitting = likely.get(name, values)
        body[name] = draw(st.one_of(fitting, fitting, fitting, values))
    return path, body


def check_error(response):
    """The documented form, and no other status than those for the client's faults."""
    assert 400 <= response.status_code < 500, (response.status_code, response.text)
    error = response.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["message"] and "\n" not in error["message"]
    assert isinstance(error["type"], str)
    assert isinstance(error["param"], (str, type(None)))


def test_any_value_of_any_field_is_answered_or_refused(running, run_dir, served):
    from lightning_rlhf.rewards import make_reward
    from lightning_rlhf.serving.scoring import Scorer

    tokenizer = served.tokenizer
    scorer = Scorer("reward", make_reward(str(run_dir / "reward" / "hf" / "best"), tokenizer), tokenizer)
    statuses = {}
    loop = asyncio.new_event_loop()
    context = running(scorer=scorer)
    app = loop.run_until_complete(context.__aenter__())
    seeded = {path: {**GOOD[path], "seed": 1} for path in ("/v1/completions", "/v1/chat/completions")}

    def choices():
        found = [loop.run_until_complete(app.client.post(path, json=body)) for path, body in seeded.items()]
        return [response.json()["choices"] for response in found]

    good = choices()

    @settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(requests())
    def fuzz(request):
        path, body = request
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        found = loop.run_until_complete(asyncio.wait_for(app.client.post(path, content=content, headers=headers), 60))
        statuses[found.status_code] = statuses.get(found.status_code, 0) + 1
        if found.status_code != 200:
            check_error(found)
        elif "event-stream" in found.headers["content-type"]:
            assert b'"error"' not in found.content and b"event: error" not in found.content
        assert app.worker.unfinished == 0

    try:
        fuzz()
        assert choices() == good
    finally:
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.close()
    assert min(statuses[200], statuses[400]) > 40, statuses


def resident(process):
    """MiB of memory that a process holds."""
    [line] = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmRSS" in line]
    return int(line.split()[1]) / 1024


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_level_after_abuse(tmp_path, run_dir):
    """Random requests, and prompts of 10 MB that are let in or not: memory is level after some rounds."""
    with (
        serving(tmp_path / "log", run_dir, "--max-body", 12 * 2**20) as server,
        httpx.Client(base_url=server.url, timeout=600) as client,
    ):

        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(requests())
        def fuzz(request):
            path, body = request
            json_type = {"content-type": "application/json"}
            found = client.post(path, content=json.dumps(body).encode(), headers=json_type)
            if found.status_code != 200:
                check_error(found)

        good = client.post("/v1/completions", json={**GOOD["/v1/completions"], "seed": 1}).json()["choices"]
        held = []
        for number in range(5):
            seed(number)(fuzz)()
            for megabytes, status in ((10, 400), (13, 413)):
                found = client.post("/v1/completions", json={"prompt": "word " * (megabytes * 2**20 // 5)})
                check_error(found)
                assert found.status_code == status
            held.append(resident(server.process))
        again = client.post("/v1/completions", json={**GOOD["/v1/completions"], "seed": 1}).json()["choices"]
    assert again == good
    assert held[-1] < held[1] + 10, held  # one prompt that is kept would be 10 MiB, its tokens a hundred


BODIES_THAT_ARE_NONE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"3",
    b'"a"',
    b"\xff\xfe",
    b"\x00" * 10,
    b"{}",
    b'{"prompt": "a"' * 3,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"prompt": NaN}',
    b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
    b'{"\\ud800": 1}',
    b'{"prompt": "a", "stop": ["\\udfff"]}',
    b'{"prompt": "a", "prompt": 1}',
]


@in_loop
async def test_bodies_that_are_no_request(running):
    async with running() as app:
        for body in BODIES_THAT_ARE_NONE:
            headers = {"content-type": "application/json"}
            check_error(await app.client.post("/v1/completions", content=body, headers=headers))


@in_loop
async def test_half_characters_are_refused_in_every_text(running):
    half = "a\ud800"
    turn = {"role": "user", "content": half}
    bodies = [
        ("/v1/chat/completions", {"messages": [turn]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": half}]}]}),
        ("/v1/completions", {"prompt": [half]}),
        ("/v1/completions", {"prompt": "a", "stop": half}),
        ("/v1/rewards", {"conversations": [{"prompt": half, "answers": ["a"]}]}),
        ("/v1/rewards", {"conversations": [{"prompt": [turn], "answers": ["a"]}]}),
        ("/v1/rewards", {"conversations": [{"prompt": "a", "answers": ["a", half]}]}),
        ("/generate", {"history": [{"instruction": half, "response": ""}], "max_new_tokens": 1}),
    ]
    async with running() as app:
        for path, body in bodies:
            found = await app.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
            check_error(found)
            assert "half of a surrogate pair" in found.json()["error"]["message"]


@in_loop
async def test_a_body_that_is_too_large(running):
    async with running(Limits(max_body=1000)) as app:
        found = await app.client.post("/v1/completions", json={"prompt": "a" * 10_000})
        assert found.status_code == 413
        check_error(found)

        async def pieces():
            for _ in range(100):
                yield b" " * 100

        found = await app.client.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
        assert found.status_code == 413
        check_error(found)
