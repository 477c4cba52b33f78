"""Completes prompts by static steps: the host queues blocks of them, and reads what they found while others run."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lightning_rlhf.models.backbone import vocabulary_size
from lightning_rlhf.rollout.kv_cache import Decoder, Shared, SharedPrompts
from lightning_rlhf.rollout.scheduler import Limits, drop_prompts, prefill_batches, shared_tokens, shares_prompt
from lightning_rlhf.rollout.sequence import ActiveSequence, Start
from lightning_rlhf.rollout.static_step import RowState, StaticStep, TokenChooser, first_state
from lightning_rlhf.rollout.transfer import Coming
from lightning_rlhf.rollout.types import Sampling

_BLOCK = 16
"""Number of steps that are queued together. Rows that have ended run until the block after theirs is over."""


class StaticRollout:
    """Runs rows until all have ended.

    Rows keep their places in the cache until half of them have ended, or the cache must grow: then the others move
    together, waiting rows join them, and a new step is made. So a rollout has few different steps.

    Args:
        decoder: The model with its cache. Its attention must stay set.
        rows: The rows. They differ in prompts, keys and lengths alone.
        sampling: Their settings.
        stops: Tokens that end a completion.
        limits: How much runs at once.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Sequence[ActiveSequence],
        sampling: Sampling,
        stops: Collection[int],
        limits: Limits,
    ) -> None:
        self._decoder, self._limits = decoder, limits
        self._chooser = TokenChooser(sampling, stops, vocabulary_size(decoder.model), decoder.device)
        groups: dict[Start, list[ActiveSequence]] = {}
        for row in rows:
            groups.setdefault(row.start, []).append(row)
        for group in groups.values():
            for row in group:
                row.base = len(row.prompt) if shares_prompt(len(group), len(row.prompt)) else 0
        self._waiting = deque(row for group in groups.values() for row in group)  # those of a prompt together
        self._first: dict[Start, tuple[Shared | None, Tensor]] = {}  # of the prompt that some rows still wait for
        self._rows: list[ActiveSequence] = []  # in the order of the cache's rows
        self._queued: Counter[ActiveSequence] = Counter()  # tokens that are sampled or queued
        self._unread: deque[tuple[list[ActiveSequence], Coming]] = deque()
        self._step: StaticStep | None = None
        self._width = 0  # columns that steps may write

    @torch.inference_mode()
    def run(self) -> None:
        """Runs all rows.

        Raises:
            Exception: What ended a row.
        """
        try:
            while self._waiting or self._unread or self._going():
                self._arrange()
                queued = self._queue()
                while len(self._unread) > queued:  # the device runs the last block meanwhile
                    self._read()
        finally:
            self._step = None
            self._decoder.cache.free()

    def _going(self) -> list[int]:
        """Returns the rows that have tokens to sample, as far as the host knows."""
        most = [0 if row.done else row.sampling.max_new_tokens for row in self._rows]
        return [i for i, row in enumerate(self._rows) if self._queued[row] < most[i]]

    # ------------------------------------------------------------------------------------------------- steps

    def _queue(self) -> bool:
        """Queues a block, if a row has tokens to sample."""
        going = [self._rows[i] for i in self._going()]
        if self._step is None or not going:
            return False
        steps = min(_BLOCK, max(row.sampling.max_new_tokens - self._queued[row] for row in going))
        found = self._step.run(steps)
        self._unread.append((self._rows, Coming(found)))
        for row in self._rows:
            self._queued[row] = min(row.sampling.max_new_tokens, self._queued[row] + steps)
        return True

    def _read(self) -> None:
        """Gives rows the tokens of a block. They end by the same rules as on the device, and by stop strings."""
        rows, coming = self._unread.popleft()
        for tokens, logprobs in zip(*coming.tolist(), strict=True):
            for row, token, logprob in zip(rows, tokens, logprobs, strict=True):
                if not row.done:
                    row.push(int(token), logprob)
                    if row.error is not None:
                        raise row.error

    # ------------------------------------------------------------------------------------------------- places

    def _arrange(self) -> None:
        """Moves rows together, admits waiting ones, and makes a new step, if it is time."""
        going, every = self._going(), range(len(self._rows))
        # also of rows that have ended for the host alone: the device goes on with them
        if self._step is not None and 2 * len(going) > len(every) and self._columns(every, _BLOCK) <= self._width:
            return
        if not going and not self._waiting:
            return
        stay = [self._rows[i] for i in going]
        drop_prompts(self._rows, stay)
        new = self._admit(stay)
        state = None if self._step is None else self._step.rows
        used = min(self._columns(going, 0), self._decoder.cache.columns)
        self._step, self._rows = None, [*stay, *new]  # a graph's memory is given back before there is a new one
        every = range(len(self._rows))
        self._width = min(bucket(self._columns(every, _BLOCK)), max(row.columns for row in self._rows))
        self._decoder.cache.arrange([*going, *[None] * len(new)], len(self._rows), self._width, used)
        rows = self._start(new, len(stay))
        if state is not None:
            rows = state.joined(going, rows)
        assert rows is not None
        shared = [row.shared for row in self._rows]
        longest = max(row.base for row in self._rows) + self._width
        self._step = StaticStep(self._decoder, self._chooser, rows, shared, self._width, longest, _BLOCK)

    def _columns(self, rows: Sequence[int], steps: int) -> int:
        """Returns the number of columns that some rows need for a number of further steps."""
        chosen = [self._rows[i] for i in rows]
        return max((min(r.columns, len(r.prompt) + self._queued[r] - r.base + steps) for r in chosen), default=0)

    def _admit(self, stay: Sequence[ActiveSequence]) -> list[ActiveSequence]:
        """Removes and returns the waiting rows that fit beside those that stay, in their order."""
        budget, most_rows = self._limits.max_live_tokens or sys.maxsize, self._limits.max_rows or sys.maxsize
        new: list[ActiveSequence] = []
        columns, prompts = max((row.columns for row in stay), default=0), {row.start for row in stay if row.base}
        shared = shared_tokens(stay)
        while self._waiting and len(stay) + len(new) < most_rows:
            row = self._waiting[0]
            columns = max(columns, row.columns)
            if row.base and row.start not in prompts:
                prompts.add(row.start)
                shared += row.base
            if (len(stay) + len(new) + 1) * columns + shared > budget:
                break
            new.append(self._waiting.popleft())
        return new

    def _start(self, new: Sequence[ActiveSequence], first: int) -> RowState | None:
        """Runs the prompts of new rows, and samples a token of each.

        Args:
            new: The rows.
            first: The cache row of the first one.

        Returns:
            Their state.
        """
        if not new:
            return None
        places: dict[Start, list[int]] = {}
        for i, row in enumerate(new):
            places.setdefault(row.start, []).append(i)
        found = {start: self._first[start] for start in places if start in self._first}
        for shares in (True, False):
            unseen = [s for s, rows in places.items() if s not in found and bool(new[rows[0]].base) == shares]
            unseen.sort(key=lambda start: len(start[1]))
            for part in prefill_batches([len(s[1]) for s in unseen], self._limits.prefill_tokens):
                starts = unseen[part]
                prompts = SharedPrompts([len(s[1]) for s in starts]) if shares else None
                rows = [[] if shares else [first + i for i in places[s]] for s in starts]
                logits = self._decoder.prefill([s[1] for s in starts], rows, None, prompts)
                for i, start in enumerate(starts):
                    found[start] = None if prompts is None else (prompts, i), logits[i]
        # some rows of the last prompt may wait for room; if each has keys of its own, it runs again for them
        kept = {row.start for row in list(self._waiting)[:1] if row.base}
        self._first = {start: (place, own.clone()) for start, (place, own) in found.items() if start in kept}
        for start, rows_of in places.items():
            for i in rows_of:
                new[i].shared = found[start][0]
        state = first_state(new, self._decoder.device, self._chooser.penalized)
        chosen = self._chooser.advance(torch.stack([found[row.start][1] for row in new]), state)
        self._unread.append((list(new), Coming(torch.stack([part.double()[None] for part in chosen]))))
        self._queued.update(new)
        return state


def bucket(columns: int) -> int:
    """Returns the next of 32, 48, 64, 96, 128, 192 and so on: a longer completion takes few different sizes."""
    size = 32
    while size < columns:
        if 3 * size // 2 >= columns:
            return 3 * size // 2
        size *= 2
    return size
