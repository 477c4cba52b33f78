"""What a chat asks of a server with OpenAI's interface: models, streams of answers, votes."""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from lightning_rlhf.data.formats import Message


class ChatError(Exception):
    """The server refused a request, or cannot be reached."""


@dataclass
class Answer:
    """An answer while it comes.

    Attributes:
        model: Name of the model.
        seed: Seed of its samples.
        content: The text so far.
        finish_reason: What ended it; ``stopped`` if the person did. None while it comes.
        reward: Its score, if the server has a reward.
    """

    model: str
    seed: int
    content: str = ""
    finish_reason: str | None = None
    reward: float | None = None


@dataclass
class Client:
    """A server.

    Args:
        url: Address, such as ``http://127.0.0.1:8000``; a path such as ``/v1`` at its end is left out.
        api_key: The key to send, if the server wants one.
        timeout: Seconds without data after which a request fails.

    Raises:
        ChatError: The address is not one.
    """

    url: str
    api_key: str | None = None
    timeout: float = 120.0
    _host: str = field(init=False)
    _secure: bool = field(init=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ChatError(f"{self.url} is not an address. Write http://HOST:PORT.")
        self._host, self._secure = parts.netloc, parts.scheme == "https"

    def models(self) -> list[str]:
        """Returns the names of the models.

        Raises:
            ChatError: The server cannot be reached.
        """
        return [str(model["id"]) for model in self._ask("GET", "/v1/models")["data"]]

    def extras(self) -> dict[str, Any]:
        """Returns the fields that requests to this server may have beside OpenAI's, if it is one of ours."""
        try:
            health = self._ask("GET", "/health")
        except ChatError:
            return {}
        ours: dict[str, Any] = {"truncation": "auto"} if "engines" in health else {}
        return ours | {"reward": True} if health.get("reward") else ours

    def stream(
        self, answer: Answer, messages: Sequence[Message], fields: Mapping[str, Any]
    ) -> Generator[str, None, None]:
        """Fills an answer, and yields its text as it comes. Closing the iterator ends the answer on the server too.

        Args:
            answer: The answer to fill; its model is asked.
            messages: The conversation.
            fields: Further fields of the request, such as ``temperature``.

        Raises:
            ChatError: The server refused, failed, or is gone.
        """
        body = {**fields, "model": answer.model, "messages": messages, "stream": True, "seed": answer.seed}
        connection = self._connect()
        try:
            response = self._send(connection, "POST", "/v1/chat/completions", body)
            for event in _events(response):
                if "error" in event:
                    raise ChatError(event["error"]["message"])
                for choice in event.get("choices", ()):
                    text = choice["delta"].get("content") or ""
                    answer.content += text
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    answer.reward = choice.get("reward", answer.reward)
                    if text:
                        yield text
            if answer.finish_reason is None:
                raise ChatError(f"{self.url} closed the connection in the middle of an answer.")
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(f"{self.url} is gone: {error}") from error
        finally:
            connection.close()

    def vote(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a vote; see docs/chat.md.

        Returns:
            What the server says: the vote's id, and how many rows of training data came of it.

        Raises:
            ChatError: The server refused it.
        """
        return self._ask("POST", "/v1/votes", body)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        connection = self._connect()
        try:
            found: dict[str, Any] = json.loads(self._send(connection, method, path, body).read())
            return found
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ChatError(f"{self.url} cannot be reached: {error}") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, timeout=self.timeout)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Mapping[str, Any] | None
    ) -> http.client.HTTPResponse:
        headers = {"content-type": "application/json"}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key}"
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)
        response = connection.getresponse()
        if response.status != 200:
            text = response.read().decode("utf-8", "replace")
            try:
                message = json.loads(text)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"{response.status} {response.reason}"
            raise ChatError(str(message))
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Reads server-sent events."""
    for line in response:
        data = line.decode("utf-8").strip()
        if data == "data: [DONE]":
            return
        if data.startswith("data: "):
            yield json.loads(data.removeprefix("data: "))
