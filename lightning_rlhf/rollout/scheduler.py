"""Schedules rows that arrive at any time: all active rows advance by one token per step."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.rollout.kv_cache import Adapters, Decoder, SharedPrompts
from lightning_rlhf.rollout.sampling import likeliest_tokens, sample_tokens
from lightning_rlhf.rollout.sequence import ActiveSequence, OnToken, Start, make_sequences
from lightning_rlhf.rollout.transfer import take_rows
from lightning_rlhf.rollout.types import Completion, Request, Sampling

_GRAIN = 128
"""The cache grows by multiples of this many columns: attention is slower over keys that lie far apart in memory."""
_PADDING = 64
"""Number of padding tokens that cost about as much as another pass over the weights."""
_PATIENCE = 32
"""Number of steps in which shorter requests may pass one that does not fit yet."""
_SHARED = 16
"""Number of tokens from which it is worth copying another row's keys."""
_SHARED_PROMPT = 64
"""Number of tokens from which a prompt's keys are held once for its rows: to read them apart takes more operations."""
_LOOK_AHEAD = 64
"""Number of waiting prompts that are tried in a step."""
_T = TypeVar("_T")


class Limits(Protocol):
    """How much a scheduler runs at once; see :class:`~lightning_rlhf.rollout.CachedEngine`."""

    max_live_tokens: int | None
    max_rows: int | None
    prefill_tokens: int
    prefill_chunk: int | None
    keep_prefixes: int
    reserve: bool


class _PromptGroup:
    """Waiting rows of one prompt.

    Attributes:
        rows: The rows, in the order of arrival.
        logits: (V,) logits of the next token while some rows of the prompt are running.
        shares: Whether its rows share the prompt's keys.
        blocked: Number of steps in which a row did not fit.
    """

    def __init__(self) -> None:
        self.rows: deque[ActiveSequence] = deque()
        self.logits: Tensor | None = None
        self.shares = False
        self.blocked = 0


class _Admission(NamedTuple):
    """A row that enters the cache.

    Attributes:
        row: The row.
        group: The group of a row whose prompt runs at once, or has run; None if it runs in pieces.
        source: The cache row whose keys it takes.
    """

    row: ActiveSequence
    group: _PromptGroup | None = None
    source: int | None = None


