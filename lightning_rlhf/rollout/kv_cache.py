"""A cache for keys and values of rows of different lengths, written in place, and the attention that reads it.

Rows are aligned on the left: column p holds the key of position p. So a new prompt can take a free row at any time,
rows of different lengths share a batch without padding, and one copy moves a row.

Rows that continue one prompt may share its keys, which :class:`SharedPrompts` holds once: such a row's own columns
begin after the prompt, and its attention merges both parts.

Shapes: R rows, C columns, H query heads, K key / value heads, E head size, L tokens of a prompt.
"""

from __future__ import annotations

import inspect
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache

from lightning_rlhf.models.backbone import vocabulary_size
from lightning_rlhf.rollout.own_lengths import own_length_attention, reads_own_lengths
from lightning_rlhf.rollout.transfer import to_device

NAME = "rollout"
BASE = "__base__"
"""peft's name of the model without adapters."""
Adapters = Sequence[str] | None
"""peft's names of the adapters of some rows. None: the model as it is set."""
#: About as many bytes are read in the time that the operations of a layer take to start.
_LAYER_BYTES = 3 * 2**20
_ACTIVE: ContextVar[SlotCache] = ContextVar("the cache that a model is being run with")


class SharedPrompts:
    """Keys and values of B prompts that ran in one pass, each held once for all rows that continue it.

    Args:
        lengths: Their lengths, in tokens.

    Attributes:
        keys: For each layer (B, K, L, E), padded on the right to the longest prompt's L.
        values: Likewise.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def select(self, which: Sequence[int]) -> SharedPrompts:
        """Returns some of the prompts, in memory of their own."""
        found = SharedPrompts([self.lengths[i] for i in which])
        longest = max(found.lengths)
        found.keys, found.values = ([t[list(which), :, :longest] for t in store] for store in (self.keys, self.values))
        return found


Shared = tuple[SharedPrompts, int]
"""The prompt that a row continues: those of its pass, and its number among them."""


class _Continued(NamedTuple):
    """Rows of a pass that continue prompts of one :class:`SharedPrompts`, dealt into B times G places.

    Attributes:
        prompts: The prompts.
        lengths: (B,) their lengths.
        rows: (M,) the rows.
        places: (M,) their places.
        order: (B G) the row at each place; any row where there is none.
        masks: By window: (B, 1, G, 1, L) to add to the logits, or None.
    """

    prompts: SharedPrompts
    lengths: Tensor
    rows: Tensor
    places: Tensor
    order: Tensor
    masks: dict[int | None, Tensor | None]


class SlotCache(Cache):
    """Keys and values in two (R, K, C, E) tensors per layer.

    transformers only calls ``update`` and asks for lengths. :meth:`prefilling`, :meth:`extending` and :meth:`decoding`
    set the rows and columns to write; the model runs within one of these contexts.

    Attributes:
        slots: R, the number of rows that fit in memory.
        columns: C, the number of positions that fit in memory.
        column_bytes: Bytes of one position of one row, in all layers that have run.
        windows: Sliding windows of the layers that have run.
    """

    def __init__(self) -> None:
        try:
            super().__init__(layers=[])
        except TypeError:  # transformers 4
            super().__init__()
        self.slots = self.columns = self.column_bytes = 0
        self.windows: set[int | None] = set()
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = self._from = self._positions = self._places = self._columns = torch.empty(0, dtype=torch.long)
        self._length = 0  # positions before the longest row's token
        self._fresh: SharedPrompts | None = None  # takes the prompts of a pass
        self._layer = 0  # the layer that runs
        self._shared: list[Shared | None] = []  # the prompt of each row of the last pass
        self._continued: list[_Continued] = []  # the same by prompt
        self._first = 0  # the first row that is read
        self._width = 0  # columns that are read
        self._prefill = False
        self._extending = False
        self._stepping = False
        self._masks: dict[int | None, Tensor | None] = {}

    def arrange(self, sources: Sequence[int | None], slots: int, columns: int, width: int) -> None:
        """Reorders and resizes the cache, in place if the size stays the same.

        Args:
            sources: For each new row, the old row to take. None: the row's content does not matter.
            slots: Number of rows to allocate.
            columns: Number of columns to allocate.
            width: Number of columns that are in use.
        """
        self._shared, self._continued = [], []
        same = (slots, columns) == (self.slots, self.columns)
        moves = [(i, source) for i, source in enumerate(sources) if source is not None and not (same and i == source)]
        self.slots, self.columns = slots, columns
        if same and not moves:
            return
        places = to_device(moves, self._keys[0].device).unbind(1) if moves and self._keys else None
        for store in (self._keys, self._values):
            for layer, old in enumerate(store):
                new = old if same else _zeros(old, slots, old.shape[1], columns, old.shape[3])
                if places is not None:
                    to, source = places
                    new[to, :, :width] = old[source, :, :width]  # the right side is a copy: order does not matter
                store[layer] = new

    def clear(self, rows: Sequence[int]) -> None:
        """Writes zeros to rows."""
        for store in (self._keys, self._values) if rows else ():
            for layer in store:
                layer[list(rows)] = 0

    def free(self) -> None:
        """Frees the memory."""
        self._keys, self._values, self._shared, self._continued = [], [], [], []
        self.slots = self.columns = self.column_bytes = 0

    @contextmanager
    def prefilling(
        self, rows: Tensor, prompts: Tensor, longest: int, shared: SharedPrompts | None = None
    ) -> Iterator[None]:
        """Within it, the model runs on whole prompts, padded on the right: ``rows[i]`` takes prompt ``prompts[i]``.

        If ``shared`` is given, it takes them all, and no row does.
        """
        self._rows, self._from, self._width, self._prefill, self._fresh = rows, prompts, longest, True, shared
        try:
            with self._active():
                yield
        finally:
            self._fresh = None

    @contextmanager
    def extending(self, row: int, positions: Tensor, width: int) -> Iterator[None]:
        """Within it, the model runs on L tokens of one row, at (L,) consecutive positions, the last at ``width - 1``.

        The columns before them must have their keys and values.
        """
        self._positions, self._width, self._prefill, self._first = positions, width, False, row
        self._columns, self._length, self._extending = positions, width - len(positions), True
        try:
            with self._active():
                yield
        finally:
            self._extending = False

    @contextmanager
    def decoding(
        self, positions: Sequence[int], device: torch.device, first: int = 0, shared: Sequence[Shared | None] = ()
    ) -> Iterator[Tensor]:
        """Within it, the model runs on one token of each row from ``first`` on.

        Args:
            positions: Position of each row's token.
            device: The model's.
            first: The first row.
            shared: The prompt that each row continues, or None for rows with all their keys in the cache. Default: None
                for all.

        Yields:
            (R,) positions.
        """
        bases = [0 if place is None else place[0].lengths[place[1]] for place in shared] or [0] * len(positions)
        columns = [p - base for p, base in zip(positions, bases, strict=True)]
        self._positions, self._columns = to_device([positions, columns], device)
        self._width, self._length = max(columns) + 1, max(positions)
        self._prefill, self._first = False, first
        self._continue(shared, device)
        with self._active():
            yield self._positions

    @contextmanager
    def stepping(
        self, positions: Tensor, columns: Tensor, width: int, longest: int, shared: Sequence[Shared | None]
    ) -> Iterator[None]:
        """As :meth:`decoding`, at places that the device alone knows: no shape depends on them.

        Args:
            positions: (R,) position of each row's token.
            columns: (R,) the column that it takes.
            width: Number of columns that are read, more than any of ``columns``.
            longest: A bound of the positions.
            shared: As in :meth:`decoding`.
        """
        self._positions, self._columns = positions, columns
        self._width, self._length = width, longest
        self._prefill, self._first, self._stepping = False, 0, True
        self._continue(shared, positions.device)
        try:
            with self._active():
                yield
        finally:
            self._stepping = False

    def _continue(self, shared: Sequence[Shared | None], device: torch.device) -> None:
        """Sets the prompts that rows continue in this pass."""
        if self._shared != (given := list(shared)):
            self._shared, self._continued = given, _deal(given, device)
        for part in self._continued:  # windows move with the positions
            for window in part.masks.keys() - {None}:
                del part.masks[window]

    @contextmanager
    def _active(self) -> Iterator[None]:
        self._masks, self._places = {}, self._places[:0]
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def _place(self, heads: int) -> Tensor:
        """Returns (R K) indices of the new keys in the flat (R K C) cache: copying whole vectors is fastest."""
        if len(self._places) != len(self._columns) * heads:
            lines = torch.arange(len(self._columns) * heads, device=self._columns.device) + self._first * heads
            self._places = lines * self.columns + self._columns.repeat_interleave(heads)
        return self._places

    def mask(self, window: int | None, like: Tensor) -> Tensor | None:
        """Returns the mask to add to the logits: (R, 1, 1, C) in decoding, (L, C) otherwise, None if only causal.

        Args:
            window: Number of tokens that a query sees, itself included. None: all.
            like: A tensor of the dtype and the device that the mask gets.
        """
        self.windows.add(window)
        if window is not None and window >= self._width:
            window = None
        if window not in self._masks:
            columns = torch.arange(self._width, device=like.device)
            # the causal mask hides padding on the right of a prompt, and decoding overwrites it
            queries = columns[:, None] if self._prefill else self._columns[:, None]
            if not self._prefill and not self._extending:
                queries = queries[:, None, None]
            seen = columns <= queries
            if window is not None:
                seen &= columns > queries - window
            plain = self._prefill and window is None
            mask = None if plain else torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            self._masks[window] = mask
        return self._masks[window]

    def own_lengths(self, query: Tensor, key: Tensor) -> Tensor | None:
        """Returns (R,) int32 numbers of keys, if each row has all of its own and a kernel reads no more of them."""
        groups = query.shape[1] // key.shape[1]
        if not self._stepping or self._continued or self._width < self.columns:
            return None
        if not reads_own_lengths(key.device, key.dtype, key.shape[-1], groups):
            return None
        return (self._columns + 1).to(torch.int32)

    @property
    def continued(self) -> list[_Continued]:
        """Rows that continue prompts, in the pass of now."""
        return [] if self._prefill or self._extending else self._continued

    def prompts_of(self, part: _Continued) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of prompts in the layer that runs, (B, K, L, E)."""
        return part.prompts.keys[self._layer], part.prompts.values[self._layer]

    def mask_prompts(self, window: int | None, part: _Continued, like: Tensor) -> Tensor | None:
        """Returns the mask to add to the logits of rows over the prompts that they continue, (B, 1, G, 1, L), or None.

        Args:
            window: Number of tokens that a query sees, itself included. None: all.
            part: The rows and prompts.
            like: A tensor of the dtype and the device that the mask gets.
        """
        if window is not None and window > self._length:
            window = None
        if window not in part.masks:
            lengths, longest = part.prompts.lengths, max(part.prompts.lengths)
            columns = torch.arange(longest, device=like.device)
            seen = (columns < part.lengths[:, None])[:, None, None, None]
            if window is not None:
                queries = self._positions[part.order].view(len(lengths), 1, -1, 1, 1)
                seen = seen & (columns > queries - window)
            plain = window is None and min(lengths) == longest
            part.masks[window] = (
                None if plain else torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, -torch.inf)
            )
        return part.masks[window]

    # ------------------------------------------------------------------------------------------- called by transformers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values, (R, K, 1 or L, E), and returns what its queries see."""
        self._layer = layer_idx
        for store, new in ((self._keys, key_states), (self._values, value_states)):
            if layer_idx == len(store):
                # zeros, because a masked column has no effect unless it holds a NaN
                store.append(_zeros(new, self.slots, new.shape[1], self.columns, new.shape[3]))
                self.column_bytes += new.shape[1] * new.shape[3] * new.element_size()
            if self._prefill and self._fresh is not None:
                (self._fresh.keys if store is self._keys else self._fresh.values).append(new.contiguous())
            elif self._prefill:
                store[layer_idx][self._rows, :, : self._width] = new[self._from]
            elif self._extending:
                store[layer_idx][self._first, :, self._width - new.shape[2] : self._width] = new[0]
            else:
                store[layer_idx].flatten(0, 2).index_copy_(0, self._place(new.shape[1]), new.flatten(0, 2))
        if self._prefill:
            return key_states, value_states
        rows = slice(self._first, self._first + len(key_states))
        return self._keys[layer_idx][rows, :, : self._width], self._values[layer_idx][rows, :, : self._width]

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        """Returns the number of columns before the new ones."""
        return 0 if self._prefill else self._length

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int | None:
        """Returns None: the cache grows when needed."""
        return None


