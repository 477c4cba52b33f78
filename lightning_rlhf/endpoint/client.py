"""Asks models behind an OpenAI-compatible endpoint, several at a time."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import re
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, TimeoutError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_rlhf.endpoint.budget import Budget, BudgetExceeded
from lightning_rlhf.endpoint.ledger import Attempt, Ledger
from lightning_rlhf.endpoint.replies import LARGEST, LONGEST_WAIT, Problem, mask, read_error, read_reply
from lightning_rlhf.endpoint.requests import ChatRequest, Reply

if TYPE_CHECKING:
    from tenacity import RetryCallState

_NEEDS = ("aiolimiter", "openai", "tenacity")
#: All that is sent of headers. The client would also send what its own environment variables say, to any host.
_HEADERS = frozenset({
    "accept", "accept-encoding", "authorization", "connection", "content-length", "content-type", "host",
    "transfer-encoding", "user-agent", "x-client-request-id",
    "x-stainless-raw-response",  # openai reads it back
})  # fmt: skip
#: Errors before a request has left, by their names: old and new versions of openai use two packages for HTTP.
_NOT_SENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError", "UnsupportedProtocol"})


#: Seconds that attempts which are cancelled get to write down that they are lost.
_CLOSING = 2.0


class EndpointError(RuntimeError):
    """The endpoint serves no request, because a setting is wrong or it cannot be reached."""


class Endpoint:
    """A model behind ``POST {base_url}/chat/completions``.

    If the server is busy or fails, a request is sent again after waits of ``backoff``, twice ``backoff`` and so on, or
    after the wait in its ``Retry-After``, at most a minute. Redirects are not followed, and plain HTTP never goes
    through a proxy, since both would show the key to another host; HTTPS goes through the environment's proxy.

    Args:
        base_url: URL of the API, such as ``http://127.0.0.1:8000/v1``.
        model: Name of the model on the server.
        api_key_env: Name of the environment variable that holds the API key. None: no key is sent.
        concurrency: Number of requests at a time. A larger value is faster if the server can handle it.
        requests_per_minute: Limit of requests per minute, further attempts included. None: no limit.
        timeout: Number of seconds without data after which an attempt fails. A larger value waits longer for a slow
            server.
        retries: Number of further attempts per request. A larger value tolerates longer outages.
        backoff: Number of seconds before the first further attempt. The wait doubles with each attempt.
        patience: Number of consecutive requests without a reply after which all end. Requests that the server refuses,
            such as with 400, count only until it has replied to one. A larger value tolerates longer outages.

    Raises:
        ValueError: A setting is invalid; the message says which one.
        ModuleNotFoundError: The extra ``collect`` is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key_env: str | None = None,
        concurrency: int = 8,
        requests_per_minute: float | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        patience: int = 5,
    ) -> None:
        check_url(base_url)
        if not model:
            raise ValueError(f"model is empty. Set it to the name of a model that {base_url} serves.")
        for name, value, least in (("concurrency", concurrency, 1), ("retries", retries, 0), ("patience", patience, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}.")
        for name, number in (("timeout", timeout), ("requests_per_minute", requests_per_minute)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be positive; got {number}.")
        if not backoff >= 0:
            raise ValueError(f"backoff must be 0 or more; got {backoff}.")
        if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
            raise ModuleNotFoundError(
                f"Asking an endpoint needs {' and '.join(missing)}. Install: pip install 'lightning_rlhf[collect]'",
                name=missing[0],
            )
        self.base_url = base_url.rstrip("/").removesuffix("/chat/completions")
        self.model, self.api_key_env, self.patience = model, api_key_env, patience
        self.concurrency, self.requests_per_minute, self.timeout = concurrency, requests_per_minute, timeout
        self.retries, self.backoff = retries, backoff
        self._failed = 0  # consecutive requests without a reply
        self._replies = False  # whether the server is known to reply
        self._connection: _Connection | None = None
        self._key()

    def ask(
        self,
        requests: Sequence[ChatRequest],
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """Asks, and waits until all is answered or has given up.

        Requests whose end is in the ledger are not sent, and equal ones are sent once. If this raises, or Ctrl-C
        interrupts it, the requests under way are waited for, so that what they cost is not lost; a second Ctrl-C does
        not wait. It works inside a running event loop too.

        Args:
            requests: Any number of requests.
            ledger: Where all is written down. None: nowhere.
            budget: What may be spent. It needs a ledger, which knows what was spent before.
            on_reply: Called with the number of each request and its reply, as they come, from another thread.

        Returns:
            One reply per request, in their order. A request that gave up has a reply without text, with the problem.

        Raises:
            EndpointError: The server rejects the key, the model or the URL, or is not there.
            BudgetExceeded: The next request could pass the budget.
            ValueError: There is a budget without a ledger, or a request without ``max_tokens`` under a budget.
        """
        if budget is not None and ledger is None:
            raise ValueError("A budget needs a ledger, which counts what was spent. Give both.")
        if ledger is not None:
            return self._ask(requests, ledger, budget, on_reply)
        with Ledger() as memory:
            return self._ask(requests, memory, budget, on_reply)

    def _ask(
        self,
        requests: Sequence[ChatRequest],
        ledger: Ledger,
        budget: Budget | None,
        on_reply: Callable[[int, Reply], None] | None,
    ) -> list[Reply]:
        if self._connection is None:
            self._connection = _Connection(self)
        loop = self._connection.loop
        work = _Round(self, self._connection, requests, ledger, budget, on_reply)
        done = asyncio.run_coroutine_threadsafe(work.run(), loop)
        try:
            return done.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(work.end, None)
            print(
                f"\nSIGINT: waiting for what is under way ({work.under_way} requests), because it may be paid for. "
                "Ctrl-C again ends at once.",
                file=sys.stderr,
                flush=True,
            )
            try:
                done.exception()
            except KeyboardInterrupt:
                loop.call_soon_threadsafe(work.cancel)
                with suppress(CancelledError, TimeoutError):
                    done.exception(_CLOSING)
            raise

    def close(self) -> None:
        """Closes the connections."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    def _key(self) -> str:
        """Reads the API key. It is not stored."""
        return read_key(self.api_key_env)


def check_url(base_url: str) -> str:
    """Checks the URL of a server.

    Args:
        base_url: The URL.

    Returns:
        The same URL.

    Raises:
        ValueError: It is none, or has a password or a query.
    """
    if not re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", base_url) or not _has_port(base_url):
        raise ValueError(
            f"base_url={re.sub('//.*@', '//***@', base_url)!r} is not a URL without password and query. Use one like "
            "http://127.0.0.1:8000/v1."
        )
    return base_url


def _has_port(url: str) -> bool:
    """Returns whether a URL has a valid port or none."""
    try:
        return urlsplit(url).port != 0
    except ValueError:
        return False


def read_key(name: str | None) -> str:
    """Reads an API key from the environment.

    Args:
        name: Name of the environment variable. None: there is no key.

    Returns:
        The key, or an empty text.

    Raises:
        ValueError: The variable is not set, or cannot be a key.
    """
    if name is None:
        return ""
    key = os.environ.get(name, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise ValueError(f"The environment variable {name} has no valid API key. Set it.")
    return key


class _Connection:
    """An event loop in a thread of its own, with the HTTP client and the limit of requests per minute."""

    def __init__(self, endpoint: Endpoint) -> None:
        import aiolimiter
        import openai

        self.loop = asyncio.new_event_loop()
        key_env, rate = endpoint.api_key_env, endpoint.requests_per_minute

        def sign(request: Any) -> Any:
            """Sets the headers, last of all, so that nothing else logs or keeps the key."""
            for name in set(request.headers) - _HEADERS:
                del request.headers[name]
            request.headers.pop("authorization", None)
            if key := read_key(key_env):
                request.headers["authorization"] = f"Bearer {key}"
            return request

        http = openai.DefaultAsyncHttpxClient(
            auth=sign, follow_redirects=False, trust_env=endpoint.base_url.startswith("https:")
        )
        # reading a body raises errors of the HTTP package: httpx, or httpx2 with newer versions of openai
        package = next(base.__module__ for base in type(http).__mro__ if base.__name__ == "AsyncClient").partition(".")[
            0
        ]
        self.http_error: type[Exception] = importlib.import_module(package).HTTPError
        self.client = openai.AsyncOpenAI(
            api_key="in the environment",
            base_url=endpoint.base_url,
            timeout=endpoint.timeout,
            max_retries=0,
            http_client=http,
        )
        # a second's worth at once, not a minute's
        self.limiter = rate and aiolimiter.AsyncLimiter(max(1.0, rate / 60), max(1.0, 60 / rate))
        threading.Thread(target=self.loop.run_forever, name="endpoint", daemon=True).start()
        self.close = weakref.finalize(self, _end_loop, self.loop, self.client)


def _end_loop(loop: asyncio.AbstractEventLoop, client: Any) -> None:
    asyncio.run_coroutine_threadsafe(client.close(), loop).add_done_callback(
        lambda _: loop.call_soon_threadsafe(loop.stop)
    )


class _Stopped(Exception):
    """The round ends, so no further attempt is made."""


@dataclass
class _Round:
    """One call of :meth:`Endpoint.ask`, within the event loop."""

    endpoint: Endpoint
    connection: _Connection
    requests: Sequence[ChatRequest]
    ledger: Ledger
    budget: Budget | None
    on_reply: Callable[[int, Reply], None] | None
    under_way: int = 0
    error: BaseException | None = None
    task: asyncio.Task[list[Reply]] | None = None
    doubtful: list[Reply] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> list[Reply]:
        """Asks all and returns the replies."""
        self.task = asyncio.current_task()
        places: dict[str, list[int]] = {}
        for number, request in enumerate(self.requests):
            places.setdefault(request.key(self.endpoint.model), []).append(number)
        replies: dict[str, Reply] = {}

        def arrived(reply: Reply) -> None:
            replies[reply.key] = reply
            if self.on_reply is not None:
                for number in places[reply.key]:
                    self.on_reply(number, reply)

        missing = []
        for key in places:
            known = self.ledger.find(key)
            if known is None:
                missing.append(key)
            else:
                self.endpoint._replies |= known.text is not None
                arrived(known)
        waiting = iter(missing)
        workers = (self._work(waiting, places, arrived) for _ in range(min(self.endpoint.concurrency, len(missing))))
        await asyncio.gather(*workers)
        if self.error is not None:
            raise self.error
        if self.stop.is_set():
            return []  # nobody reads it
        self._settle()
        return [replies[request.key(self.endpoint.model)] for request in self.requests]

    def cancel(self) -> None:
        """Ends the round at once; what is under way counts as lost."""
        if self.task is not None:
            self.task.cancel()

    def end(self, error: BaseException | None) -> None:
        """Ends the round after the attempts that are under way."""
        self.error = self.error or error
        self.stop.set()
        self.settled.set()

    async def _work(
        self, waiting: Iterator[str], places: dict[str, list[int]], arrived: Callable[[Reply], None]
    ) -> None:
        for key in waiting:
            try:
                reply = await self._ask(key, self.requests[places[key][0]])
                arrived(reply)
                if self.stop.is_set():
                    return
            except _Stopped:
                return
            except Exception as error:
                self.end(error)
                return

    def _settle(self) -> None:
        """Writes down which requests gave up, so that no later run asks them again.

        Not before the server is seen to be there: of a run that ended because it was away, the next asks them again.
        """
        if self.doubtful:
            self.ledger.settle(self.doubtful)
            self.doubtful.clear()

    def _note_reply(self) -> None:
        self.endpoint._failed, self.endpoint._replies = 0, True
        self._settle()

    def _note_failure(self, reply: Reply, refused: bool) -> None:
        """Ends the round after several consecutive requests without a reply."""
        self.doubtful.append(reply)
        if refused and self.endpoint._replies:
            self._settle()
            return
        self.endpoint._failed += 1
        if self.endpoint._failed >= self.endpoint.patience:
            raise EndpointError(
                f"{self.endpoint.base_url} did not reply to {self.endpoint._failed} consecutive requests. The last "
                f"problem: {reply.problem}"
            )

    async def _ask(self, key: str, request: ChatRequest) -> Reply:
        from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

        doubling = wait_exponential(self.endpoint.backoff, max=LONGEST_WAIT)

        def wait(state: RetryCallState) -> float:
            problem = state.outcome and state.outcome.exception()
            asked = problem.wait if isinstance(problem, Problem) else None
            return doubling(state) if asked is None else asked

        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, Problem) and error.then == "again"),
            stop=stop_after_attempt(self.endpoint.retries + 1),
            wait=wait,
            sleep=self._pause,
            reraise=True,
        )
        try:
            reply: Reply = await retrying(partial(self._attempt, key, request))
        except Problem as problem:
            if problem.then == "stop":
                raise EndpointError(f"{self.endpoint.base_url} rejects requests: {problem.text}") from None
            reply = Reply(key, problem=problem.text, kind=problem.kind)
            self._note_failure(reply, refused=problem.then == "give_up")
        else:
            self._note_reply()
        return reply

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise _Stopped

    async def _attempt(self, key: str, request: ChatRequest) -> Reply:
        if self.connection.limiter:
            await self.connection.limiter.acquire()
        attempt = await self._begin(request)
        body = request.body(self.endpoint.model)
        self.under_way += 1
        try:
            content = await self._post(body, attempt.name)
            reply = read_reply(key, content, body, self.endpoint._key())
        except Problem as problem:
            (self.ledger.lose if problem.may_be_paid else self.ledger.refuse)(attempt, problem.kind)
            raise
        except BaseException:
            self.ledger.lose(attempt, "interrupted")
            raise
        else:
            self.ledger.answer(attempt, reply, self.budget)
            return reply
        finally:
            self.under_way -= 1
            self.settled.set()

    async def _begin(self, request: ChatRequest) -> Attempt:
        """Writes a request down. If the budget has no room, waits for what those under way leave of theirs."""
        while not self.stop.is_set():
            self.settled.clear()
            try:
                return self.ledger.begin(request, self.endpoint.model, self.endpoint.base_url, self.budget)
            except BudgetExceeded:
                if not self.under_way:
                    raise
            await self.settled.wait()
        raise _Stopped

    async def _post(self, body: dict[str, Any], name: str) -> bytes:
        import openai

        rest = {key: value for key, value in body.items() if key not in ("messages", "model")}
        content = bytearray()
        problem = None
        try:
            async with self.connection.client.chat.completions.with_streaming_response.create(
                messages=body["messages"],
                model=body["model"],
                extra_body=rest,
                extra_headers={"X-Client-Request-Id": name},
            ) as response:
                async for piece in response.iter_bytes():
                    content += piece
                    if len(content) > LARGEST:
                        problem = Problem("too_large", f"the reply has over {LARGEST:,} bytes", "give_up")
                        break
        except openai.APIStatusError as error:
            text = mask(error.response.text, self.endpoint._key())
            problem = read_error(error.status_code, error.response.headers, text)
        except (openai.APIConnectionError, self.connection.http_error) as error:
            problem = self._transport(error)
        if problem is not None:
            raise problem  # here, since the errors above hold the headers with the key
        return bytes(content)

    def _transport(self, error: BaseException) -> Problem:
        """Classes an error that is no response."""
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)
        names = {type(one).__name__ for one in chain}
        shown = " ".join(str(one) for one in (chain[0], chain[-1]))
        text = mask(f"{type(chain[min(1, len(chain) - 1)]).__name__}: {shown}", self.endpoint._key())
        sent = not names & _NOT_SENT
        if any(isinstance(one, socket.gaierror) for one in chain):
            return Problem("dns", text, may_be_paid=False)
        if any(isinstance(one, ConnectionRefusedError) for one in chain):
            return Problem("unreachable", "connection refused. Is the server running?", may_be_paid=False)
        if any("Timeout" in name for name in names):
            return Problem("timeout", f"no data for {self.endpoint.timeout:g} s", may_be_paid=sent)
        return Problem("connection" if sent else "unreachable", text, may_be_paid=sent)