class Scheduler:
    """A session: submit requests at any time, and call :meth:`step` while it is busy.

    One thread calls :meth:`step`. Other threads may submit requests, and cancel them by their futures. No future waits
    forever: each one gets a completion or an error, or is cancelled when the session closes.

    Args:
        decoder: The model with its cache. Its attention must stay set during the session.
        tokenizer: The model's tokenizer.
        limits: How much runs at once.

    Attributes:
        error: The first error that ended a row.
    """

    def __init__(self, decoder: Decoder, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
        self._decoder, self._tokenizer, self._limits = decoder, tokenizer, limits
        self._budget, self._max_rows = limits.max_live_tokens or sys.maxsize, limits.max_rows or sys.maxsize
        self._chunk = limits.prefill_chunk or sys.maxsize
        # a server's rows take each other's keys by columns, so each has all of its own
        self._may_share = limits.prefill_chunk is None and not limits.keep_prefixes
        self._waiting: dict[Start, _PromptGroup] = {}  # in the order of arrival
        self._aside: deque[ActiveSequence] = deque()  # rows that lost their place in the cache, oldest first
        self._rows: list[ActiveSequence] = []  # in the order of the cache's rows
        self._kept: list[Start] = []  # tokens of the cache's next rows, which have finished
        self._arrivals = 0
        self._lock = threading.Condition()  # guards self._waiting
        self._closed = False
        self.error: BaseException | None = None
        self._active_adapter, self._adapter_names = decoder.adapter_names()

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests."""
        return bool(self._rows or self._waiting or self._aside)

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of running and of waiting rows."""
        with self._lock:
            waiting = sum(not row.done for group in self._waiting.values() for row in group.rows)
        return sum(not row.done for row in self._rows), waiting + len(self._aside)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until there is something to do, or the session is closed.

        Args:
            timeout: Maximum number of seconds.

        Returns:
            Whether the session is busy.
        """
        with self._lock:
            self._lock.wait_for(lambda: self.busy or self._closed, timeout)
        return self.busy

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
        if request.adapter not in (None, *self._adapter_names):
            known = ", ".join(self._adapter_names) or "none, because the model has no adapters, or several active ones"
            raise ValueError(f"{name}: there is no adapter {request.adapter!r} for a single row. There are: {known}.")
        model = self._decoder.model
        rows = make_sequences(model, self._tokenizer, request, sampling, stop_token_ids, on_token, name)
        if rows and rows[0].columns > self._budget:
            raise ValueError(
                f"{name}: a prompt of {len(prompt := rows[0].prompt)} tokens and max_new_tokens "
                f"{rows[0].columns - len(prompt)} are "
                f"more than max_live_tokens {self._budget}. Increase max_live_tokens, or shorten either."
            )
        with self._lock:
            if self._closed:
                raise RuntimeError("The rollout session is closed.")
            for row in rows:
                row.arrival, self._arrivals = self._arrivals, self._arrivals + 1
                self._waiting.setdefault(row.start, _PromptGroup()).rows.append(row)
            self._lock.notify_all()
        return [row.future for row in rows]

    @torch.inference_mode()
    def step(self) -> None:
        """Admits waiting rows that fit, and samples one token per row.

        A step that fails ends the newest row with its error; the others go on in the next step.
        """
        try:
            self._fill(self._admit())
            self._decode()
            if not self.busy:
                self._rest()
        except Exception as error:
            self._end_newest(error)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Cancels all unfinished requests and frees the memory."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._end()

    # ------------------------------------------------------------------------------------------------- ends

    def _end(self) -> None:
        """Cancels all rows."""
        with self._lock:
            rows = [*self._rows, *self._aside, *(row for group in self._waiting.values() for row in group.rows)]
            self._rows, self._waiting, self._kept = [], {}, []
            self._aside.clear()
        for row in rows:
            row.shared = None
        for row in rows:
            row.future.cancel()
        self._decoder.cache.free()

    def _end_newest(self, error: Exception) -> None:
        """Ends one row, frees the memory, and lets the others run their tokens again."""
        active = [row for row in self._rows if not row.done]
        self.error = self.error or error
        if not active:  # nobody can be blamed: tell all who wait
            with self._lock:
                active = [*self._aside, *(row for group in self._waiting.values() for row in group.rows)]
            for row in active:
                row.fail(error)
        else:
            active.sort(key=lambda row: row.arrival)
            active.pop().fail(error)
            for row in active:
                row.leave_cache()
            self._aside.extendleft(reversed(active))
        self._rows, self._kept = [], []
        for group in self._waiting.values():
            group.logits = None
        self._decoder.cache.free()

    def _rest(self) -> None:
        """Keeps no more memory than the finished rows need that may be prefixes of coming ones."""
        if not self._kept:
            self._decoder.cache.free()
            return
        longest = max(len(tokens) for _, tokens in self._kept)
        slots, columns = len(self._kept), -(-longest // _GRAIN) * _GRAIN
        if columns < self._decoder.cache.columns or slots < self._decoder.cache.slots:
            self._decoder.cache.arrange(range(slots), slots, columns, longest)

    # ------------------------------------------------------------------------------------------------- passes

    def _decode(self) -> None:
        """Runs one more token of each row, and samples the next one where all are known to the model.

        Last rows that wait for nothing yet are left out: all rows would read as many columns as a long prompt has.
        """
        rows = self._rows
        while rows and (rows[-1].done or not rows[-1].ready):
            rows = rows[:-1]
        if not rows:
            return
        # a row that was cancelled runs a token again; one whose prompt runs in pieces advances by one token
        at = [min(row.filled, row.position) for row in rows]
        ready = [row.ready for row in rows]
        tokens = [row.token(p) for row, p in zip(rows, at, strict=True)]
        shared = [row.shared for row in rows] if any(row.base for row in rows) else ()
        logits = self._decoder.decode(tokens, at, self._adapters(rows), shared)
        for row, p in zip(rows, at, strict=True):
            row.filled = max(row.filled, p + 1)
        if all(ready):
            self._sample(rows, logits)
        else:
            chosen = [i for i, is_ready in enumerate(ready) if is_ready]
            self._sample([rows[i] for i in chosen], take_rows(logits, chosen))

    def _sample(self, rows: Sequence[ActiveSequence], logits: Tensor) -> None:
        if not rows:
            return
        for i, (row, token, logprob) in enumerate(zip(rows, *sample_tokens(logits, rows), strict=True)):
            if not row.done:  # it may have been cancelled
                row.push(token, logprob, likeliest_tokens(logits[i], row) if row.alternatives else ())
                self.error = self.error or row.error

    def _adapters(self, rows: Sequence[ActiveSequence]) -> Adapters:
        """Returns the rows' adapters, or None if the active one is right for all."""
        if all(row.adapter is None for row in rows):
            return None
        return [self._active_adapter if row.adapter is None else row.adapter for row in rows]

    def _fill(self, enlarged: bool) -> None:
        """Runs a piece of a prompt that does not run at once: all its tokens but the last, which decoding runs.

        Args:
            enlarged: Whether this step has enlarged the cache: it is long enough for those who wait for a token.
        """
        behind = [i for i, row in enumerate(self._rows) if row.filled < row.position and not row.done]
        if behind:
            i = min(behind, key=lambda i: self._rows[i].arrival)
            row = self._rows[i]
            held_up = any(other.ready and not other.done for other in self._rows)
            if held_up and enlarged:
                return
            piece = min(self._chunk, self._limits.prefill_tokens) if held_up else self._limits.prefill_tokens
            end = min(row.position, row.filled + piece)
            self._decoder.extend(row.tokens(row.filled, end), i, row.filled, self._adapters([row]))
            row.filled = end

    def _start(self, new: Sequence[tuple[ActiveSequence, _PromptGroup]]) -> None:
        """Runs the prompts that have not run yet, and samples the first token of each new row."""
        slot = {row: i for i, row in enumerate(self._rows)}
        members: dict[_PromptGroup, list[ActiveSequence]] = {}
        for row, group in new:
            members.setdefault(group, []).append(row)
        first = {group: group.logits for group in members if group.logits is not None}
        unseen = sorted((g for g in members if g not in first), key=lambda g: len(members[g][0].prompt))
        for batch in self._passes(unseen, members):
            rows = [members[group] for group in batch]
            shared = SharedPrompts([len(group[0].prompt) for group in rows]) if batch[0].shares else None
            logits = self._decoder.prefill(
                [group[0].prompt for group in rows],
                [[] if shared else [slot[row] for row in group] for group in rows],
                self._adapters([group[0] for group in rows]),
                shared,
            )
            if shared is not None:
                apart = self._limits.max_live_tokens is not None  # then no padding, and none is kept beyond its rows
                for i, group_rows in enumerate(rows):
                    place = (shared.select([i]), 0) if apart else (shared, i)
                    for row in group_rows:
                        row.shared = place
            for group, next_logits in zip(batch, logits, strict=True):
                first[group] = next_logits
                group.logits = next_logits.clone() if group.rows else None  # for the rows that still wait
        for row, _ in new:
            row.filled = len(row.prompt)
        self._sample([row for row, _ in new], torch.stack([first[group] for _, group in new]))

    def _passes(
        self, groups: Sequence[_PromptGroup], members: Mapping[_PromptGroup, Sequence[ActiveSequence]]
    ) -> Iterator[list[_PromptGroup]]:
        """Splits groups, sorted by length, into those of one pass: all share their prompts' keys, or none does."""
        for shares in (True, False):
            found = [group for group in groups if group.shares == shares]
            lengths = [len(members[group][0].prompt) for group in found]
            yield from (found[part] for part in prefill_batches(lengths, self._limits.prefill_tokens))

    # ------------------------------------------------------------------------------------------------- admission

    def _admit(self) -> bool:
        """Replaces finished rows by waiting ones, and samples the first token of those whose prompt runs at once.

        Returns:
            Whether the cache was enlarged.
        """
        self._clear_failed()
        active = self._staying()
        new = self._take_waiting(list(active.values()))
        grows = any(row.column >= self._decoder.cache.columns for row in self._rows)
        if len(active) == len(self._rows) and not new and not grows:
            return False
        rows = _place(0, active, [(a.row, a.source) for a in new])
        prefixes = _place(len(rows), self._prefixes([row for row, _ in rows]), [])
        drop_prompts(self._rows, [row for row, _ in rows])
        self._rows, self._kept = [row for row, _ in rows], [tokens for tokens, _ in prefixes]
        before = self._decoder.cache.columns
        self._fit_cache([source for _, source in [*rows, *prefixes]])
        if at_once := [(a.row, a.group) for a in new if a.group is not None]:
            self._start(at_once)
        return self._decoder.cache.columns > before > 0

    def _clear_failed(self) -> None:
        """Removes the keys of rows without an answer: they may be NaN, which a mask hides from no later row."""
        failed = [i for i, row in enumerate(self._rows) if row.done and not row.succeeded]
        self._decoder.cache.clear(failed)
        for i in failed:
            self._rows[i].filled = 0

    def _staying(self) -> dict[int, ActiveSequence]:
        """Returns the unfinished rows by cache row, without the newest ones that memory has no room for."""
        active = {i: row for i, row in enumerate(self._rows) if not row.done}
        if self._limits.reserve:
            return active
        while len(active) > 1 and self._tokens([*active.values()]) > self._budget:
            newest = max(active, key=lambda i: active[i].arrival)
            active[newest].leave_cache()
            self._aside.appendleft(active.pop(newest))
        return active

    def _prefixes(self, rows: Sequence[ActiveSequence]) -> dict[int, Start]:
        """Returns the tokens of finished rows to keep, by cache row: the newest ones that fit beside ``rows``."""
        if not self._limits.keep_prefixes:
            return {}
        found = {len(self._rows) + i: prefix for i, prefix in enumerate(self._kept)}
        found |= {i: _run(row) for i, row in enumerate(self._rows) if row.succeeded}
        kept: dict[int, Start] = {}
        for i, prefix in reversed(found.items()):
            columns = self._need(rows, [len(tokens) for _, tokens in [prefix, *kept.values()]])
            if len(kept) < self._limits.keep_prefixes and (len(rows) + len(kept) + 1) * columns <= self._budget:
                kept = {i: prefix, **kept}
        return kept

    def _need(self, rows: Sequence[ActiveSequence], kept: Sequence[int] = ()) -> int:
        """Returns the number of columns that must be free for rows, beside finished ones of some lengths."""
        if self._limits.reserve:
            return max([*(row.columns for row in rows), *kept], default=0)
        return _next_columns(rows, kept)

    def _tokens(self, rows: Sequence[ActiveSequence]) -> int:
        """Returns the number of tokens that rows take of the budget, with the prompts that they share."""
        return len(rows) * self._need(rows) + shared_tokens(rows)

    def _take_waiting(self, running: list[ActiveSequence]) -> list[_Admission]:
        """Removes and returns the waiting rows that fit beside the running ones: first come, first served.

        Rows that were set aside come first. For some steps, rows that fit may pass one that does not.

        Args:
            running: Rows that stay; the rows that are taken are appended.
        """
        taken: list[_Admission] = []
        filling = {row.start for row in running if row.filled < len(row.prompt)}
        chunk = self._chunk  # prompt tokens that may still run at once in this step

        def fits(row: ActiveSequence) -> bool:
            return len(running) < self._max_rows and self._tokens([*running, row]) <= self._budget

        def take(admission: _Admission) -> None:
            if admission.group is None:
                filling.add(admission.row.start)
            running.append(admission.row)
            taken.append(admission)

        with self._lock:
            while self._aside and (self._aside[0].done or fits(self._aside[0])):
                if not (row := self._aside.popleft()).done:
                    take(self._in_pieces(row))
            for start, group in list(self._waiting.items())[: 0 if self._aside else _LOOK_AHEAD]:
                length = len(start[1])
                source = None if group.logits is None else self._row_with(start)
                if source is None:
                    group.logits = None  # all its running rows may have ended while a longer one waited for room
                new = source is None
                if new:
                    group.shares = self._may_share and shares_prompt(len(group.rows), length)
                while group.rows:
                    row = group.rows[0]
                    if row.done:
                        group.rows.popleft()
                        continue
                    row.base = length if group.shares else 0
                    if not fits(row):
                        group.blocked += 1
                        break
                    admission = _Admission(row, group, source)
                    if source is not None and group.shares:
                        row.shared, admission = self._rows[source].shared, _Admission(row, group)
                    if new:
                        if start in filling or (chunk < length <= self._chunk and chunk < self._chunk):
                            break  # it will copy that row's keys, or its turn comes in the next step
                        admission = self._in_pieces(row)
                        if admission.source is None and length <= self._chunk:
                            admission, new = _Admission(row, group), False  # the others share this pass
                            chunk -= length
                    take(admission)
                    group.rows.popleft()
                if not group.rows:
                    del self._waiting[start]
                elif group.blocked > _PATIENCE:
                    break
        return taken

    def _in_pieces(self, row: ActiveSequence) -> _Admission:
        """Admits a row whose tokens run in pieces, from where another row has the same tokens."""
        row.filled, source = 0, None
        if self._limits.keep_prefixes or self._limits.prefill_chunk:
            wanted = row.tokens(0, row.position)  # the last token always runs
            known = [*map(_run, self._rows), *self._kept]
            shared = [_shared(wanted, tokens) if adapter == row.adapter else 0 for adapter, tokens in known]
            if shared and max(shared) >= _SHARED:
                row.filled = max(shared)
                source = shared.index(row.filled)
        return _Admission(row, None, source)

    def _row_with(self, start: Start) -> int | None:
        """Returns a cache row with a prompt's keys and values; a finished row keeps them until it is replaced."""
        return next((i for i, r in enumerate(self._rows) if r.start == start and r.filled >= len(r.prompt)), None)

    def _fit_cache(self, sources: Sequence[int | None]) -> None:
        """Moves rows within the cache, and enlarges it if the rows with one more token each do not fit."""
        cache, rows = self._decoder.cache, self._rows
        kept = [len(tokens) for _, tokens in self._kept]
        lengths = [*(row.column + 1 for row in rows), *kept]
        slots, columns = len(lengths), max([*(row.column + 2 for row in rows), *kept], default=0)
        if slots > cache.slots or columns > cache.columns:
            most = max([*(row.columns for row in rows), *kept])
            columns = _next_columns(rows, kept)
            if slots > cache.slots:  # a server's requests arrive one by one: grow in larger steps
                room = self._budget // (most if self._limits.reserve else columns)
                slots = max(slots, min(2 * cache.slots, self._max_rows, room))
        else:
            slots, columns = cache.slots, cache.columns
        if slots * columns + shared_tokens(rows) > self._budget:  # earlier rows had longer columns of their own
            slots, columns = len(lengths), _next_columns(rows, kept)
        in_use = [length for length, source in zip(lengths, sources, strict=True) if source is not None]
        cache.arrange(sources, slots, columns, min(max(in_use, default=0), cache.columns))


def drop_prompts(rows: Sequence[ActiveSequence], staying: Sequence[ActiveSequence]) -> None:
    """Frees shared prompts that no row continues any longer, once they are half of those of a pass.

    Args:
        rows: All rows.
        staying: Rows that go on.
    """
    for row in {*rows} - {*staying}:
        row.shared = None
    members: dict[SharedPrompts, list[ActiveSequence]] = {}
    for row in staying:
        if row.shared is not None:
            members.setdefault(row.shared[0], []).append(row)
    for prompts, group in members.items():
        used = sorted({row.shared[1] for row in group if row.shared is not None})
        if 2 * len(used) <= len(prompts.lengths):
            fewer, place = prompts.select(used), {old: new for new, old in enumerate(used)}
            for row in group:
                if row.shared is not None:
                    row.shared = fewer, place[row.shared[1]]


def shares_prompt(rows: int, length: int) -> bool:
    """Returns whether the rows of a prompt share one copy of its keys."""
    return rows > 1 and length >= _SHARED_PROMPT


def _run(row: ActiveSequence) -> Start:
    """Returns a row's tokens that have run."""
    return row.adapter, tuple(row.tokens(0, row.filled))


def shared_tokens(rows: Sequence[ActiveSequence]) -> int:
    """Returns the number of tokens of the prompts that rows share."""
    return sum(len(prompt) for _, prompt in {row.start for row in rows if row.base})


def _next_columns(rows: Sequence[ActiveSequence], kept: Sequence[int] = ()) -> int:
    """Returns the number of columns that rows take for their next tokens, beside finished ones of some lengths."""
    columns = max([*(row.column + 2 for row in rows), *kept], default=0)
    most = max([*(row.columns for row in rows), *kept], default=0)
    return min(-(-columns // _GRAIN) * _GRAIN, most)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the number of first tokens that two sequences share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _place(
    first: int, owners: Mapping[int, _T], others: Sequence[tuple[_T, int | None]]
) -> list[tuple[_T, int | None]]:
    """Assigns consecutive cache rows.

    Args:
        first: The first cache row to assign.
        owners: What already has a cache row. It keeps its row if that is one of those to assign.
        others: What comes after them, with the cache row to copy or None. It fills the gaps.

    Returns:
        What each cache row gets, with the cache row to copy or None.
    """
    places = range(first, first + len(owners) + len(others))
    stays = {i for i in owners if i in places}
    following = iter([*((owners[i], i) for i in owners if i not in stays), *others])
    return [(owners[i], i) if i in stays else next(following) for i in places]


def prefill_batches(lengths: Sequence[int], most: int) -> list[slice]:
    """Splits prompts, sorted by length, into batches with little padding and at most ``most`` tokens with it."""
    edges = [0]
    for i in range(1, len(lengths)):
        count = i - edges[-1]
        if (count + 1) * lengths[i] > most or count * (lengths[i] - lengths[i - 1]) > _PADDING:
            edges.append(i)
    return [slice(a, b) for a, b in pairwise([*edges, len(lengths)])] if lengths else []
