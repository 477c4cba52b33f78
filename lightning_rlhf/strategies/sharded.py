"""A child module and its optimizer under a ColossalAI plugin, with this rank's shards of them.

Each ColossalAI plugin shards the flattened weights of a child in its own way. This module gives both ways one
interface: a :class:`Slot` is a trained parameter, and a :class:`LocalShard` is this rank's part of it. So clipping,
checkpoints and export are written once.

ColossalAI has no public methods for the reduced gradients of a ZeRO optimizer and of Gemini's chunks, and for the
position of a parameter in a chunk. These are read from its objects. ``tests/strategies`` compares each of them with a
single process, and fails if a new version of ColossalAI changes them.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils._pytree import tree_iter, tree_map_only

from lightning_rlhf.functional.precision import without_subclass
from lightning_rlhf.strategies.parallel import TensorParallel
from lightning_rlhf.utils.collectives import data_ranks


class Slot(NamedTuple):
    """A trained parameter.

    Attributes:
        name: Name in the child.
        number: Index among all parameters of the optimizer, which is its key in torch's optimizer states.
        group: Index of its parameter group.
        parameter: The child's parameter, which forward passes read.
        shape: Shape of the parameter, or of this rank's slice of it (tensor parallelism).
        dtype: Original data type, which exports keep.
    """

    name: str
    number: int
    group: int
    parameter: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype


class LocalShard(NamedTuple):
    """This rank's part of a slot.

    Attributes:
        start: First element of the flattened parameter.
        size: Number of elements. Further elements of the tensors are padding.
        weight: (size or more,) weights that the optimizer updates.
        key: Key in the optimizer's ``state``.
        replicated: Whether every rank holds the same elements.
    """

    start: int
    size: int
    weight: Tensor
    key: Tensor
    replicated: bool = False


class _Call:
    """Arguments of a forward pass, hidden from ColossalAI's wrappers."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs


