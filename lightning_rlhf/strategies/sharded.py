"""One child module and its optimizer under a ColossalAI plugin, and what each rank holds of them.

ColossalAI splits the flattened weights of a child over ranks, each plugin in its own way. Here both ways look alike: a
:class:`Slot` is a trained parameter, a :class:`LocalShard` what this rank holds of it. Clipping, checkpoints and export
are written once, over shards.

ColossalAI has public methods for all but these, which are read from its objects: the reduced gradients of a ZeRO
optimizer and of Gemini's chunks, and where in a chunk a parameter lies. ``tests/strategies`` compares every one with a
single process, and fails where a new version moves them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils._pytree import tree_iter, tree_map_only

from lightning_rlhf.functional.precision import plain


class Slot(NamedTuple):
    """A parameter that the optimizer trains.

    Attributes:
        name: In the child.
        number: By which torch's optimizer states call it: its place among all parameters of the optimizer.
        group: Its parameter group.
        parameter: The child's own, which forward passes read.
        shape: As a whole.
        dtype: As it came, and as exports keep it.
    """

    name: str
    number: int
    group: int
    parameter: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype


class LocalShard(NamedTuple):
    """What this rank holds of a slot.

    Attributes:
        start: Where it lies in the flattened parameter.
        size: Its elements; what follows them in the tensors is padding.
        weight: (size or more,) what the optimizer steps.
        key: What the optimizer's ``state`` calls it.
        replicated: Every rank holds the same.
    """

    start: int
    size: int
    weight: Tensor
    key: Tensor
    replicated: bool = False


class _Call:
    """Arguments of a forward pass, in a form that wrappers pass on unread."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


