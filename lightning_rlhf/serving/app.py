"""The app: all routes behind their guard."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from lightning_rlhf.serving.chat import chat_routes
from lightning_rlhf.serving.coati import coati_routes
from lightning_rlhf.serving.completions import completion_routes
from lightning_rlhf.serving.errors import add_error_handlers
from lightning_rlhf.serving.guard import Access, Guard
from lightning_rlhf.serving.meta import meta_routes
from lightning_rlhf.serving.page import page_routes
from lightning_rlhf.serving.rewards import reward_routes
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.vote_routes import vote_routes


def make_app(server: Server, access: Access = Access()) -> FastAPI:  # noqa: B008 -- frozen
    """Makes the app of a server. Its lifespan starts and ends the workers.

    Args:
        server: What is served.
        access: Who may ask.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        server.start()
        try:
            yield
        finally:
            await server.close()

    # its pages of documentation load scripts from other servers
    app = FastAPI(title="lightning_rlhf", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for routes in (chat_routes, completion_routes, reward_routes, coati_routes, vote_routes, meta_routes):
        app.include_router(routes(server))
    app.include_router(page_routes())
    add_error_handlers(app)
    app.add_middleware(Guard, access=access, limits=server.limits, metrics=server.metrics)
    if access.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=[*access.origins], allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app