class _Inner(nn.Module):
    """The module that a plugin wraps: the child's forward without its hooks, which already run outside."""

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
    """A child of the LightningModule with its optimizer, sharded by a plugin.

    The child keeps its class and its names. Its calls go through the plugin's wrapper, which the LightningModule does
    not see. :meth:`unboost` undoes everything.

    Attributes:
        can_freeze: Whether a parameter may be frozen during training.
        splits_weights: Whether weights are sharded, so that passes gather them.

    Args:
        path: Path of the child in the LightningModule.
        child: The child.
        optimizer: An optimizer of the child's parameters.
        plugin: A ColossalAI plugin.
        dtype: Data type to which the plugin casts weights. None: weights are not cast.
        master_weights: Whether the optimizer updates fp32 copies of the weights.
        tensor: What cuts parameters over ranks that share a copy of the model. None: nothing does.
    """

    can_freeze: ClassVar[bool] = True
    splits_weights: ClassVar[bool] = False

    def __init__(
        self,
        path: str,
        child: nn.Module,
        optimizer: Optimizer,
        plugin: Any,
        dtype: torch.dtype | None = None,
        master_weights: bool = False,
        tensor: TensorParallel | None = None,
    ) -> None:
        from colossalai.booster import Booster

        self.ranks, self.tensor = data_ranks(), tensor
        self.path, self.child, self.master_weights = path, child, master_weights
        self._dtype, self._running = dtype, False
        self.original = optimizer
        self.used = False  # whether a forward pass with gradients has run
        self.bypass = False  # whether calls bypass the wrapper
        self.has_gradients = False  # whether there are gradients for the next step
        names = {id(p): name for name, p in child.named_parameters()}
        every = [(g, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        self.slots = [
            Slot(names[id(p)], i, g, p, p.shape, p.dtype) for i, (g, p) in enumerate(every) if p.requires_grad
        ]
        self._trainable = {id(p): p.requires_grad for p in child.parameters()}
        edges = itertools.accumulate((len(group["params"]) for group in optimizer.param_groups), initial=0)
        # ColossalAI replaces these lists' parameters in the groups
        self.group_parameters = [list(group["params"]) for group in optimizer.param_groups]
        self.indices = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        constants = _constant_buffers(child) if dtype is not None else {}
        # the plugins cast the whole child; these are only references, because the plugins make new tensors
        self._buffer_dtypes = [(module, name, buffer.dtype) for module, name, buffer in named_buffers(child)]
        self._original_data = {id(p): p.data for p in child.parameters()}
        self.booster = Booster(plugin=plugin)
        self.model, self.wrapped, *_ = self.booster.boost(_Inner(child, dtype), self.prepare(optimizer))
        self.attach()
        for (module, name), buffer in constants.items():
            module._buffers[name] = buffer.to(module._buffers[name].device)  # type: ignore[union-attr]
        for slot in self.slots:
            given = self._original_data.pop(id(slot.parameter))
            if master_weights:  # ColossalAI makes master weights from the 16-bit weights
                self.set_shard(slot, partial(given.reshape(-1).narrow, 0))
        cast = {id(p) for p in child.parameters() if p.dtype != self._original_data.get(id(p), p).dtype}
        self._original_data = {i: weight for i, weight in self._original_data.items() if i in cast}
        own = child.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.bypass:
                return tree_map_only(Tensor, without_subclass, own(*args, **kwargs))
            self.used = self.used or torch.is_grad_enabled()
            self.check()
            with self.running():
                return tree_map_only(Tensor, without_subclass, self.model(_Call(args, kwargs)))

        child.forward = forward
        parts = [part for part in child.modules() if part is not child and any(True for _ in part.parameters(False))]
        # functions instead of methods, so that a copy of the module does not copy self
        self._guards = [part.register_forward_pre_hook(lambda *call: self._refuse_part(*call)) for part in parts]

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """Returns an optimizer that the plugin supports."""
        return optimizer

    def attach(self) -> None:
        """Notes the objects that the plugin has made."""
        return

    def check(self) -> None:
        """Refuses a forward pass that the plugin does not support."""
        return

    def check_trained(self) -> None:
        """Checks before a backward pass that the same parameters are trained as at the start of ``fit``.

        Raises:
            RuntimeError: The trained parameters have changed.
        """
        changed = [
            (name, p.requires_grad)
            for name, p in self.child.named_parameters()
            if p.requires_grad != self._trainable.get(id(p)) and (p.requires_grad or not self.can_freeze)
        ]
        if changed:
            name, trains = changed[0]
            now, then = ("trained", "frozen") if trains else ("frozen", "trained")
            raise RuntimeError(
                f"{self.path}.{name} is {now} now, but was {then} at the start of fit, when ColossalAI shards "
                f"parameters ({len(changed)} such parameters). Set requires_grad before fit, or use ddp."
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, submodules of the child may run, because the child itself is running."""
        former, self._running = self._running, True
        try:
            yield
        finally:
            self._running = former

    def _refuse_part(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        """Checks before each forward pass of a submodule that the child itself is running.

        Raises:
            RuntimeError: The submodule is called directly, but its weights are sharded or cast.
        """
        if self._running or self.bypass:
            return
        cast = self._dtype is not None and any(
            isinstance(t, Tensor) and t.is_floating_point() and t.dtype != self._dtype for t in args
        )
        if cast or self.splits_weights:
            raise RuntimeError(
                f"{type(part).__name__}, a submodule of {self.path}, was called directly. ColossalAI casts weights, "
                f"and gathers them under Gemini, only in calls of the child. Call self.{self.path}(...), or use ddp."
            )

    def sync_master_weights(self) -> None:
        """Copies changes of the weights since the last step, such as averages or bounds, to the fp32 weights.

        Unchanged weights are the rounded fp32 weights.
        """
        for slot in self.slots if self.master_weights else ():
            shard = self.local_shard(slot)
            if shard is not None and shard.size:
                stepped = shard.weight[: shard.size]
                stepped.copy_(_keep_digits(stepped, self.working_weight(slot, shard)))

    def frozen(self) -> dict[str, Tensor]:
        """Returns cast parameters that are not trained, in their original data type, by all their names."""
        named = self.child.named_parameters(remove_duplicate=False)
        given = self._original_data
        return {name: _keep_digits(given[id(p)], p.data).cpu() for name, p in named if id(p) in given}

    @property
    def device(self) -> torch.device:
        """The device of collectives."""
        device = next(self.child.parameters()).device
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device

    # ------------------------------------------------------------------------------------------------- training

    def no_sync(self) -> AbstractContextManager[None]:
        """Within it, backward passes do not reduce gradients, if the plugin allows it."""
        return cast(AbstractContextManager[None], self.booster.no_sync(self.model, self.wrapped))

    def step(self) -> None:
        """Steps the optimizer, unless there was no backward pass."""
        if self.has_gradients:
            self.sync_master_weights()
            self.wrapped.step()
        self.has_gradients = False

    def zero_grad(self) -> None:
        """Clears gradients."""
        self.wrapped.zero_grad()
        self.has_gradients = False

    # ------------------------------------------------------------------------------------------------- shards

    @abstractmethod
    def local_shard(self, slot: Slot) -> LocalShard | None:
        """Returns this rank's part of a slot, or None."""

    @abstractmethod
    def gradient(self, slot: Slot, shard: LocalShard) -> Tensor | None:
        """Returns the shard's (size or more,) reduced gradient, multiplied by :attr:`scale`, or None."""

    @abstractmethod
    def working_weight(self, slot: Slot, shard: LocalShard) -> Tensor:
        """Returns a view of the weights that forward passes read, for the shard's elements."""

    @property
    def scale(self) -> float:
        """Factor of gradients, against underflow in fp16."""
        mixin = getattr(self.wrapped, "mixed_precision_mixin", getattr(self.wrapped, "mix_precision_mixin", None))
        return float(getattr(mixin, "loss_scale", 1.0))

    def gradients(
        self, parameters: Collection[nn.Parameter] | None = None
    ) -> Iterator[tuple[Slot, LocalShard, Tensor]]:
        """Yields this rank's shards with their slots and gradients, for some parameters or for all."""
        wanted = None if parameters is None else {id(p) for p in parameters}
        for slot in self.slots:
            if wanted is None or id(slot.parameter) in wanted:
                shard = self.local_shard(slot)
                gradient = None if shard is None else self.gradient(slot, shard)
                if shard is not None and gradient is not None:
                    yield slot, shard, gradient

    def grad_squares(self, parameters: Collection[nn.Parameter] | None = None) -> Tensor:
        """Returns the (1,) sum of squared gradients over all ranks, in fp64."""
        total = torch.zeros(2, 2, dtype=torch.float64, device=self.device)
        for slot, shard, gradient in self.gradients(parameters):  # summed on the device, to wait for it only once
            cut = self.tensor is not None and self.tensor.is_cut(slot.parameter)
            total[int(shard.replicated), int(cut)] += gradient.float().norm().double().to(self.device) ** 2
        dist.all_reduce(total[0], group=self.ranks.group)
        whole, parts = total.sum(0).split(1)
        if self.tensor is not None:
            dist.all_reduce(parts, group=self.tensor.ranks.group)
        squares: Tensor = (whole + parts).cpu() / self.scale**2
        return squares

    def state(self, key: Tensor) -> dict[str, Any]:
        """Returns the optimizer's state of a shard."""
        found: dict[str, Any] = self.wrapped.optim.state.get(key, {})
        return found

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, to which schedulers write."""
        groups: list[dict[str, Any]] = self.wrapped.optim.param_groups
        return groups

    def set_value(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """Sets a parameter on this rank, with its fp32 weights.

        Args:
            slot: The parameter.
            read: ``read(start, size)`` returns this part of the flattened new value.
        """
        slot.parameter.data.copy_(read(0, slot.shape.numel()).view(slot.shape))
        self.set_shard(slot, read)

    def set_shard(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """Sets this rank's shard of a parameter; see :meth:`set_value`."""
        shard = self.local_shard(slot)
        if shard is not None and shard.size:
            shard.weight[: shard.size].copy_(read(shard.start, shard.size))
            self.working_weight(slot, shard).copy_(shard.weight[: shard.size])

    # ------------------------------------------------------------------------------------------------- whole tensors

    def gather(self, slot: Slot, select: Callable[[LocalShard], Tensor], everywhere: bool = False) -> Tensor | None:
        """Gathers a tensor from the shards of all ranks with different data, in at least fp32.

        Where tensor parallelism cuts the parameter, it is this rank's slice.

        Args:
            slot: The parameter.
            select: Returns a shard's (size or more,) tensor, such as the weight or a state.
            everywhere: Gather on every rank. Otherwise only the first rank gets the tensor, and the others get None.
        """
        shard = self.local_shard(slot)
        flat = torch.zeros(slot.shape.numel(), dtype=torch.promote_types(slot.dtype, torch.float32))
        if shard is not None and (self.ranks.place == 0 or not shard.replicated):
            flat[shard.start : shard.start + shard.size] = select(shard)[: shard.size].to(flat)
        flat = flat.to(self.device)
        if everywhere:
            dist.all_reduce(flat, group=self.ranks.group)
        else:
            dist.reduce(flat, self.ranks.members[0], group=self.ranks.group)
        return flat.view(slot.shape).cpu() if everywhere or self.ranks.place == 0 else None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it, each rank can call the child alone, with whole weights. All ranks must enter and leave."""
        former, self.bypass = self.bypass, True
        try:
            with torch.no_grad():
                yield
        finally:
            self.bypass = former

    def unboost(self, weights: bool) -> None:
        """Makes the child an ordinary module again, whole on every rank.

        Args:
            weights: Gather the weights from all ranks. False if a rank may be lost; the weights are then lost too.
        """
        del self.child.forward
        for guard in self._guards:
            guard.remove()
        self.detach()
        if weights:
            self.sync_master_weights()
            for slot in self.slots:
                value = self.gather(slot, lambda shard: shard.weight, everywhere=True)
                slot.parameter.data = value.to(slot.dtype)  # type: ignore[union-attr]
                slot.parameter.grad = None
        for p in self.child.parameters():
            if id(p) in self._original_data:
                p.data = _keep_digits(self._original_data[id(p)], p.data)
        for module, name, dtype in self._buffer_dtypes:
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.dtype != dtype:
                module._buffers[name] = buffer.to(dtype)

    @abstractmethod
    def detach(self) -> None:
        """Removes the plugin's hooks from the child."""


class ZeroBoosted(Boosted):
    """A child under ZeRO-1 or ZeRO-2: each parameter is flattened, padded, and split into one shard per rank."""

    def no_sync(self) -> AbstractContextManager[None]:
        """Has no effect under ZeRO-2, which reduces after each backward pass."""
        return nullcontext() if self.booster.plugin.stage == 2 else super().no_sync()

    def flush(self) -> None:
        """Reduces gradients that a backward pass left in buckets.

        ColossalAI's ``backward`` does this for one optimizer, but a graph may reach several.
        """
        if self.wrapped.require_grad_sync:
            self.wrapped._reduce_grad(self.wrapped._partition_grads)

    def local_shard(self, slot: Slot) -> LocalShard | None:
        """Returns this rank's part of the flattened parameter."""
        master = self.wrapped.get_working_to_master_map().get(id(slot.parameter))
        if master is None:
            return None
        start = self.ranks.place * master.numel()
        return LocalShard(start, max(0, min(master.numel(), slot.shape.numel() - start)), master, master)

    def gradient(self, slot: Slot, shard: LocalShard) -> Tensor | None:
        """Returns this rank's part of the reduced gradient."""
        store = self.wrapped.pid_to_grad_store[id(slot.parameter)]
        found = store.get_partitioned_gradients_by_param_id(slot.group, id(slot.parameter))
        if not found:
            return None
        index = 0 if self.booster.plugin.stage == 2 else store.local_rank
        gradient: Tensor = found[index]
        return gradient

    def working_weight(self, slot: Slot, shard: LocalShard) -> Tensor:
        """Returns this rank's part of the parameter, which is whole on every rank."""
        return slot.parameter.data.view(-1)[shard.start : shard.start + shard.size]

    def detach(self) -> None:
        """Removes the hooks that reduce gradients."""
        for handle in self.wrapped.grad_handles:
            handle.remove()


class GeminiBoosted(Boosted):
    """A child under Gemini: parameters are concatenated to chunks, and each chunk is split into one part per rank."""

    can_freeze = False
    splits_weights = True

    def attach(self) -> None:
        """Notes the chunks, and records the parameters that passes read."""
        self.chunks = self.model.chunk_manager
        self._fake = {id(self.wrapped.id_to_real_params[i]): p for i, p in self.wrapped.id_to_fake_params.items()}
        self._reads = _make_recorder()
        self.model.hooks.append(self._reads)
        for slot in self.slots:
            slot.parameter.__class__ = _guarded_parameter()

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """Replaces torch's Adam by ColossalAI's, which Gemini needs, with the same parameter groups."""
        from colossalai.nn.optimizer import CPUAdam, FusedAdam, HybridAdam

        if type(optimizer) in (CPUAdam, FusedAdam, HybridAdam):
            return optimizer
        if type(optimizer) not in (Adam, AdamW) or any(g["amsgrad"] or g["maximize"] for g in optimizer.param_groups):
            raise ValueError(
                "Gemini supports only Adam and AdamW, without amsgrad and maximize, but the optimizer is "
                f"{type(optimizer).__name__}. Use torch.optim.AdamW, colossalai's HybridAdam, or another strategy."
            )
        for group in optimizer.param_groups:
            group["bias_correction"] = True
        # the same dicts, so that schedulers, which have the original optimizer, change them
        return cast(Optimizer, HybridAdam(optimizer.param_groups, adamw_mode=type(optimizer) is AdamW))

    def no_sync(self) -> AbstractContextManager[None]:
        """Has no effect: Gemini reduces after each backward pass."""
        return nullcontext()

    def check(self) -> None:
        """Refuses a pass without gradients before Gemini has measured memory."""
        manager = self.model.gemini_manager
        if not torch.is_grad_enabled() and manager.need_warmup and manager.is_warmup():
            raise RuntimeError(
                "Gemini's placement='auto' measures memory in the first training step, but a pass without gradients "
                "(validation, a rollout) came first. Use placement='static', or trainer.num_sanity_val_steps=0."
            )

    def backward(self, loss: Tensor) -> None:
        """Runs a backward pass. Parameters that the forward pass did not use get zero gradients, which Gemini needs."""
        from colossalai.tensor.param_op_hook import ColoParamOpHookManager

        left_out = [s.parameter for s in self.slots if id(s.parameter) not in self._reads.ids]
        if left_out:
            with ColoParamOpHookManager.use_hooks(*self.model.hooks):
                loss = loss + 0.0 * sum((p.flatten()[0] for p in left_out), loss.new_zeros(()))
        self.wrapped.backward(loss)
        self._reads.ids.clear()  # checkpointed layers have read parameters again

    def step(self) -> None:
        """Steps the optimizer."""
        has_gradients = self.has_gradients
        super().step()
        if has_gradients and self.original is not self.wrapped.optim:
            self.original.step()  # it has no gradients and changes nothing, but schedulers check that it was called

    def zero_grad(self) -> None:
        """Clears gradients and the overflow counter."""
        super().zero_grad()
        self.chunks.accumulating_grads = False
        self.chunks.overflow_counter.zero_()

    def _find_in_chunk(self, slot: Slot) -> tuple[Any, int, int, int] | None:
        """Returns the chunk, the shard's begin and end in this rank's part of it, and its start in the parameter."""
        chunk = self.chunks.get_chunk(slot.parameter)
        info = chunk.tensors_info[slot.parameter]
        if chunk.keep_gathered:
            return chunk, info.offset, info.end, 0
        # int, because chunk sizes are numpy integers, which weights-only loading of a checkpoint refuses
        begin = int(max(0, info.offset - chunk.shard_begin))
        end = int(min(chunk.shard_size, info.end - chunk.shard_begin))
        return (chunk, begin, end, int(begin + chunk.shard_begin - info.offset)) if begin < end else None

    def local_shard(self, slot: Slot) -> LocalShard | None:
        """Returns the parameter's elements in this rank's part of the chunk."""
        found = self._find_in_chunk(slot) if slot.parameter.requires_grad else None
        if found is None:
            return None
        chunk, begin, end, start = found
        stepped = chunk.paired_chunk if self.model.master_weights else chunk
        key = self._fake[id(slot.parameter)]
        return LocalShard(start, end - begin, stepped.payload[begin:end], key, replicated=chunk.keep_gathered)

    def gradient(self, slot: Slot, shard: LocalShard) -> Tensor | None:
        """Returns the same part of the gradients' chunk."""
        chunk, begin, end, _ = self._find_in_chunk(slot)  # type: ignore[misc]
        if not self.has_gradients:
            return None
        grad_chunk = chunk if self.chunks.reuse_fp16_chunk else chunk.grad_chunk
        gradient: Tensor = grad_chunk.payload[begin:end]
        return gradient

    def working_weight(self, slot: Slot, shard: LocalShard) -> Tensor:
        """Returns the same part of the 16-bit weights' chunk."""
        chunk, begin, end, _ = self._find_in_chunk(slot)  # type: ignore[misc]
        weight: Tensor = chunk.payload[begin:end]
        return weight

    def set_value(self, slot: Slot, read: Callable[[int, int], Tensor]) -> None:
        """Sets this rank's shard. The other shards are gathered when they are read."""
        self.set_shard(slot, read)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gathers all chunks, and releases them afterwards."""
        with super().gathered():
            for chunk in self.chunks.get_chunks(self.model.fp16_params):
                self.chunks.access_chunk(chunk)
            try:
                yield
            finally:
                self.model._post_forward()  # releases all chunks, as Gemini's forward pass without gradients does
                self.model.gemini_manager.reset_attributes()

    def unboost(self, weights: bool) -> None:
        """Makes the child and its parameters ordinary again."""
        super().unboost(weights)
        for parameter in self.child.parameters():
            parameter.__class__ = nn.Parameter
            vars(parameter).pop("_ddp_to_ignore", None)  # Gemini's mark of frozen parameters; the next fit may train it

    def detach(self) -> None:
        """Removes the hooks that reduce gradients."""
        self.model.remove_hooks()
        self.model.remove_hooks = lambda: None  # Gemini calls it again in __del__, when new hooks may be installed


def _make_recorder() -> Any:
    """Makes a hook that records the ids of parameters that passes with gradients read."""
    from colossalai.tensor.param_op_hook import ColoParamOpHook

    class ReadRecorder(ColoParamOpHook):
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

    return ReadRecorder()


#: Operations that a tensor with freed memory allows, because they neither read nor write it.
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
        f"Weights are read or written ({getattr(func, '__name__', func)}) while Gemini shards them, for instance by a "
        "callback or by a submodule that is called directly. Do it within "
        "lightning_rlhf.strategies.whole_weights(strategy, child), which all ranks must enter, or use zero2."
    )


class _Released(Tensor):
    """The ``data`` or ``detach()`` of a weight with freed memory: state dicts may hold it, but nobody may read it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in _METADATA and func not in _VIEWS:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        _refuse_read(func)


@cache
def _guarded_parameter() -> Any:
    """Makes a class of Gemini's parameters that raises an error if freed memory is read, which would crash the process.

    ColossalAI's class gathers weights for each operation of a pass except those whose names begin with ``__``.
    """
    from colossalai.tensor.colo_parameter import ColoParameter
    from colossalai.tensor.param_op_hook import ColoParamOpHookManager

    class GuardedParameter(ColoParameter):
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
            mine = (t for t in tree_iter(args) if isinstance(t, GuardedParameter))
            return any(t.numel() and not t.untyped_storage().size() for t in mine)

    return GuardedParameter


def named_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yields each buffer with its module and its name in that module."""
    for part in module.modules():
        yield from ((part, name, buffer) for name, buffer in part._buffers.items() if buffer is not None)


def is_persistent(module: nn.Module, name: str) -> bool:
    """Whether a checkpoint holds a module's buffer."""
    return name not in module._non_persistent_buffers_set


def _constant_buffers(child: nn.Module) -> dict[tuple[nn.Module, str], Tensor]:
    """Copies buffers that are not in checkpoints: constants such as rotary frequencies, which must not be cast."""
    return {
        (module, name): buffer.clone()
        for module, name, buffer in named_buffers(child)
        if buffer.is_floating_point() and not is_persistent(module, name)
    }


def _keep_digits(exact: Tensor, rounded: Tensor) -> Tensor:
    """Returns ``exact`` where ``rounded`` is unchanged, and ``rounded`` where it was written to."""
    exact = exact.to(rounded.device)
    return torch.where(rounded == exact.to(rounded.dtype), exact, rounded.to(exact.dtype))