def _deal(shared: Sequence[Shared | None], device: torch.device) -> list[_Continued]:
    """Deals the rows that continue prompts into places, G for each prompt of a :class:`SharedPrompts`."""
    rows: dict[SharedPrompts, list[list[int]]] = {}
    for i, place in enumerate(shared):
        if place is not None:
            prompts, number = place
            rows.setdefault(prompts, [[] for _ in prompts.lengths])[number].append(i)
    found = []
    for prompts, groups in rows.items():
        most = max(map(len, groups))
        order = to_device([[*group, *[0] * (most - len(group))] for group in groups], device).flatten()
        own = to_device([row for group in groups for row in group], device)
        places = to_device([b * most + i for b, group in enumerate(groups) for i in range(len(group))], device)
        lengths = to_device(prompts.lengths, device)
        found.append(_Continued(prompts, lengths, own, places, order, {}))
    return found


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Makes zeros of a tensor's dtype and device. On a CPU the system zeroes each page when it is first touched.

    PyTorch's own zeros touch all pages at once. When one long row makes the cache grow, that takes longer than a step.
    Freed memory that the C library keeps would be zeroed at once too, and a huge page, of which a row touches a part,
    is zeroed whole; so the pages come from the system, and are small.
    """
    size = math.prod(shape)
    if like.device.type != "cpu" or not size:
        return like.new_zeros(shape)
    pages = mmap.mmap(-1, size * like.element_size())
    if advice := getattr(mmap, "MADV_NOHUGEPAGE", None):
        with suppress(OSError):  # a system without huge pages
            pages.madvise(advice)
    return torch.frombuffer(pages, dtype=like.dtype, count=size).view(shape)  # holds the pages


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends over a :class:`SlotCache`. The cache makes the mask for each layer's window.

    Keys are never repeated for the query heads that share them: in decoding, these heads become positions of one head.

    Args:
        module: The attention layer.
        query: (R, H, 1 or L, E).
        key: (R, K, C, E), where K divides H.
        value: (R, K, C, E).
        attention_mask: Unused.
        scaling: Factor on the logits. Default: ``E ** -0.5``.
        dropout: Unused, because the model is in eval mode.
        sliding_window: Number of tokens that a query sees, itself included. None: all.
        softcap: Bound of soft-capped logits (Gemma 2).
        s_aux: (H,) attention sinks (GPT-OSS).
        kwargs: Other arguments that transformers passes; unused.

    Returns:
        (R, 1 or L, H, E) outputs, and None in place of attention weights.
    """
    cache = _ACTIVE.get()
    window = sliding_window or None
    mask = cache.mask(window, query)
    rows, heads, length, _ = query.shape
    shared = key.shape[1]
    plain = softcap is None and s_aux is None
    if plain and (lengths := cache.own_lengths(query, key)) is not None:
        out = own_length_attention(query, key, value, lengths, window, scaling)
    elif cache.continued:
        split = query.reshape(rows, shared, heads // shared, -1)
        out = _continue_prompts(cache, split, key, value, mask, window, scaling, softcap, s_aux)
        out = out.reshape(rows, heads, 1, -1)
    elif not plain:
        split = query.unflatten(1, (shared, -1))
        out = _eager_attention(split, key[:, :, None], value[:, :, None], mask, scaling, softcap, s_aux).flatten(1, 2)
    elif length == 1 and mask is not None:
        packed = query.reshape(rows, shared, heads // shared, -1)
        out = F.scaled_dot_product_attention(packed, key, value, mask, scale=scaling).reshape(rows, heads, 1, -1)
    else:
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=heads != shared
        )
    return out.transpose(1, 2).contiguous(), None


def _eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with soft caps and sinks, which SDPA lacks.

    Queries have the shape (R, K, H / K, 1 or L, E); keys and values have (R, K, 1, C, E).
    """
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is None:
        mask = torch.full(logits.shape[-2:], -torch.inf, device=logits.device).triu(1)
    logits = logits + (mask[:, None] if mask.ndim == 4 else mask)
    if sinks is not None:  # a sink is a key without a value: it takes probability and adds nothing
        sink = sinks.view(1, key.shape[1], -1, 1, 1).expand(*logits.shape[:-1], 1).to(logits)
        logits = torch.cat([logits, sink], -1)
    return logits.softmax(-1)[..., : key.shape[-2]].to(value.dtype) @ value


def _continue_prompts(
    cache: SlotCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one token per row over its own columns and over the prompt that it continues.

    A prompt's keys are read once for all of its rows. The two softmaxes are merged by their log-sum-exps.

    Args:
        cache: The cache.
        query: (R, K, H / K, E).
        key: (R, K, C, E) own keys.
        value: (R, K, C, E) own values.
        mask: (R, 1, 1, C) over own columns.
        window: Number of tokens that a query sees, itself included. None: all.
        scaling: Factor on the logits. None: ``E ** -0.5``.
        softcap: Bound of soft-capped logits.
        sinks: (H,) attention sinks.

    Returns:
        (R, K, H / K, E) outputs.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = _part(query, key, value, mask, scale, softcap, sinks)
    for part in cache.continued:
        count, most = len(part.prompts.lengths), len(part.order) // len(part.prompts.lengths)
        asked = query[part.order].unflatten(0, (count, most)).transpose(1, 2)  # (B, K, G, H / K, E)
        seen = cache.mask_prompts(window, part, query)
        found, weight = _part(asked.flatten(2, 3), *cache.prompts_of(part), seen, scale, softcap, None, groups=most)
        found, weight = (t.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1)[part.places] for t in (found, weight))
        share = torch.sigmoid(weight - lse[part.rows])
        out[part.rows] = out[part.rows].lerp(found, share.to(out))
    return out


def _part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys.

    Args:
        query: (R, K, M, E), where M is ``groups`` times the number of heads that share keys.
        key: (R, K, C, E).
        value: (R, K, C, E).
        mask: Added to the logits as (R, 1, 1, C), or (R, 1, G or 1, 1, C).
        scale: Factor on the logits.
        softcap: Bound of soft-capped logits.
        sinks: (H,) attention sinks.
        groups: G, the number of rows that ask the same keys.

    Returns:
        (R, K, M, E) outputs, and (R, K, M, 1) log-sum-exps of the logits, in at least fp32.
    """
    logits = (query * scale) @ key.mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask is not None:
        logits = (logits.unflatten(2, (groups, -1)) + (mask if mask.ndim == 5 else mask[:, :, None])).flatten(2, 3)
    least = torch.finfo(logits.dtype)
    highest = logits.amax(-1, keepdim=True).clamp_min(least.min)  # a window may hide all keys of a part
    if sinks is not None:  # a sink is a key without a value: it takes probability and adds nothing
        sink = sinks.view(1, key.shape[1], -1, 1).to(logits)
        highest = torch.maximum(highest, sink)
    weights = (logits - highest).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sink - highest).exp()
    total = total.clamp_min(least.tiny)
    return (weights.to(value.dtype) @ value) / total.to(value.dtype), highest + total.log()


