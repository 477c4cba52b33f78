"""A real server process, and the app in this process for tests that look inside."""

import dataclasses
import json
from contextlib import asynccontextmanager

import httpx
import pytest
import run_server
import torch

from lightning_rlhf.rollout import CachedEngine
from lightning_rlhf.serving.app import make_app
from lightning_rlhf.serving.guard import Access
from lightning_rlhf.serving.limits import Limits
from lightning_rlhf.serving.load import ModelOptions, load_served
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.worker import Worker

run_dir, server = run_server.run_dir, run_server.server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def served(stories_model_dir):
    torch.set_num_threads(1)
    return load_served("stories", str(stories_model_dir), ModelOptions())


class App:
    """The app in this process, its workers started, with a client."""

    def __init__(self, server, client, worker, app):
        self.server, self.client, self.worker, self.app = server, client, worker, app

    async def call(self, path, body, receive):
        """Sends a request whose further messages come from ``receive``; returns what the app sent."""
        sent = []
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])

        async def receiving():
            return next(messages, None) or await receive()

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        await self.app(scope, receiving, send)
        return sent


@pytest.fixture
def running(served):
    """``async with running(limits=..., access=...) as app``: the app, in the running event loop."""

    @asynccontextmanager
    async def run(limits=Limits(), access=Access(), session=None, models=None, **options):  # noqa: B008 -- frozen
        if models is None:
            engine = CachedEngine(max_rows=limits.max_rows)
            worker = Worker(session or (lambda: engine.session(served.policy, served.tokenizer)), "test")
            models = {served.name: dataclasses.replace(served, worker=worker)}
        server = Server(models, limits, **options)
        app = make_app(server, access)
        server.start()
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
                yield App(server, client, server.workers[0], app)
        finally:
            await server.close()

    return run
