"""A real server process, and the app in this process for tests that look inside."""

import dataclasses
import json
from contextlib import asynccontextmanager

import httpx
import pytest
import torch
from server_process import serving

from lightning_rlhf.models import LoRA, load_causal_lm, load_reward_model, load_tokenizer
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.rollout import CachedEngine
from lightning_rlhf.serving.app import make_app
from lightning_rlhf.serving.guard import Access
from lightning_rlhf.serving.limits import Limits
from lightning_rlhf.serving.load import ModelOptions, load_served
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.worker import Worker


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory, stories_model_dir):
    """The folder of three runs: two that exported adapters of one model, and a reward model of its weights."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = load_tokenizer(stories_model_dir)
    for name, lora in (("ppo", LoRA(r=2, targets=["q_proj", "v_proj"])), ("sft", LoRA(r=4))):
        torch.manual_seed(lora.r)
        model = load_causal_lm(stories_model_dir, lora=lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.03)
        save_pretrained(model, tokenizer, folder / name / "hf" / "last", adapter_only=True)
    model = load_reward_model(stories_model_dir, pad_token_id=tokenizer.pad_token_id)
    model.config.score_offset = 0.5
    save_pretrained(model, tokenizer, folder / "reward" / "hf" / "best")
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory, run_dir):
    """A real server of ``ppo``, ``sft`` and their ``base``, and of the reward model."""
    with serving(tmp_path_factory.mktemp("server") / "log", run_dir) as process:
        yield process


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
