"""Reads what a server sent: a reply, or the kind of problem that it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from lightning_rlhf.endpoint.requests import Reply, Usage
from lightning_rlhf.utils.text import one_line, replace_surrogates

#: Largest reply that is read, in bytes.
LARGEST = 4 * 2**20
#: Longest wait that a server can ask for, in seconds.
LONGEST_WAIT = 60.0
#: Statuses below 500 after which another attempt may succeed, and those from 500 on after which none can.
_PASSING, _LASTING = frozenset({408, 409, 425, 429}), frozenset({501, 505})
#: Statuses with which the model may have worked, and be paid, for a reply that did not come through.
_PAID = frozenset({408, 502, 504, 520, 524})
#: Statuses that every further request would get too, with what to do.
_ENDING = {
    401: "Check the API key.",
    402: "Pay at the provider, or use another one; then run the same command again.",
    403: "Check that the API key may use this model.",
    404: "Check the URL and the model's name.",
    405: "Check the URL: it usually ends in /v1.",
}


@dataclass(eq=False)
class Problem(Exception):
    """An attempt failed.

    Attributes:
        kind: What the ledger counts it as.
        text: What happened, for people.
        then: ``again`` if another attempt may succeed, ``stop`` if no request can, otherwise ``give_up``.
        may_be_paid: Whether the server may have billed it.
        wait: Seconds to wait before another attempt, if the server said so.
    """

    kind: str
    text: str
    then: Literal["again", "give_up", "stop"] = "again"
    may_be_paid: bool = True
    wait: float | None = None

    def __str__(self) -> str:
        return self.text


def read_error(status: int, headers: Mapping[str, str], text: str) -> Problem:
    """Reads a response whose status is not 200.

    Args:
        status: The status.
        headers: The headers, by lower-case names.
        text: The body.
    """
    kind, shown = f"http_{status}", f"HTTP {status}: {one_line(text, 300)}"
    if status < 400:
        to = headers.get("location", "")
        return Problem(kind, f"HTTP {status}: it redirects to {to}. Use that URL, if you trust it.", "stop", False)
    if status in _ENDING:
        return Problem(kind, f"{shown} {_ENDING[status]}", "stop", False)
    if status == 429 and "insufficient_quota" in text:
        return Problem("no_credit", f"{shown} {_ENDING[402]}", "stop", False)
    if status not in _PASSING and (status < 500 or status in _LASTING):
        return Problem(kind, shown, "give_up", False)
    return Problem(kind, shown, "again", status in _PAID, _retry_after(headers.get("retry-after", "")))


def read_reply(key: str, content: bytes, body: Mapping[str, Any], secret: str) -> Reply:
    """Reads a response whose status is 200.

    Args:
        key: The request's key.
        content: The response's body.
        body: The request's body.
        secret: Text to mask: the API key, because some servers repeat it. Empty: none.

    Raises:
        Problem: It is not a reply.
    """
    try:
        text = mask(content.decode("utf-8"), secret)
        document = json.loads(text)
    except UnicodeDecodeError as error:
        if error.end == len(content):  # cut within a character: the next attempt may bring the whole
            raise Problem("malformed", "the reply ends within a character") from None
        raise Problem("encoding", f"the reply is not UTF-8: {error}", "give_up") from None
    except ValueError as error:
        raise Problem("malformed", f"the reply is not JSON ({error}): {one_line(text, 300)}") from None
    except RecursionError:
        raise Problem("malformed", "the reply is JSON of too many levels") from None
    try:
        choice = document["choices"][0]
        said = choice["message"]["content"]
        finish = choice.get("finish_reason")
        if not (said is None or isinstance(said, str)):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Problem("malformed", f"a reply without choices[0].message.content: {one_line(text, 300)}") from None
    usage, notes = _read_usage(document.get("usage"), body)
    finish = replace_surrogates(str(finish)) if finish is not None else None
    if not said or said.isspace():
        problem = f"the reply has no text (finish_reason {finish})"
        return Reply(key, None, finish, usage, problem, "empty", tuple(notes))
    if finish == "length":
        notes.append("length")
    if document.get("model", body["model"]) != body["model"]:
        notes.append("other_model")
    clean = replace_surrogates(said)
    if clean != said:
        notes.append("surrogates")
    return Reply(key, clean, finish, usage, notes=tuple(notes))


def mask(text: str, secret: str) -> str:
    """Replaces a secret in a text by ``***``.

    Args:
        text: The text.
        secret: The secret. Empty: none.
    """
    return text.replace(secret, "***") if secret else text


def _read_usage(usage: Any, body: Mapping[str, Any]) -> tuple[Usage | None, list[str]]:
    """Returns the usage if it is credible, and notes on it."""
    if not isinstance(usage, dict):
        return None, ["no_usage"]
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    counts: list[Any] = [usage.get("prompt_tokens"), cached or 0, usage.get("completion_tokens")]
    if not all(isinstance(count, int) and 0 <= count < 2**40 for count in counts) or counts[1] > counts[0]:
        return None, ["no_usage"]
    found = Usage(*counts)
    if not found.prompt or not found.completion:
        return None, ["usage_zero"]
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    return found, ["usage_high"] if limit is not None and found.completion > limit else []


def _retry_after(value: str) -> float | None:
    """Returns the seconds that a ``Retry-After`` asks for, at most :data:`LONGEST_WAIT`."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        seconds = (when.replace(tzinfo=when.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT) if seconds == seconds else None
