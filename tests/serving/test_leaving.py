"""Clients that leave free their rows, and a step that fails costs one answer."""

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest
from in_loop import in_loop

from lightning_rlhf.rollout import CachedEngine

LONG = {"prompt": "Once upon a time", "max_tokens": 400, "min_tokens": 400, "seed": 1}
SHORT = {**LONG, "max_tokens": 100, "min_tokens": 100}


class Stepped:
    """A session that steps only when it is told, and the rows it has after each step."""

    def __init__(self, session):
        self.session, self.go, self.left = session, threading.Semaphore(0), []
        self.submit = session.submit

    @property
    def busy(self):
        return self.session.busy

    def step(self):
        self.go.acquire()
        self.session.step()
        self.left.append(len(self.session._rows))


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("rows", [1, 2], ids=["waiting", "running"])
@in_loop
async def test_a_client_that_leaves_frees_its_row_within_two_steps(running, served, stream, rows):
    made = []

    @contextmanager
    def session():
        with CachedEngine(max_rows=rows).session(served.policy, served.tokenizer) as inner:
            made.append(Stepped(inner))
            yield made[0]

    gone = asyncio.Event()

    async def leave():
        await gone.wait()
        return {"type": "http.disconnect"}

    async def stay():
        await asyncio.Event().wait()

    async with running(session=session) as app:
        [stepped] = made
        other = asyncio.create_task(app.call("/v1/completions", LONG, stay))
        while app.worker.unfinished < 1:
            await asyncio.sleep(0.01)
        for _ in range(2):
            stepped.go.release()
        body = {**LONG, "stream": stream}
        leaving = asyncio.create_task(app.call("/v1/completions", body, leave))
        while app.worker.unfinished < 2:
            await asyncio.sleep(0.01)
        for _ in range(5):
            stepped.go.release()
        while len(stepped.left) < 7:
            await asyncio.sleep(0.01)
        assert stepped.left[-1] == rows
        gone.set()
        await leaving
        assert app.worker.unfinished == 1
        before = len(stepped.left)
        for _ in range(2):
            stepped.go.release()
        while len(stepped.left) < before + 2:
            await asyncio.sleep(0.01)
        assert stepped.left[-1] == 1
        assert not stepped.session._waiting
        for _ in range(1000):
            stepped.go.release()
        assert b'"finish_reason":"length"' in (await other)[1]["body"]


@in_loop
async def test_a_client_that_leaves_while_its_prompts_are_scored_gets_nothing(running):
    async def leave():
        return {"type": "http.disconnect"}

    async with running() as app:
        sent = await app.call("/v1/completions", {**LONG, "echo": True, "logprobs": 1}, leave)
        assert [message.get("status") for message in sent] == [499, None]
        assert app.worker.unfinished == 0
        assert (await app.client.post("/v1/completions", json={"prompt": "Ben", "max_tokens": 2})).status_code == 200


@in_loop
async def test_a_step_that_raises_costs_one_answer(running, monkeypatch):
    from lightning_rlhf.rollout.kv_cache import Decoder

    decode, steps = Decoder.decode, []

    def failing(self, *args):
        steps.append(None)
        if len(steps) == 20:
            raise RuntimeError("out of memory")
        return decode(self, *args)

    async with running() as app:
        alone = await app.client.post("/v1/completions", json=SHORT)
        monkeypatch.setattr(Decoder, "decode", failing)
        body = {**LONG, "stream": True}
        older = asyncio.create_task(app.client.post("/v1/completions", json=SHORT))
        while not steps:
            await asyncio.sleep(0.001)
        async with app.client.stream("POST", "/v1/completions", json={**body, "prompt": "Ben"}) as response:
            *_, last = [line async for line in response.aiter_lines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "model_failed"
        assert (await older).json()["choices"] == alone.json()["choices"]
        assert (await app.client.get("/health")).status_code == 200
