"""The rows of one request: their tokens as they come, and their answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple

from lightning_rlhf.rollout import Completion, Request, Sampling
from lightning_rlhf.rollout.types import Token
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.worker import Worker


class Piece(NamedTuple):
    """What one token adds to an answer.

    Attributes:
        number: The answer's number within its request.
        token: The token, with its log-prob and the new text that can be shown.
    """

    number: int
    token: Token


class End(NamedTuple):
    """The end of an answer.

    Attributes:
        number: The answer's number within its request.
        completion: The whole answer.
    """

    number: int
    completion: Completion


class Rows:
    """Answers that are being generated. At the end of its context those that are not finished are cancelled.

    Args:
        worker: What generates them.
        jobs: A request with one key, and its settings, for each answer.
        stops: Tokens that end an answer.

    Raises:
        ValueError: A request does not fit the model.
    """

    def __init__(self, worker: Worker, jobs: Sequence[tuple[Request, Sampling]], stops: Sequence[int]) -> None:
        self._inbox: asyncio.Queue[Any] = asyncio.Queue()
        self._futures: list[Future[Completion]] = []
        try:
            for index, (request, sampling) in enumerate(jobs):
                self._futures.append(worker.submit(request, sampling, stops, self._inbox, index))
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends all rows that have not finished, before the next step."""
        for future in self._futures:
            future.cancel()

    async def __aenter__(self) -> Rows:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[list[Piece | End]]:
        """Yields what has come since the last time, until all answers have ended.

        Raises:
            ApiError: An answer failed.
        """
        left = len(self._futures)
        while left:
            events = [self._read(await self._inbox.get())]
            while not self._inbox.empty():
                events.append(self._read(self._inbox.get_nowait()))
            left -= sum(isinstance(event, End) for event in events)
            yield events

    async def finish(self) -> list[Completion]:
        """Waits for all answers, and returns them in order."""
        found = {e.number: e.completion async for events in self for e in events if isinstance(e, End)}
        return [found[i] for i in range(len(self._futures))]

    @staticmethod
    def _read(event: tuple[int, Token | Future[Completion]]) -> Piece | End:
        index, found = event
        if isinstance(found, Token):
            return Piece(index, found)
        if found.cancelled():
            raise ApiError(503, "The server is shutting down.", code="shutting_down")
        if (error := found.exception()) is not None:
            raise ApiError(500, f"The model failed on this request: {error}", code="model_failed")
        return End(index, found.result())


def tokens_of(completion: Completion) -> list[Token]:
    """Returns the tokens of a whole answer, with their log-probs."""
    others = completion.alternatives or [()] * len(completion.input_ids)
    return [Token(*found) for found in zip(completion.input_ids, completion.logprobs, others, strict=True)]