AttentionInterface.register(NAME, slot_attention)


def cut_rows(positions: Sequence[int]) -> tuple[int, int]:
    """Finds where to cut rows in two, so that as few columns as possible are read.

    Args:
        positions: Position of each row's token.

    Returns:
        The first row of the second part, and the number of columns that are not read.
    """
    whole = max(positions)
    before = list(accumulate(positions, max))
    after = list(accumulate(reversed(positions), max))[::-1]
    saved = [
        cut * (whole - before[cut - 1]) + (len(positions) - cut) * (whole - after[cut])
        for cut in range(1, len(positions))
    ]
    most = max(saved, default=0)
    return (saved.index(most) + 1 if saved else 0), most


class Decoder:
    """A transformers model with its cache: prompts and next tokens in, logits out.

    The model's attention must be set to :data:`NAME`.

    Args:
        model: The transformers model.
        adapted: The peft model around it, if its rows may have adapters of their own.
    """

    def __init__(self, model: PreTrainedModel, adapted: nn.Module | None = None) -> None:
        self.model, self.adapted, self.cache = model, adapted, SlotCache()
        embeddings: Any = model.get_input_embeddings()
        self.device: torch.device = embeddings.weight.device
        # transformers 5.40 drops the name past_key_values
        named = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"

    @cached_property
    def pass_bytes(self) -> int:
        """What a pass costs before it reads the cache, as bytes: the weights, and what starting operations takes.

        It is the same on ranks that hold parts of one model, because they must decide alike: a head whose vocabulary is
        cut counts whole. Embeddings are not read whole.
        """
        layers: int = self.model.config.get_text_config().num_hidden_layers
        embeddings: Any = self.model.get_input_embeddings()
        inner = sum(p.nbytes for p in self.model.base_model.parameters() if p is not embeddings.weight)
        head: int = vocabulary_size(self.model) * embeddings.weight[:1].nbytes
        return inner + head + _LAYER_BYTES * layers

    def adapter_names(self) -> tuple[str, tuple[str, ...]]:
        """Returns peft's names of the active adapter, and of all that a row may have: none if several are active."""
        peft: Any = self.adapted
        if peft is None:
            return BASE, ()
        status = peft.get_model_status()
        active = status.active_adapters if status.enabled is True else []
        if len(active) > 1:  # a row can have one name
            return BASE, ()
        return next(iter(active), BASE), (BASE, *peft.peft_config)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[Sequence[int]],
        adapters: Adapters = None,
        shared: SharedPrompts | None = None,
    ) -> Tensor:
        """Runs each prompt once.

        Args:
            prompts: B lists of token ids.
            rows: For each prompt, the cache rows that get its keys and values.
            adapters: For each prompt, the name of its adapter. None: the model as it is set.
            shared: Takes the keys and values in place of the rows.

        Returns:
            (B, V) logits of each prompt's next token.
        """
        longest = max(map(len, prompts))
        ids = self._tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        last = self._tensor([len(prompt) - 1 for prompt in prompts])
        target = self._tensor([row for group in rows for row in group])
        prompt_of = self._tensor([i for i, group in enumerate(rows) for _ in group])
        positions = torch.arange(longest, device=self.device).expand(len(ids), -1)

        def only_last(head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (args[0][torch.arange(len(last), device=last.device), last][:, None],)

        # logits of whole prompts would not fit, and logits_to_keep takes the same positions for all prompts
        hook = self.model.get_output_embeddings().register_forward_pre_hook(only_last)
        try:
            with self.cache.prefilling(target, prompt_of, longest, shared):
                return self._run(ids, positions, adapters)[:, -1]
        finally:
            hook.remove()

    def extend(
        self, tokens: Sequence[int], row: int, start: int, adapters: Adapters = None, every: bool = False
    ) -> Tensor:
        """Runs tokens of one row that come after those whose keys it has.

        Args:
            tokens: L token ids.
            row: The cache row.
            start: Position of the first token.
            adapters: The name of the row's adapter, in a list. None: the model as it is set.
            every: Make the logits of every token, not of the last alone.

        Returns:
            (L, V) logits of the tokens that follow, or (1, V).
        """
        end, kept = start + len(tokens), len(tokens) if every else 1
        positions = torch.arange(start, end, device=self.device)
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:, -kept:],))
        try:
            with self.cache.extending(row, positions, end):
                return self._run(self._tensor([tokens]), positions[None], adapters)[0]
        finally:
            hook.remove()

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        adapters: Adapters = None,
        shared: Sequence[Shared | None] = (),
    ) -> Tensor:
        """Runs one token per cache row, from the first row on.

        All rows of a pass read as many columns as the longest. Where that is more memory than the model itself, long
        rows and short ones run apart.

        Args:
            tokens: Token ids, one per row.
            positions: Their positions.
            adapters: The name of each row's adapter. None: the model as it is set.
            shared: The prompt that each row continues, or None. Default: None for all.

        Returns:
            (R, V) logits of each row's next token.
        """
        if shared:  # then long prompts are no part of the rows
            return self._decode(0, tokens, positions, adapters, shared)
        if len(positions) * (max(positions) - min(positions)) * self.cache.column_bytes > self.pass_bytes:
            cut, saved = cut_rows(positions)
            if saved * self.cache.column_bytes > self.pass_bytes:
                parts = (slice(0, cut), slice(cut, None))
                run = (self._decode(p.start, tokens[p], positions[p], adapters and adapters[p]) for p in parts)
                return torch.cat([*run])
        return self._decode(0, tokens, positions, adapters)

    def _decode(
        self,
        first: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        adapters: Adapters,
        shared: Sequence[Shared | None] = (),
    ) -> Tensor:
        with self.cache.decoding(positions, self.device, first, shared) as at:
            return self._run(self._tensor(tokens)[:, None], at[:, None], adapters)[:, -1]

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        width: int,
        longest: int,
        shared: Sequence[Shared | None],
    ) -> Tensor:
        """Runs one token per cache row, as :meth:`decode` does, without a copy to the device or a wait for it.

        Args:
            tokens: (R,) token ids.
            positions: See :meth:`SlotCache.stepping`, as for the others.
            columns: (R,).
            width: Number of columns that are read.
            longest: A bound of the positions.
            shared: The prompt that each row continues, or None.

        Returns:
            (R, V) logits of each row's next token.
        """
        with self.cache.stepping(positions, columns, width, longest, shared):
            return self._run(tokens[:, None], positions[:, None], None)[:, -1]

    def _run(self, ids: Tensor, positions: Tensor, adapters: Adapters) -> Tensor:
        # with a 4-D mask models do not make their own, but pass it on; slot_attention does not read it
        mask = torch.zeros(len(ids), 1, 1, 1, dtype=self.model.dtype, device=self.device)
        options: dict[str, Any] = {self._cache_name: self.cache, "use_cache": True}
        model: nn.Module = self.model
        if adapters is not None and self.adapted is not None:
            model, options["adapter_names"] = self.adapted, list(adapters)
        logits: Tensor = model(input_ids=ids, position_ids=positions, attention_mask=mask, **options).logits
        return logits

    def _tensor(self, values: Any) -> Tensor:
        return to_device(values, self.device)