class _Inner(nn.Module):
    """What a plugin wraps: the child's own forward, without its hooks, which fire once, outside."""

    def __init__(self, child: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.child = child
        self._forward = child.forward
        self._dtype = dtype if getattr(child, "cast_inputs", True) else None

    def forward(self, call: _Call) -> Any:
        args, kwargs = call.args, call.kwargs
        if self._dtype is not None:
            cast = lambda t: t.to(self._dtype) if t.is_floating_point() else t  # noqa: E731
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return self._forward(*args, **kwargs)


class Boosted(ABC):
    """A child of the LightningModule that one optimizer trains, boosted by a plugin that splits it.

    The child stays where it is, under its own class and names: calls of it go through the plugin's wrapper, which the
    module never sees. :meth:`release` gives all back.

    Attributes:
        can_freeze: Whether a parameter may stop training in between.
        splits_weights: Whether passes gather what they read.

    Args:
        place: The child's name in the LightningModule.
        child: The child.
        optimizer: Over parameters of the child alone.
        plugin: A ColossalAI plugin.
        dtype: That forward passes compute in, where the plugin casts weights; None: as they are.
        master_weights: Whether the optimizer steps fp32 weights beside those.
    """

    can_freeze: ClassVar[bool] = True
    splits_weights: ClassVar[bool] = False

    def __init__(
        self,
        place: str,
        child: nn.Module,
        optimizer: Optimizer,
        plugin: Any,
        dtype: torch.dtype | None = None,
        master_weights: bool = False,
    ) -> None:
        from colossalai.booster import Booster

        self.place, self.child, self.master_weights = place, child, master_weights
        self._dtype, self._inside = dtype, False
        self.original = optimizer
        self.used = False  # whether a graph hangs on a forward pass
        self.alone = False  # whether calls pass the wrapper by
        self.stepping = False  # whether gradients wait for a step
        names = {id(p): name for name, p in child.named_parameters()}
        every = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        self.slots = [
            Slot(names[id(p)], i, g, p, p.shape, p.dtype) for i, (g, p) in enumerate(every) if p.requires_grad
        ]
        self._trains = {id(p): p.requires_grad for p in child.parameters()}
        edges = itertools.accumulate((len(group["params"]) for group in optimizer.param_groups), initial=0)
        self.members = [list(group["params"]) for group in optimizer.param_groups]  # ColossalAI puts pieces there
        self.indices = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        constants = _constants(child) if dtype is not None else {}
        # the plugins cast all of a child; references only: they put new tensors in their place
        self._types = [(module, name, buffer.dtype) for module, name, buffer in named_buffers(child)]
        self._given = {id(p): p.data for p in child.parameters()}
        self.booster = Booster(plugin=plugin)
        self.model, self.wrapped, *_ = self.booster.boost(_Inner(child, dtype), self.prepare(optimizer))
        self.attach()
        for (module, name), buffer in constants.items():
            module._buffers[name] = buffer.to(module._buffers[name].device)  # type: ignore[union-attr]
        for slot in self.slots:
            given = self._given.pop(id(slot.parameter))
            if master_weights:  # ColossalAI makes them of the 16-bit ones
                self.fill(slot, partial(given.reshape(-1).narrow, 0))
        cast = {id(p) for p in child.parameters() if p.dtype != self._given.get(id(p), p).dtype}
        self._given = {i: weight for i, weight in self._given.items() if i in cast}
        own = child.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.alone:
                return tree_map_only(Tensor, plain, own(*args, **kwargs))
            self.used = self.used or torch.is_grad_enabled()
            self.check()
            with self.inside():
                return tree_map_only(Tensor, plain, self.model(_Call(args, kwargs)))

        child.forward = forward
        parts = [part for part in child.modules() if part is not child and any(True for _ in part.parameters(False))]
        # functions, not methods: who copies the module must not copy this
        self._guards = [part.register_forward_pre_hook(lambda *call: self._refuse_part(*call)) for part in parts]

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer in a form that the plugin takes."""
        return optimizer

    def attach(self) -> None:
        """Notes what the plugin made, once it is there."""
        return

    def check(self) -> None:
        """Refuses a forward pass that the plugin can't make."""
        return

    def check_trained(self) -> None:
        """Refuses a backward pass where other parameters train than when the child was split.

        Raises:
            RuntimeError: They do.
        """
        changed = [
            (name, p.requires_grad)
            for name, p in self.child.named_parameters()
            if p.requires_grad != self._trains.get(id(p)) and (p.requires_grad or not self.can_freeze)
        ]
        if changed:
            name, trains = changed[0]
            now, then = ("trains", "was frozen") if trains else ("is frozen", "trained")
            raise RuntimeError(
                f"{self.place}.{name} {now} now and {then} when fit began, when ColossalAI splits what trains "
                f"({len(changed)} such parameters): set requires_grad before fit, or use ddp."
            )

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Within it parts of the child may run: a pass of the whole is under way."""
        former, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = former

    def _refuse_part(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        """Before each pass of a part of the child.

        Raises:
            RuntimeError: It is called by itself, where weights are in pieces or of another number type.
        """
        if self._inside or self.alone:
            return
        cast = self._dtype is not None and any(
            isinstance(t, Tensor) and t.is_floating_point() and t.dtype != self._dtype for t in args
        )
        if cast or self.splits_weights:
            raise RuntimeError(
                f"{type(part).__name__}, a part of {self.place}, was called by itself: under ColossalAI weights are "
                f"cast, and split under Gemini, for passes of the child alone. Call self.{self.place}(...), or use ddp."
            )

    def adopt(self) -> None:
        """Takes over what others wrote to the weights since the last step, such as averages or bounds.

        Where the optimizer steps fp32 weights, those are roundings of them.
        """
        for slot in self.slots if self.master_weights else ():
            piece = self.piece(slot)
            if piece is not None and piece.size:
                stepped = piece.weight[: piece.size]
                stepped.copy_(_finer(stepped, self.working(slot, piece)))

    def frozen(self) -> dict[str, Tensor]:
        """What does not train, as it was given, by all its names, where passes read it in fewer digits."""
        named = self.child.named_parameters(remove_duplicate=False)
        return {name: _finer(self._given[id(p)], p.data).cpu() for name, p in named if id(p) in self._given}

    @property
    def device(self) -> torch.device:
        """Where its ranks talk."""
        device = next(self.child.parameters()).device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device

    # ------------------------------------------------------------------------------------------------- training

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it backward passes leave gradients to this rank, where the plugin can."""
        return cast(AbstractContextManager[None], self.booster.no_sync(self.model, self.wrapped))

    def step(self) -> None:
        """One optimizer step; none where no backward pass came before."""
        if self.stepping:
            self.adopt()
            self.wrapped.step()
        self.stepping = False

    def zero_grad(self) -> None:
        """Drops gradients."""
        self.wrapped.zero_grad()
        self.stepping = False

    # ------------------------------------------------------------------------------------------------- pieces

    @abstractmethod
    def piece(self, slot: Slot) -> LocalShard | None:
        """What this rank holds of it; None: nothing."""

    @abstractmethod
    def gradient(self, slot: Slot, piece: LocalShard) -> Tensor | None:
        """(size or more,) the piece's reduced gradient, times :attr:`scale`; None where there is none."""

    @abstractmethod
    def working(self, slot: Slot, piece: LocalShard) -> Tensor:
        """What forward passes read of the piece, on this rank; shares its memory."""

    @property
    def scale(self) -> float:
        """What gradients are multiplied by, against underflow in fp16."""
        mixin = getattr(self.wrapped, "mixed_precision_mixin", getattr(self.wrapped, "mix_precision_mixin", None))
        return float(getattr(mixin, "loss_scale", 1.0))

    def gradients(self, parameters: Collection[nn.Parameter] | None = None) -> Iterator[tuple[LocalShard, Tensor]]:
        """This rank's pieces with their gradients; of some parameters, or of all."""
        wanted = None if parameters is None else {id(p) for p in parameters}
        for slot in self.slots:
            if wanted is None or id(slot.parameter) in wanted:
                piece = self.piece(slot)
                gradient = None if piece is None else self.gradient(slot, piece)
                if piece is not None and gradient is not None:
                    yield piece, gradient

    def squares(self, parameters: Collection[nn.Parameter] | None = None) -> Tensor:
        """(1,) sum of the gradients' squares over all ranks, in fp64."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for piece, gradient in self.gradients(parameters):  # added up on the device: it is waited for once
            total[int(piece.replicated)] += gradient.float().norm().double().to(self.device) ** 2
        dist.all_reduce(total[:1])
        return (total[:1] + total[1:]).cpu() / self.scale**2

    def state(self, key: Tensor) -> dict[str, Any]:
        """What the optimizer keeps of a piece."""
        found: dict[str, Any] = self.wrapped.optim.state.get(key, {})
        return found

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, which schedules write to."""
        groups: list[dict[str, Any]] = self.wrapped.optim.param_groups
        return groups

    def put(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """Sets a parameter, in all forms in which this rank holds it.

        Args:
            slot: Which.
            read: ``read(start, size)`` is that part of the new value, flattened.
        """
        slot.parameter.data.copy_(read(0, slot.shape.numel()).view(slot.shape))
        self.fill(slot, read)

    def fill(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """As :meth:`put`, of this rank's piece alone."""
        piece = self.piece(slot)
        if piece is not None and piece.size:
            piece.weight[: piece.size].copy_(read(piece.start, piece.size))
            self.working(slot, piece).copy_(piece.weight[: piece.size])

    # ------------------------------------------------------------------------------------------------- whole

    def collect(self, slot: Slot, of: Callable[[LocalShard], Tensor], everywhere: bool = False) -> Tensor | None:
        """A whole tensor out of all ranks' pieces, in fp32 at least.

        Args:
            slot: Of which parameter.
            of: (size or more,) its part, such as the weight or a state.
            everywhere: On every rank, else on rank 0, and None elsewhere.
        """
        piece = self.piece(slot)
        flat = torch.zeros(slot.shape.numel(), dtype=torch.promote_types(slot.dtype, torch.float32))
        if piece is not None and (dist.get_rank() == 0 or not piece.replicated):
            flat[piece.start : piece.start + piece.size] = of(piece)[: piece.size].to(flat)
        flat = flat.to(self.device)
        if everywhere:
            dist.all_reduce(flat)
        else:
            dist.reduce(flat, 0)
        return flat.view(slot.shape).cpu() if everywhere or dist.get_rank() == 0 else None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it calls of the child run on whole weights, on this rank alone; all ranks enter and leave."""
        former, self.alone = self.alone, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.alone = former

    def release(self, weights: bool) -> None:
        """Makes the child an ordinary module again, whole on every rank.

        Args:
            weights: Collect them from all ranks; False where a rank may be gone, and they are lost.
        """
        del self.child.forward
        for guard in self._guards:
            guard.remove()
        self.detach()
        if weights:
            self.adopt()
            for slot in self.slots:
                value = self.collect(slot, lambda piece: piece.weight, everywhere=True)
                slot.parameter.data = value.to(slot.dtype)  # type: ignore[union-attr]
                slot.parameter.grad = None
        for p in self.child.parameters():
            if id(p) in self._given:
                p.data = _finer(self._given[id(p)], p.data)
        for module, name, dtype in self._types:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.dtype != dtype:
                module._buffers[name] = buffer.to(dtype)

    @abstractmethod
    def detach(self) -> None:
        """Takes the plugin's hooks off the child."""


class ZeroBoosted(Boosted):
    """Under ZeRO-1 or ZeRO-2: each parameter is flattened, padded and cut into one piece a rank."""

    def no_sync(self) -> AbstractContextManager[None]:
        """ZeRO-2 reduces after each backward pass, whatever is asked for."""
        return nullcontext() if self.booster.plugin.stage == 2 else super().no_sync()

    def flush(self) -> None:
        """Reduces what a backward pass left in buckets.

        The public ``backward`` does this for one optimizer; where one graph reaches several, each must.
        """
        if self.wrapped.require_grad_sync:
            self.wrapped._reduce_grad(self.wrapped._partition_grads)

    def piece(self, slot: Slot) -> LocalShard | None:
        """Its share of the flattened parameter."""
        master = self.wrapped.get_working_to_master_map().get(id(slot.parameter))
        if master is None:
            return None
        start = dist.get_rank() * master.numel()
        return LocalShard(start, max(0, min(master.numel(), slot.shape.numel() - start)), master, master)

    def gradient(self, slot: Slot, piece: LocalShard) -> Tensor | None:
        """Its share of the reduced gradient."""
        store = self.wrapped.pid_to_grad_store[id(slot.parameter)]
        found = store.get_partitioned_gradients_by_param_id(slot.group, id(slot.parameter))
        if not found:
            return None
        index = 0 if self.booster.plugin.stage == 2 else store.local_rank
        gradient: Tensor = found[index]
        return gradient

    def working(self, slot: Slot, piece: LocalShard) -> Tensor:
        """Its share of the parameter, which is whole on every rank."""
        return slot.parameter.data.view(-1)[piece.start : piece.start + piece.size]

    def detach(self) -> None:
        """Takes the hooks off that reduce gradients."""
        for handle in self.wrapped.grad_handles:
            handle.remove()


class GeminiBoosted(Boosted):
    """Under Gemini: parameters lie one behind the other in chunks, and each chunk is cut into one part a rank."""

    can_freeze = False
    splits_weights = True

    def attach(self) -> None:
        """Notes the chunks, and has passes note what they read."""
        self.chunks = self.model.chunk_manager
        self._fake = {id(self.wrapped.id_to_real_params[i]): p for i, p in self.wrapped.id_to_fake_params.items()}
        self._seen = _seen()
        self.model.hooks.append(self._seen)
        for slot in self.slots:
            slot.parameter.__class__ = _held()

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """Gemini steps by ColossalAI's own Adams: torch's are translated, over the same parameter groups."""
        from colossalai.nn.optimizer import CPUAdam, FusedAdam, HybridAdam

        if type(optimizer) in (CPUAdam, FusedAdam, HybridAdam):
            return optimizer
        if type(optimizer) not in (Adam, AdamW) or any(g["amsgrad"] or g["maximize"] for g in optimizer.param_groups):
            raise ValueError(
                "Gemini steps by Adam or AdamW alone, without amsgrad and maximize, not by "
                f"{type(optimizer).__name__}: use torch.optim.AdamW (or colossalai's HybridAdam), or another strategy."
            )
        for group in optimizer.param_groups:
            group["bias_correction"] = True
        # the same dicts, so that schedules, which hold the original, reach them
        return cast(Optimizer, HybridAdam(optimizer.param_groups, adamw_mode=type(optimizer) is AdamW))

    def no_sync(self) -> AbstractContextManager[None]:
        """Gemini reduces after each backward pass, whatever is asked for."""
        return nullcontext()

    def check(self) -> None:
        """Refuses a pass without gradients before memory was measured."""
        manager = self.model.gemini_manager
        if not torch.is_grad_enabled() and manager.need_warmup and manager.is_warmup():
            raise RuntimeError(
                "Gemini's placement='auto' measures memory in the first training step, and a pass without gradients "
                "(validation, a rollout) came before it: use placement='static', or trainer.num_sanity_val_steps=0."
            )

    def backward(self, loss: Tensor) -> None:
        """A backward pass; parameters that the forward pass left out get gradients of zeros, as Gemini needs."""
        from colossalai.tensor.param_op_hook import ColoParamOpHookManager

        left_out = [s.parameter for s in self.slots if id(s.parameter) not in self._seen.ids]
        if left_out:
            with ColoParamOpHookManager.use_hooks(*self.model.hooks):
                loss = loss + 0.0 * sum((p.flatten()[0] for p in left_out), loss.new_zeros(()))
        self.wrapped.backward(loss)
        self._seen.ids.clear()  # of what a checkpointed layer read again

    def step(self) -> None:
        """One optimizer step."""
        stepping = self.stepping
        super().step()
        if stepping and self.original is not self.wrapped.optim:
            self.original.step()  # there is no gradient left: it moves nothing, and schedules see that a step was made

    def zero_grad(self) -> None:
        """Drops gradients, and what was noted of overflow."""
        super().zero_grad()
        self.chunks.accumulating_grads = False
        self.chunks.overflow_counter.zero_()

    def _place(self, slot: Slot) -> tuple[Any, int, int, int] | None:
        """Chunk of working weights, where the piece lies in this rank's part of it, and in the parameter."""
        chunk = self.chunks.get_chunk(slot.parameter)
        info = chunk.tensors_info[slot.parameter]
        if chunk.keep_gathered:
            return chunk, info.offset, info.end, 0
        # int: sizes of chunks are numpy's, which a checkpoint does not load back
        begin = int(max(0, info.offset - chunk.shard_begin))
        end = int(min(chunk.shard_size, info.end - chunk.shard_begin))
        return (chunk, begin, end, int(begin + chunk.shard_begin - info.offset)) if begin < end else None

    def piece(self, slot: Slot) -> LocalShard | None:
        """What of the parameter lies in this rank's part of its chunk."""
        place = self._place(slot) if slot.parameter.requires_grad else None
        if place is None:
            return None
        chunk, begin, end, start = place
        stepped = chunk.paired_chunk if self.model.master_weights else chunk
        key = self._fake[id(slot.parameter)]
        return LocalShard(start, end - begin, stepped.payload[begin:end], key, replicated=chunk.keep_gathered)

    def gradient(self, slot: Slot, piece: LocalShard) -> Tensor | None:
        """The same part of the chunk of gradients."""
        chunk, begin, end, _ = self._place(slot)  # type: ignore[misc]
        if not self.stepping:
            return None
        grad_chunk = chunk if self.chunks.reuse_fp16_chunk else chunk.grad_chunk
        gradient: Tensor = grad_chunk.payload[begin:end]
        return gradient

    def working(self, slot: Slot, piece: LocalShard) -> Tensor:
        """The same part of the chunk of 16-bit weights."""
        chunk, begin, end, _ = self._place(slot)  # type: ignore[misc]
        working: Tensor = chunk.payload[begin:end]
        return working

    def put(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """Sets what this rank holds; the rest is gathered when it is read."""
        self.fill(slot, read)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers all chunks, and puts them back afterwards."""
        with super().whole():
            for chunk in self.chunks.get_chunks(self.model.fp16_params):
                self.chunks.access_chunk(chunk)
            try:
                yield
            finally:
                self.model._post_forward()  # as its own no-grad forward does: all chunks back to their places
                self.model.gemini_manager.reset_attributes()

    def release(self, weights: bool) -> None:
        """Makes its parameters ordinary ones."""
        super().release(weights)
        for parameter in self.child.parameters():
            parameter.__class__ = nn.Parameter
            vars(parameter).pop("_ddp_to_ignore", None)  # Gemini's note that it was frozen; the next fit may train it

    def detach(self) -> None:
        """Takes the hooks off that reduce gradients."""
        self.model.remove_hooks()
        self.model.remove_hooks = lambda: None  # it calls it once more when it is collected; by then another may serve


def _seen() -> Any:
    """A hook that keeps the ids of the parameters that a graph reads."""
    from colossalai.tensor.param_op_hook import ColoParamOpHook

    class Seen(ColoParamOpHook):
        def __init__(self) -> None:
            self.ids: set[int] = set()

        def pre_forward(self, params: list[Tensor]) -> None:
            if torch.is_grad_enabled():
                self.ids.update(map(id, params))

        def post_forward(self, params: list[Tensor]) -> None:
            pass

        def pre_backward(self, params: list[Tensor]) -> None:
            pass

        def post_backward(self, params: list[Tensor]) -> None:
            pass

    return Seen()


#: What can be asked of a tensor whose memory was given back: nothing that reads or writes it.
_METADATA = {
    *("__get__", "__set__", "__delete__", "__hash__", "__len__", "data_ptr", "dim", "element_size", "get_device"),
    *("is_complex", "is_contiguous", "is_floating_point", "ndimension", "nelement", "numel", "register_hook"),
    *("register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size", "storage", "storage_offset"),
    *("stride", "untyped_storage"),
}
_DATA: Any = vars(torch._C.TensorBase)["data"].__get__
_VIEWS: tuple[Any, ...] = tuple(
    vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
)


def _refuse_read(func: Any) -> NoReturn:
    raise RuntimeError(
        f"Something reads or writes weights ({getattr(func, '__name__', func)}) while Gemini has them in pieces, such "
        "as a callback, or a part of a module that was called by itself. Do it within "
        "lightning_rlhf.strategies.whole_weights(strategy, child), which all ranks enter; or use zero2."
    )


class _Released(Tensor):
    """What ``data`` and ``detach()`` give of such a weight: state dicts hold it, but nobody reads its memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in _METADATA and func not in _VIEWS:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        _refuse_read(func)


@cache
def _held() -> Any:
    """A class of Gemini's parameters that refuses to be read while others have its parts, which would end the process.

    ColossalAI's own gathers for each operation of a pass but those whose names begin with ``__``.
    """
    from colossalai.tensor.colo_parameter import ColoParameter
    from colossalai.tensor.param_op_hook import ColoParamOpHookManager

    class Held(ColoParameter):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            gathers = ColoParamOpHookManager.has_hook() and (not name.startswith("__") or name == "__getitem__")
            if gathers or (name in _METADATA and func not in (*_VIEWS, _DATA)) or not _any_released(args):
                return super().__torch_function__(func, types, args, kwargs or {})
            if func in (Tensor.detach, _DATA):
                with torch._C.DisableTorchFunction():
                    return Tensor._make_subclass(_Released, args[0])
            _refuse_read(func)

    def _any_released(args: Any) -> bool:
        with torch._C.DisableTorchFunction():
            return any(isinstance(t, Held) and t.numel() and not t.untyped_storage().size() for t in tree_iter(args))

    return Held


def named_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Each buffer with the module that has it and its name there."""
    for part in module.modules():
        yield from ((part, name, buffer) for name, buffer in part._buffers.items() if buffer is not None)


def is_kept(module: nn.Module, name: str) -> bool:
    """Whether a checkpoint keeps a module's buffer."""
    return name not in module._non_persistent_buffers_set


def _constants(child: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Buffers that no checkpoint keeps: constants such as rotary frequencies, which a cast would spoil."""
    return {
        (module, name): buffer.clone()
        for module, name, buffer in named_buffers(child)
        if buffer.is_floating_point() and not is_kept(module, name)
    }


def _finer(exact: Tensor, rough: Tensor) -> Tensor:
    """Weights where ``rough`` is ``exact`` rounded, with all digits; elsewhere someone wrote to ``rough``."""
    exact = exact.to(rough.device)
    return torch.where(rough == exact.to(rough.dtype), exact, rough.to(exact.dtype))


class Group(MutableMapping[str, Any]):
    """A parameter group as a module sees it: the live settings, but its own parameters, which may be frozen or named.

    Args:
        live: What the optimizer steps by.
        parameters: The child's own.
    """

    def __init__(self, live: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        self._live, self._parameters = live, parameters

    def __getitem__(self, name: str) -> Any:
        return self._parameters if name == "params" else self._live[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._live[name] = value

    def __delitem__(self, name: str) -> None:
        del self._live[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def __len__(self) -> int:
        return len(self._live)


class ShardedOptimizer(Optimizer):
    """A boosted child's optimizer, as Lightning and its users see it.

    Not ColossalAI's own wrapper: Lightning makes classes that inherit from an optimizer's, and a ZeRO optimizer takes
    its hooks away when an object of such a class is collected. ``state`` is empty; :meth:`state_dict` is whole.

    Args:
        boosted: The child.
    """

    def __init__(self, boosted: Boosted) -> None:
        # not the base's: it would want parameters of its own
        self.boosted = boosted
        self.state = {}  # type: ignore[assignment]
        self.defaults = boosted.original.defaults

    @property
    def param_groups(self) -> list[Group]:  # type: ignore[override]
        """Live ones: a learning rate written here holds."""
        return [Group(*both) for both in zip(self.boosted.groups, self.boosted.members, strict=True)]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Runs the closure, then steps."""
        result = None if closure is None else closure()
        self.boosted.step()
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients."""
        self.boosted.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuses it.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "A parameter group is added while training, as BackboneFinetuning does, and ColossalAI splits what trains "
            "when fit begins: give the optimizer all groups in configure_optimizers, or use ddp."
        )

    def state_dict(self) -> dict[str, Any]:
        """The whole state in torch's own form, on rank 0; all ranks must call."""
        from lightning_rlhf.strategies.checkpoints import optimizer_state

        return optimizer_state(self.boosted)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes this rank's pieces of a whole state in torch's form."""
        from lightning_rlhf.strategies.checkpoints import load_optimizer_state

        load_optimizer_state(self.boosted, state_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.boosted.original!r})"
