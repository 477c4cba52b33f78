"""Talks to a vLLM server over HTTP, several requests at a time."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from lightning_rlhf.endpoint.client import check_url, read_key
from lightning_rlhf.endpoint.replies import mask, read_error


class VLLMError(RuntimeError):
    """The server did not do what was asked; the message is for people.

    Args:
        message: What was wrong, where, and what to do.
        status: The status of its answer. None: there was no answer, or one that can't be used.
        body: The text of its answer.
    """

    def __init__(self, message: str, status: int | None = None, body: str = "") -> None:
        super().__init__(message)
        self.status, self.body = status, body


class Client:
    """Sends JSON, each request over a connection of its own. Redirects and proxies are not used.

    Args:
        base_url: URL of the server, with or without ``/v1``.
        api_key_env: Name of the environment variable that holds the API key. None: no key is sent.
        concurrency: Number of requests at a time.
        timeout: Number of seconds without data after which a request fails.
        retries: Number of further attempts where the server says that it is busy or failed.
        backoff: Number of seconds before the first further attempt. The wait doubles with each attempt.

    Raises:
        ValueError: A setting is invalid; the message says which one.
    """

    def __init__(
        self, base_url: str, api_key_env: str | None, concurrency: int, timeout: float, retries: int, backoff: float
    ) -> None:
        self.base_url = check_url(base_url).rstrip("/").removesuffix("/v1")
        self.api_key_env, self.concurrency, self.timeout = api_key_env, concurrency, timeout
        self.retries, self.backoff = retries, backoff
        self._open: set[http.client.HTTPConnection] = set()
        read_key(api_key_env)

    def get(self, path: str) -> Any:
        """Returns the JSON at a path."""
        return self._parse(self._ask("GET", path, None, self.retries), path)

    def order(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        """Sends an order once, and waits until it is done."""
        self._ask("POST", path, body, 0)

    def post_all(self, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Sends several requests to a path. If one fails, the others end at once.

        Args:
            path: The path.
            bodies: At least one.

        Returns:
            The JSON of each answer, in order.

        Raises:
            VLLMError: A request failed.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(min(self.concurrency, len(bodies)), "vllm") as pool:
            waiting = [pool.submit(self._ask, "POST", path, body, self.retries, stop) for body in bodies]
            try:
                done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._hang_up()
                raise
        return [self._parse(future.result(), path) for future in waiting]

    def _hang_up(self) -> None:
        """Ends the requests under way, whose threads wait for data."""
        for connection in tuple(self._open):
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _parse(self, text: str, path: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise VLLMError(
                f"{self.base_url}{path} did not answer with JSON: is it a vLLM server? {text[:200]!r}"
            ) from None

    def _ask(
        self, method: str, path: str, body: Mapping[str, Any] | None, retries: int, stop: threading.Event | None = None
    ) -> str:
        """Returns the text of an answer whose status is 200."""
        stop = stop or threading.Event()
        for attempt in itertools.count():
            status, headers, text = self._send(method, path, body)
            if status == 200:
                return text
            problem = read_error(status, headers, text)
            if problem.then != "again" or attempt >= retries:
                raise VLLMError(f"The vLLM server at {self.base_url} refuses {path}: {problem.text}", status, text)
            if stop.wait(self.backoff * 2**attempt if problem.wait is None else problem.wait):
                break
        raise VLLMError("Another request failed.")

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> tuple[int, dict[str, str], str]:
        """Returns status, headers by lower-case names, and text of an answer."""
        url, key = urlsplit(self.base_url), read_key(self.api_key_env)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(url.hostname), url.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._open.add(connection)
        try:
            connection.request(method, url.path + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", errors="replace")
        except (OSError, http.client.HTTPException) as error:
            raise VLLMError(self._lost(error)) from error
        finally:
            self._open.discard(connection)
            connection.close()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, mask(text, key)

    def _lost(self, error: Exception) -> str:
        """Says why there is no answer, and what to do."""
        if isinstance(error, TimeoutError):
            return (
                f"The vLLM server at {self.base_url} sent nothing for {self.timeout:g} s. See its log; if it is only "
                "slow, raise engine.timeout, or lower engine.concurrency."
            )
        if isinstance(error, (ConnectionRefusedError, socket.gaierror)):
            return (
                f"No vLLM server is at {self.base_url} ({error.strerror or error}). Start one (docs/vllm.md), or mend "
                "engine.base_url."
            )
        return (
            f"The vLLM server at {self.base_url} closed the connection before it answered ({type(error).__name__}): "
            "it has ended or was restarted. See its log, start it again, and resume from the last checkpoint."
        )
