"""Rows that come, are decoded together a token a step, and go."""

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
from lightning_rlhf.rollout.sampling import choose
from lightning_rlhf.rollout.sequence import ActiveSequence, OnToken, make_sequences
from lightning_rlhf.rollout.types import Completion, Request, Sampling

_GRAIN = 128
"""Columns are made in multiples of this, as rows get longer: attention is slower over keys that lie far apart."""


_PADDING = 64
"""Tokens of padding that cost as much as a further pass over the weights, about."""


class _Group:
    """Waiting rows of one prompt; ``logits`` (V,) of its next token while some of them are already running."""

    def __init__(self) -> None:
        self.rows: deque[ActiveSequence] = deque()
        self.logits: Tensor | None = None


class Scheduler:
    """Submit requests at any time, and step while busy.

    One thread steps; others may submit, and may cancel by cancelling a future. Nobody is left waiting: every future
    gets a completion or the error of the step that failed, or is cancelled when the session closes.

    Args:
        decoder: The model, whose attention must stay set while the session lives.
        tokenizer: The model's.
        max_live_tokens: See :class:`~lightning_rlhf.rollout.CachedEngine`, as the following.
        max_rows: Likewise.
        prefill_tokens: Likewise.
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
        self._waiting: dict[tuple[int, ...], _Group] = {}  # in the order of their arrival
        self._rows: list[ActiveSequence] = []  # by their row in the cache
        self._lock = threading.Lock()  # of what waits
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether there is something to step for."""
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
            sampling: How to draw.
            stop_token_ids: Tokens that end a completion.
            on_token: Called by the stepping thread with each token and the text that can be shown since the last.
            name: Of the request, in errors.

        Returns:
            A future for each key; ``cancel()`` takes its row out of the batch before the next step.

        Raises:
            ValueError: The request can never be served.
            RuntimeError: The session is closed.
        """
        model = self._decoder.model
        rows = make_sequences(model, self._tokenizer, request, sampling, stop_token_ids, on_token, name)
        if rows and rows[0].columns > self._budget:
            raise ValueError(
                f"{name}: a prompt of {len(rows[0].prompt)} tokens and max_new_tokens {sampling.max_new_tokens} are "
                f"more than max_live_tokens {self._budget}. Raise it, or shorten either."
            )
        with self._lock:
            if self._closed:
                raise RuntimeError("The rollout session is closed.")
            for row in rows:
                self._waiting.setdefault(row.prompt, _Group()).rows.append(row)
        return [row.future for row in rows]

    @torch.inference_mode()
    def step(self) -> None:
        """Admits what fits, and makes a token of every row.

        Raises:
            Exception: What went wrong. All futures have it; the session is empty and can go on.
        """
        try:
            self._admit()
            if not all(row.done for row in self._rows):
                # one that was cancelled before its first token runs its prompt's last again: its keys stay as they are
                last = [(row.ids or row.prompt)[-1] for row in self._rows]
                logits = self._decoder.decode(last, [row.position for row in self._rows])
                self._accept(self._rows, logits)
            if not self.busy:
                self._decoder.cache.free()
        except BaseException as error:
            self._end(error)
            raise

    def close(self) -> None:
        """Cancels what is left and gives the memory back."""
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

    def _accept(self, rows: Sequence[ActiveSequence], logits: Tensor) -> None:
        for row, token, logprob in zip(rows, *choose(logits, rows), strict=True):
            if not row.done:  # it may have been cancelled
                row.push(token, logprob)

    def _admit(self) -> None:
        """Lets finished rows go and waiting ones take their place, and makes the first token of these."""
        kept = [i for i, row in enumerate(self._rows) if not row.done]
        new = self._take([self._rows[i] for i in kept])
        if len(kept) == len(self._rows) and not new:
            if any(row.position >= self._decoder.cache.columns for row in self._rows):
                self._make_room(range(len(self._rows)))
            return
        # rows stay where they are if they can; the holes are filled from the tail, then by new rows
        total = len(kept) + len(new)
        stays = {i for i in kept if i < total}
        fill: list[tuple[ActiveSequence, int | None]] = [(self._rows[i], i) for i in kept if i >= total]
        fill += [(row, None if group.logits is None else self._holder(row.prompt)) for row, group in new]
        following = iter(fill)
        layout = [(self._rows[i], i) if i in stays else next(following) for i in range(total)]
        self._rows = [row for row, _ in layout]
        self._make_room([source for _, source in layout])
        if new:
            self._start(new)

    def _take(self, kept: Sequence[ActiveSequence]) -> list[tuple[ActiveSequence, _Group]]:
        """Waiting rows that fit beside those kept, first come first served."""
        taken: list[tuple[ActiveSequence, _Group]] = []
        columns = max((row.columns for row in kept), default=0)
        with self._lock:
            for prompt, group in list(self._waiting.items()):
                if group.logits is not None and self._holder(prompt) is None:
                    group.logits = None  # all its rows left while a longer one waited for room
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

    def _holder(self, prompt: tuple[int, ...]) -> int | None:
        """A row in the cache that has a prompt's keys and values; a finished one has them until it is replaced."""
        return next((i for i, row in enumerate(self._rows) if row.prompt == prompt), None)

    def _make_room(self, sources: Sequence[int | None]) -> None:
        """Makes the cache fit the rows and a next token of each: as it is if they fit, else anew, within the budget."""
        cache, rows = self._decoder.cache, self._rows
        slots, columns = len(rows), max((row.position + 2 for row in rows), default=0)
        if slots > cache.slots or columns > cache.columns:
            most = max(row.columns for row in rows)
            columns = min(-(-columns // _GRAIN) * _GRAIN, most)
            if slots > cache.slots:  # a server's rows come one by one: grow in steps
                slots = max(slots, min(2 * cache.slots, self._max_rows, self._budget // most))
        else:
            slots, columns = cache.slots, cache.columns
        in_use = [row.position + 1 for row, source in zip(rows, sources, strict=True) if source is not None]
        cache.arrange(sources, slots, columns, min(max(in_use, default=0), cache.columns))

    def _start(self, new: Sequence[tuple[ActiveSequence, _Group]]) -> None:
        """Runs the prompts that were not run yet, and makes the first token of each new row."""
        slot = {row: i for i, row in enumerate(self._rows)}
        members: dict[_Group, list[ActiveSequence]] = {}
        for row, group in new:
            members.setdefault(group, []).append(row)
        first = {group: group.logits for group in members if group.logits is not None}
        unseen = sorted((g for g in members if g not in first), key=lambda g: len(members[g][0].prompt))
        lengths = [len(members[group][0].prompt) for group in unseen]
        for part in _parts(lengths, self._prefill_tokens):
            batch = unseen[part]
            prompts = [members[group][0].prompt for group in batch]
            logits = self._decoder.prefill(prompts, [[slot[row] for row in members[group]] for group in batch])
            for group, its in zip(batch, logits, strict=True):
                first[group] = its
                group.logits = its.clone() if group.rows else None  # for those that wait
        self._accept([row for row, _ in new], torch.stack([first[group] for _, group in new]))


def _parts(lengths: Sequence[int], most: int) -> list[slice]:
    """Cuts prompts, sorted by length, into batches of little padding and at most ``most`` tokens with it."""
    edges = [0]
    for i in range(1, len(lengths)):
        count = i - edges[-1]
        if (count + 1) * lengths[i] > most or count * (lengths[i] - lengths[i - 1]) > _PADDING:
            edges.append(i)
    return [slice(a, b) for a, b in pairwise([*edges, len(lengths)])] if lengths else []
