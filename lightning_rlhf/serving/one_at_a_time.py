"""A session for models that cannot run with the rollout cache: requests run one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models import Policy
from lightning_rlhf.rollout import Completion, HFGenerateEngine, Request, Sampling
from lightning_rlhf.rollout.sequence import ActiveSequence, OnToken, make_sequences


class OneAtATime:
    """Requests in the order of their arrival, each by :class:`~lightning_rlhf.rollout.HFGenerateEngine`.

    Args:
        policy: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        self._policy, self._tokenizer = policy, tokenizer
        self._engine = HFGenerateEngine()
        self._waiting: deque[list[ActiveSequence]] = deque()
        self._running = 0

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self._waiting)

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of running and of waiting rows."""
        return self._running, sum(not row.done for rows in list(self._waiting) for row in rows)

    def submit(
        self,
        request: Request,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        on_token: OnToken | None = None,
        name: str = "Request",
    ) -> list[Future[Completion]]:
        """Queues a request; see :meth:`~lightning_rlhf.rollout.scheduler.Scheduler.submit`."""
        model = self._policy.transformer
        rows = make_sequences(model, self._tokenizer, request, sampling, stop_token_ids, on_token, name)
        self._waiting.append(rows)
        return [row.future for row in rows]

    def step(self) -> None:
        """Runs the next request to its end. If the model fails, the request's futures get the error."""
        rows = [row for row in self._waiting.popleft() if not row.done]
        self._running = len(rows)
        try:
            if rows:
                self._engine.run(self._policy, rows)
        except Exception as error:
            for row in rows:
                row.fail(error)
        finally:
            self._running = 0

    def close(self) -> None:
        """Cancels the requests that wait."""
        while self._waiting:
            for row in self._waiting.popleft():
                row.future.cancel()


@contextmanager
def one_at_a_time(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Iterator[OneAtATime]:
    """Opens such a session, and closes it at the end of the context."""
    session = OneAtATime(policy, tokenizer)
    try:
        yield session
    finally:
        session.close()
