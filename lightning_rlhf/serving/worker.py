"""One thread that owns a model: it advances all rows, and sleeps while there are none."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any, Protocol, TypeVar

from lightning_rlhf.rollout import Completion, Request, Sampling
from lightning_rlhf.rollout.sequence import OnToken
from lightning_rlhf.rollout.types import Token

log = logging.getLogger(__name__)
Made = TypeVar("Made")


class Session(Protocol):
    """What a worker needs of a rollout session."""

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests."""
        ...

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of running and of waiting rows."""
        ...

    def submit(
        self,
        request: Request,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        on_token: OnToken | None = None,
        name: str = ...,
    ) -> list[Future[Completion]]:
        """Queues a request."""
        ...

    def step(self) -> None:
        """Advances the requests. An error ends the requests that it concerns, and is not raised."""
        ...


class Worker:
    """Runs a session in its own thread. All methods are for the event loop's thread.

    Args:
        open_session: Opens the session; called in the worker's thread.
        name: Name of the thread.

    """

    def __init__(self, open_session: Callable[[], AbstractContextManager[Session]], name: str) -> None:
        self._open = open_session
        self._calls: deque[Callable[[], None]] = deque()
        self._outbox: list[tuple[asyncio.Queue[Any], Any]] = []
        self._outbox_lock = threading.Lock()
        self._futures: set[Future[Completion]] = set()
        self._opened: Future[None] = Future()
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"worker {name}", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def unfinished(self) -> int:
        """Number of rows that wait or run."""
        return len(self._futures)

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of running and of waiting rows."""
        return self._session.load

    def start(self) -> None:
        """Starts the thread, from within the event loop that gets the tokens, and waits until the session is open."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._opened.result()

    async def close(self) -> None:
        """Cancels all rows and ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def submit(
        self, request: Request, sampling: Sampling, stops: Sequence[int], inbox: asyncio.Queue[Any], index: int
    ) -> Future[Completion]:
        """Queues a request with one key.

        Args:
            request: A prompt with one key.
            sampling: Sampling settings.
            stops: Tokens that end the answer.
            inbox: Gets ``(index, token)`` for each token, and then ``(index, future)``.
            index: The row's number within its request.

        Returns:
            The answer. Cancelling it ends the row before the next step.

        Raises:
            ValueError: The request does not fit the model.
        """

        def on_token(token: Token) -> None:
            self._post(inbox, (index, token))

        def on_end(future: Future[Completion]) -> None:
            with self._wake:
                self._futures.discard(future)
            if not future.cancelled() and (error := future.exception()) is not None:
                log.error("An answer failed.", exc_info=error)
            self._post(inbox, (index, future))

        [future] = self._session.submit(request, sampling, stops, on_token, "The request")
        with self._wake:
            self._futures.add(future)
            self._wake.notify()
        future.add_done_callback(on_end)
        self._send()  # the row may have ended before
        return future

    def cancel_all(self) -> None:
        """Cancels all rows; those that wait for them are told."""
        with self._wake:
            futures = list(self._futures)
        for future in futures:
            future.cancel()
        self._send()

    async def call(self, function: Callable[[], Made]) -> Made:
        """Runs a function in the worker's thread, between two steps, and no other between the same two."""
        future: Future[Made] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():  # the caller may have left
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)

        with self._wake:
            self._calls.append(run)
            self._wake.notify()
        return await asyncio.wrap_future(future)

    def _run(self) -> None:
        with ExitStack() as stack:
            try:
                self._session = stack.enter_context(self._open())
            except Exception as error:
                self._opened.set_exception(error)
                return
            self._opened.set_result(None)
            while self._sleep():
                if self._calls:
                    self._calls.popleft()()
                if self._session.busy:
                    self._session.step()
                self._send()

    def _sleep(self) -> bool:
        """Waits until there is something to do; returns False at the end."""
        with self._wake:
            while not (self._closing or self._calls or self._session.busy):
                self._wake.wait()
        return not self._closing

    def _post(self, inbox: asyncio.Queue[Any], event: tuple[int, Token | Future[Completion]]) -> None:
        with self._outbox_lock:
            self._outbox.append((inbox, event))

    def _send(self) -> None:
        """Hands what a step made to the event loop, at once: waking it for each token would cost more than a step."""
        with self._outbox_lock, suppress(RuntimeError):  # the event loop may have ended
            if self._outbox:
                taken, self._outbox = self._outbox, []
                self._loop.call_soon_threadsafe(self._deliver, taken)

    def _deliver(self, taken: list[tuple[asyncio.Queue[Any], Any]]) -> None:
        for inbox, event in taken:
            inbox.put_nowait(event)
