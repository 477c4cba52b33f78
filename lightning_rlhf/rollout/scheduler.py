"""Schedules rows that arrive at any time: all active rows advance by one token per step."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.rollout.kv_cache import Decoder
from lightning_rlhf.rollout.sampling import likeliest_tokens, sample_tokens
from lightning_rlhf.rollout.sequence import ActiveSequence, OnToken, make_sequences
from lightning_rlhf.rollout.types import Completion, Request, Sampling

_GRAIN = 128
"""The cache grows by multiples of this many columns: attention is slower over keys that lie far apart in memory."""
_PADDING = 64
"""Number of padding tokens that cost about as much as another pass over the weights."""


class _PromptGroup:
    """Waiting rows of one prompt, and the (V,) ``logits`` of its next token while some of its rows are running."""

    def __init__(self) -> None:
        self.rows: deque[ActiveSequence] = deque()
        self.logits: Tensor | None = None


class Scheduler:
    """A session: submit requests at any time, and call :meth:`step` while it is busy.

    One thread calls :meth:`step`. Other threads may submit requests, and cancel them by their futures. No future waits
    forever: each one gets a completion or the error of the step that failed, or is cancelled when the session closes.

    Args:
        decoder: The model with its cache. Its attention must stay set during the session.
        tokenizer: The model's tokenizer.
        max_live_tokens: See :class:`~lightning_rlhf.rollout.CachedEngine`.
        max_rows: See there.
        prefill_tokens: See there.
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        max_live_tokens: int | None,
        max_rows: int | None,
        prefill_tokens: int,
    ) -> None:
        self._decoder, self._tokenizer = decoder, tokenizer
        self._budget, self._max_rows = max_live_tokens or sys.maxsize, max_rows or sys.maxsize
        self._prefill_tokens = prefill_tokens
        self._waiting: dict[tuple[int, ...], _PromptGroup] = {}  # by prompt, in the order of arrival
        self._rows: list[ActiveSequence] = []  # in the order of the cache's rows
        self._lock = threading.Lock()  # guards self._waiting
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self._rows or self._waiting)

    def submit(
        self,
        request: Request,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        on_token: OnToken | None = None,
        name: str = "Rollout request",
    ) -> list[Future[Completion]]:
        """Queues a request.

        Args:
            request: A prompt and keys.
            sampling: Sampling settings.
            stop_token_ids: Tokens that end a completion.
            on_token: Called in the stepping thread with each token and the new text that can be shown.
            name: The request's name in error messages.

        Returns:
            One future per key. Its ``cancel()`` removes the row from the batch before the next step.

        Raises:
            ValueError: The request does not fit the model or the cache.
            RuntimeError: The session is closed.
        """
        model = self._decoder.model
        rows = make_sequences(model, self._tokenizer, request, sampling, stop_token_ids, on_token, name)
        if rows and rows[0].columns > self._budget:
            raise ValueError(
                f"{name}: a prompt of {len(rows[0].prompt)} tokens and max_new_tokens {sampling.max_new_tokens} are "
                f"more than max_live_tokens {self._budget}. Increase max_live_tokens, or shorten either."
            )
        with self._lock:
            if self._closed:
                raise RuntimeError("The rollout session is closed.")
            for row in rows:
                self._waiting.setdefault(row.prompt, _PromptGroup()).rows.append(row)
        return [row.future for row in rows]

    @torch.inference_mode()
    def step(self) -> None:
        """Admits waiting rows that fit, and samples one token per row.

        Raises:
            Exception: The step failed. All futures get the error. The session is empty and can be used further.
        """
        try:
            self._admit()
            if not all(row.done for row in self._rows):
                # a row that was cancelled before its first token runs its prompt's last token again: the keys stay
                last = [(row.ids or row.prompt)[-1] for row in self._rows]
                logits = self._decoder.decode(last, [row.position for row in self._rows])
                self._sample(self._rows, logits)
            if not self.busy:
                self._decoder.cache.free()
        except BaseException as error:
            self._end(error)
            raise

    def close(self) -> None:
        """Cancels all unfinished requests and frees the memory."""
        self._closed = True
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        with self._lock:
            rows = [*self._rows, *(row for group in self._waiting.values() for row in group.rows)]
            self._rows, self._waiting = [], {}
        for row in rows:
            if isinstance(error, Exception):
                row.fail(error)
            else:
                row.future.cancel()
        self._decoder.cache.free()

    # ------------------------------------------------------------------------------------------------- rows

    def _sample(self, rows: Sequence[ActiveSequence], logits: Tensor) -> None:
        for i, (row, token, logprob) in enumerate(zip(rows, *sample_tokens(logits, rows), strict=True)):
            if not row.done:  # it may have been cancelled
                row.push(token, logprob, likeliest_tokens(logits[i], row) if row.alternatives else ())

    def _admit(self) -> None:
        """Replaces finished rows by waiting ones, and samples the first token of each new row."""
        kept = [i for i, row in enumerate(self._rows) if not row.done]
        new = self._take_waiting([self._rows[i] for i in kept])
        if len(kept) == len(self._rows) and not new:
            if any(row.position >= self._decoder.cache.columns for row in self._rows):
                self._fit_cache(range(len(self._rows)))
            return
        # rows keep their places if possible; rows from the end fill the gaps first, then new rows
        total = len(kept) + len(new)
        stays = {i for i in kept if i < total}
        fill: list[tuple[ActiveSequence, int | None]] = [(self._rows[i], i) for i in kept if i >= total]
        fill += [(row, None if group.logits is None else self._row_with(row.prompt)) for row, group in new]
        following = iter(fill)
        layout = [(self._rows[i], i) if i in stays else next(following) for i in range(total)]
        self._rows = [row for row, _ in layout]
        self._fit_cache([source for _, source in layout])
        if new:
            self._start(new)

    def _take_waiting(self, kept: Sequence[ActiveSequence]) -> list[tuple[ActiveSequence, _PromptGroup]]:
        """Removes and returns the waiting rows that fit beside the kept ones, first come first served."""
        taken: list[tuple[ActiveSequence, _PromptGroup]] = []
        columns = max((row.columns for row in kept), default=0)
        with self._lock:
            for prompt, group in list(self._waiting.items()):
                if group.logits is not None and self._row_with(prompt) is None:
                    group.logits = None  # all its running rows ended while a longer one waited for room
                while group.rows:
                    row, rows = group.rows[0], len(kept) + len(taken) + 1
                    if not row.done:
                        if rows > self._max_rows or rows * max(columns, row.columns) > self._budget:
                            return taken
                        columns = max(columns, row.columns)
                        taken.append((row, group))
                    group.rows.popleft()
                del self._waiting[prompt]
        return taken

    def _row_with(self, prompt: tuple[int, ...]) -> int | None:
        """Returns a cache row with a prompt's keys and values; a finished row keeps them until it is replaced."""
        return next((i for i, row in enumerate(self._rows) if row.prompt == prompt), None)

    def _fit_cache(self, sources: Sequence[int | None]) -> None:
        """Moves rows within the cache, and enlarges it if the rows with one more token each do not fit."""
        cache, rows = self._decoder.cache, self._rows
        slots, columns = len(rows), max((row.position + 2 for row in rows), default=0)
        if slots > cache.slots or columns > cache.columns:
            most = max(row.columns for row in rows)
            columns = min(-(-columns // _GRAIN) * _GRAIN, most)
            if slots > cache.slots:  # a server's requests arrive one by one: grow in larger steps
                slots = max(slots, min(2 * cache.slots, self._max_rows, self._budget // most))
        else:
            slots, columns = cache.slots, cache.columns
        in_use = [row.position + 1 for row, source in zip(rows, sources, strict=True) if source is not None]
        cache.arrange(sources, slots, columns, min(max(in_use, default=0), cache.columns))

    def _start(self, new: Sequence[tuple[ActiveSequence, _PromptGroup]]) -> None:
        """Runs the prompts that have not run yet, and samples the first token of each new row."""
        slot = {row: i for i, row in enumerate(self._rows)}
        members: dict[_PromptGroup, list[ActiveSequence]] = {}
        for row, group in new:
            members.setdefault(group, []).append(row)
        first = {group: group.logits for group in members if group.logits is not None}
        unseen = sorted((g for g in members if g not in first), key=lambda g: len(members[g][0].prompt))
        lengths = [len(members[group][0].prompt) for group in unseen]
        for batch in (unseen[part] for part in _prefill_batches(lengths, self._prefill_tokens)):
            prompts = [members[group][0].prompt for group in batch]
            logits = self._decoder.prefill(prompts, [[slot[row] for row in members[group]] for group in batch])
            for group, next_logits in zip(batch, logits, strict=True):
                first[group] = next_logits
                group.logits = next_logits.clone() if group.rows else None  # for the rows that still wait
        self._sample([row for row, _ in new], torch.stack([first[group] for _, group in new]))


def _prefill_batches(lengths: Sequence[int], most: int) -> list[slice]:
    """Splits prompts, sorted by length, into batches with little padding and at most ``most`` tokens with it."""
    edges = [0]
    for i in range(1, len(lengths)):
        count = i - edges[-1]
        if (count + 1) * lengths[i] > most or count * (lengths[i] - lengths[i - 1]) > _PADDING:
            edges.append(i)
    return [slice(a, b) for a, b in pairwise([*edges, len(lengths)])] if lengths else []
