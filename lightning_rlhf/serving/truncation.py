"""Drops the oldest turns of a conversation that does not fit into the context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from lightning_rlhf.data.formats import Message
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.models import Served


def fit(served: Served, messages: Sequence[Message], limit: int | None) -> tuple[list[Message], list[int], int]:
    """Drops as few of the oldest turns as possible so that the rest and an answer fit.

    The system prompt and the last turn always stay. A question is dropped with its answers, so that the rest begins
    with a question, as chat templates expect.

    Args:
        served: The model.
        messages: The conversation.
        limit: Maximum number of tokens of the answer. None: a quarter of the context is kept for it.

    Returns:
        The messages that are left, their tokens, and the number of messages that were dropped. If even the last turn
        does not fit, the result is too long.

    Raises:
        ApiError: The chat template refuses the messages, or the last turn alone is far too long.
    """
    messages = list(messages)
    context = served.context
    space = None if context is None else context - (limit or context // 4)
    if space is None or _fits(served, messages, space):
        return messages, served.encode(messages), 0
    first = 0
    while first < len(messages) - 1 and messages[first]["role"] == "system":
        first += 1
    # where the rest may begin: at a question, or at the last turn
    starts = [i for i in range(first + 1, len(messages) - 1) if messages[i]["role"] == "user"]
    starts = [first, *starts, *([len(messages) - 1] if len(messages) - 1 > first else [])]

    def left(start: int) -> list[Message]:
        return [*messages[:first], *messages[start:]]

    place = bisect_left(range(len(starts) - 1), True, key=lambda i: _fits(served, left(starts[i]), space))
    start = starts[place]
    return left(start), served.encode(left(start)), start - first


def _fits(served: Served, messages: Sequence[Message], space: int) -> bool:
    try:
        return len(served.encode(messages)) <= space
    except ApiError as error:
        if error.code == "context_length_exceeded":
            return False
        raise
