"""Counts the bytes of living tensors by what they are for, while a module's own code runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lightning_rlhf.functional import logprobs
from lightning_rlhf.functional.logprobs import rows_of_blocks

#: Parts of a rank's memory that a run of the module shows.
KINDS = ("weights", "gradients", "states", "activations", "logits", "temporary")
#: What a number is taken for that nobody computed: below every tolerance, and not zero.
UNKNOWN = 1e-9
_ATEN = torch.ops.aten


class Segment(NamedTuple):
    """A stretch of a step between two places of the model.

    Attributes:
        name: Where it is.
        peak: Bytes by kind at the moment of it when most memory was taken.
        flops: Floating-point operations in it.
        held: Bytes by kind when it begins.
    """

    name: str
    peak: Counter[str]
    flops: int
    held: Counter[str]


@dataclass(eq=False)
class _Held:
    """A storage that lives."""

    kind: str
    size: int


class Meter(TorchDispatchMode):
    """Counts storages while they live, each once. It works on real tensors, and on fake ones, which have no numbers.

    Where code asks a fake tensor for a number, it gets a small one that is finite and not zero; where the shape of a
    result depends on numbers (a mask), the result is as large as it may become.

    Args:
        vocabulary: Last dimension by which logits are known.

    Attributes:
        segments: Those that are done, in order.
        now: Bytes that live now, by kind.
        repeats: How often what runs now would run: its operations count as many times.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocabulary = vocabulary
        self.segments: list[Segment] = []
        self.now: Counter[str] = Counter()
        self.repeats = 1
        self._held: weakref.WeakKeyDictionary[Any, _Held] = weakref.WeakKeyDictionary()
        self._name, self._peak, self._most, self._flops = "start", Counter[str](), -1, 0
        self._begun = Counter[str]()

    def begin(self, name: str) -> None:
        """Ends a segment, and begins the next one.

        Args:
            name: Where it is.
        """
        self.segments.append(Segment(self._name, self._peak, self._flops, self._begun))
        self._name, self._flops, self._most, self._begun = name, 0, -1, self.now.copy()
        self._look()

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts tensors as of a kind, whether they were seen before or not."""
        for tensor in tensors:
            if (held := self._held.get(tensor.untyped_storage())) is None:
                self._meet(tensor, kind)
            else:
                self.now[held.kind] -= held.size
                self.now[kind] += held.size
                held.kind = kind
        self._look()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and meets what it returns."""
        kwargs = kwargs or {}
        try:
            out = function(*args, **kwargs)
        except DataDependentOutputException:
            return _unknown_number(args[0])
        except DynamicOutputShapeException:
            out = _largest(function, args)
        tree_map_only(Tensor, self._meet, out)
        self._flops += self.repeats * _count_flops(function, args, kwargs, out)
        return out

    def _meet(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        if storage in self._held:
            return
        if kind is None:
            logits = tensor.ndim > 0 and tensor.shape[-1] == self.vocabulary
            kind = "logits" if logits else "activations" if torch.is_grad_enabled() else "temporary"
        held = self._held[storage] = _Held(kind, storage.nbytes())
        self.now[kind] += held.size
        weakref.finalize(storage, self._leave, held)
        self._look()

    def _leave(self, held: _Held) -> None:
        self.now[held.kind] -= held.size

    def _look(self) -> None:
        if (total := self.now.total()) > self._most:
            self._most, self._peak = total, self.now.copy()


@contextmanager
def few_blocks(meter: Meter) -> Iterator[None]:
    """Within it, heads run the first two blocks of logits and the last one, and the second stands for those between.

    They are hundreds and alike. The second one is the first that runs beside what is left of another.
    """

    def rows(count: int, most: int) -> Iterator[slice]:
        every = list(rows_of_blocks(count, most))
        for i, block in enumerate(every):
            if i in (0, 1, len(every) - 1):
                meter.repeats = len(every) - 2 if i == 1 < len(every) - 1 else 1
                yield block
        meter.repeats = 1

    logprobs.rows_of_blocks = rows
    try:
        yield
    finally:
        logprobs.rows_of_blocks = rows_of_blocks


def _unknown_number(tensor: Tensor) -> float | int | bool:
    if tensor.dtype.is_floating_point:
        return UNKNOWN
    return True if tensor.dtype == torch.bool else 1


def _largest(function: Any, args: Any) -> Tensor:
    """The result of an operation on a mask that leaves nothing out."""
    source: Tensor = args[0]
    if function is _ATEN.nonzero.default:
        return source.new_empty((source.numel(), source.ndim), dtype=torch.long)
    if function is _ATEN.index.Tensor:
        (mask,) = (index for index in args[1] if index is not None)
        return source.new_empty((mask.numel(), *source.shape[mask.ndim :]))
    return source.new_empty(source.numel())


def _count_flops(function: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Operations of matrix products and of attention, which torch's own counter leaves out on CPUs."""
    if function is _ATEN._scaled_dot_product_flash_attention_for_cpu.default:
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    if function is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return int(sdpa_backward_flop_count(*(t.shape for t in args[:4])))
    packet = getattr(function, "_overloadpacket", None)
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0
