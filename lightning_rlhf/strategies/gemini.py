"""A child module and its optimizer under Gemini, which shards weights too.

Gemini gathers chunks of weights for each operation that reads them. ColossalAI has no public way to run one backward
pass through several optimizers, to leave parameters out, or to run a part of a model, so this module uses the methods
of its wrapper one by one. ``tests/strategies`` fails if a new version of ColossalAI changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only, tree_unflatten

from lightning_rlhf.functional.precision import without_subclass
from lightning_rlhf.strategies.sharded import Boosted, LocalShard, Slot


class GeminiBoosted(Boosted):
    """A child under Gemini: parameters are concatenated to chunks, and each chunk is split into one part per rank."""

    hook: Any

    def attach(self) -> None:
        """Notes the chunks, and replaces the class of parameters."""
        from colossalai.tensor.colo_parameter import ColoParameter

        self.chunks = self.model.chunk_manager
        self._fake = {id(self.wrapped.id_to_real_params[i]): p for i, p in self.wrapped.id_to_fake_params.items()}
        self._fresh: set[int] = set()  # ids of parameters with gradients for the next step
        self._places = {chunk: i for i, chunk in enumerate(self.chunks.get_chunks(self.model.fp16_params))}
        self._own = {id(part) for part in self.parts.values() if isinstance(part, nn.Parameter)}
        for slot in self.slots:
            slot.parameter.__class__ = _guarded_parameter()
        # frozen weights stay whole; as Gemini's class they would make a tensor of its own of all that they touch
        for parameter in self.child.parameters():
            if type(parameter) is ColoParameter:
                parameter.__class__ = nn.Parameter

    def prepare(self, optimizer: Optimizer) -> Optimizer:
        """Replaces torch's Adam by ColossalAI's, which Gemini needs, with the same parameter groups."""
        for slot in self.slots:  # before Gemini's own hook, which returns no gradient
            self._guards.append(slot.parameter.register_hook(lambda gradient: self._refuse_gradient()))
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

    @staticmethod
    def share_hook(units: Sequence[GeminiBoosted], module: nn.Module) -> None:
        """Lets operations gather weights of all optimizers.

        Args:
            units: All optimizers.
            module: The LightningModule, which tells by ``training`` whether it is evaluated.
        """
        hook = _make_hook(units, module)
        for unit in units:
            unit.hook = hook

    def gathering(self) -> AbstractContextManager[None]:
        """Within it, operations gather the weights that they read."""
        from colossalai.tensor.param_op_hook import ColoParamOpHookManager

        return cast(AbstractContextManager[None], ColoParamOpHookManager.use_hooks(self.hook))

    def note_gathers(self, parameters: list[Tensor]) -> None:
        """Notes the order in which chunks are gathered."""
        for chunk in self.chunks.get_chunks(parameters):
            if not chunk.is_gathered:
                self._fired.append(self._places[chunk])

    def may_read(self, parameters: list[Tensor], evaluates: bool) -> bool:
        """Whether a pass may read parameters now: not by code that one rank alone may run, such as a logger's."""
        passes = self._outermost is not None or self._in_backward or torch.is_grad_enabled() or evaluates
        return passes or all(id(p) in self._own for p in parameters)

    def _refuse_gradient(self) -> None:
        """Refuses gradients that no backward pass of the strategy has asked for.

        Raises:
            RuntimeError: There is such a gradient.
        """
        if not self._in_backward:
            raise RuntimeError(
                "Gemini cannot return gradients of weights, as torch.autograd.grad and loss.backward() want. Call "
                "self.manual_backward(loss), or use zero2."
            )

    def begin(self, part: nn.Module) -> None:
        """Refuses a pass without gradients before Gemini has measured memory."""
        manager = self.model.gemini_manager
        if torch.is_grad_enabled():
            manager.pre_iter()
        elif manager.need_warmup and manager.is_warmup():
            raise RuntimeError(
                "Gemini's placement='auto' measures memory in the first training step, but a pass without gradients "
                "(validation, a rollout) came first. Use placement='static', or trainer.num_sanity_val_steps=0."
            )
        self._gathering = self.gathering()
        self._gathering.__enter__()

    def end(self) -> None:
        """Releases weights after a pass without gradients."""
        self._gathering.__exit__(None, None, None)
        if not torch.is_grad_enabled():
            self.release()

    def release(self) -> None:
        """Releases all chunks, as Gemini's forward pass without gradients does."""
        self.model._post_forward()
        self.model.gemini_manager.reset_attributes()

    def sync_master_weights(self) -> None:
        """Copies changes of the weights to the fp32 weights, after all chunks were released."""
        self.release()
        super().sync_master_weights()

    def note_gradient(self, number: int) -> None:
        """Notes that the next step moves a parameter."""
        self._fresh.add(id(self.slots[number].parameter))

    @staticmethod
    def run_backward(units: Sequence[GeminiBoosted], loss: Tensor) -> None:
        """Runs a backward pass, and reduces the gradients of all optimizers that it reaches.

        Gemini needs a gradient for each parameter of an optimizer: those that the loss does not depend on get zeros.

        Args:
            units: All optimizers.
            loss: The loss, scaled.
        """
        for unit in units:
            unit.model._pre_backward()
        with ExitStack() as stack:
            stack.enter_context(units[0].gathering())
            for unit in units:
                stack.enter_context(unit.model.param_op_hook.switch_to_backward())
            loss.backward()
        for unit in units:
            left_out = [s.parameter for s in unit.slots if not vars(s.parameter)["_gemini_reduced"]]
            if len(left_out) == len(unit.slots):
                unit.release()
                continue
            unit.has_gradients = True
            fresh = set(unit._fresh)
            unit._add_zeros(left_out)
            unit._fresh = fresh
            unit.model._post_backward()

    def _add_zeros(self, parameters: list[nn.Parameter]) -> None:
        frozen = [p for p in parameters if not p.requires_grad]
        for p in frozen:  # while training; chunks still wait for their gradients
            p.requires_grad_(True)
        with torch.enable_grad(), self.gathering():
            zeros = [p[(0,) * p.dim()] * 0 for p in parameters]
            with self.model.param_op_hook.switch_to_backward():
                if zeros:
                    torch.stack(zeros).sum().backward()
        for p in frozen:
            p.requires_grad_(False)

    def step(self) -> None:
        """Steps the optimizer, for parameters that have got gradients."""
        has_gradients = self.has_gradients
        every = [group["params"] for group in self.groups]
        moved = {id(fake) for i, fake in self._fake.items() if i in self._fresh}
        for group in self.groups:
            group["params"] = [p for p in group["params"] if id(p) in moved]
        super().step()
        for group, parameters in zip(self.groups, every, strict=True):
            group["params"] = parameters
        self._fresh.clear()
        if has_gradients and self.original is not self.wrapped.optim:
            self.original.step()  # it has no gradients and changes nothing, but schedulers check that it was called

    def zero_grad(self) -> None:
        """Clears gradients and the overflow counter."""
        super().zero_grad()
        self._fresh.clear()
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
        found = self._find_in_chunk(slot)
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
        from colossalai.tensor.param_op_hook import ColoParamOpHookManager

        with super().gathered(), ColoParamOpHookManager.use_hooks():
            for chunk in self.chunks.get_chunks(self.model.fp16_params):
                self.chunks.access_chunk(chunk)
            try:
                yield
            finally:
                self.release()

    def unboost(self, weights: bool) -> None:
        """Makes the child and its parameters ordinary again."""
        super().unboost(weights)
        for parameter in self.child.parameters():
            parameter.__class__ = nn.Parameter
            vars(parameter).pop("_ddp_to_ignore", None)  # Gemini's mark of frozen parameters; the next fit may train it

    def detach(self) -> None:
        """Removes the hooks that reduce gradients."""
        frozen = [slot.parameter for slot in self.slots if not slot.parameter.requires_grad]
        for parameter in frozen:  # while training; Gemini leaves its hooks on them
            parameter.requires_grad_(True)
        self.model.remove_hooks()
        for parameter in frozen:
            parameter.requires_grad_(False)
        self.model.remove_hooks = lambda: None  # Gemini calls it again in __del__, when new hooks may be installed


def _make_hook(units: Sequence[GeminiBoosted], module: nn.Module) -> Any:
    """Makes a hook that gathers the chunks of several optimizers, each by its own manager."""
    from colossalai.tensor.param_op_hook import ColoParamOpHook

    owners = {id(slot.parameter): unit for unit in units for slot in unit.slots}

    class Gathers(ColoParamOpHook):
        def _split(self, params: list[Tensor]) -> Iterator[tuple[GeminiBoosted, list[Tensor]]]:
            mine = [(owners[id(p)], p) for p in params if id(p) in owners]
            mine = [(unit, p) for unit, p in mine if not unit.bypass]  # otherwise its weights are whole
            for unit in dict.fromkeys(unit for unit, _ in mine):
                yield unit, [p for owner, p in mine if owner is unit]

        def pre_forward(self, params: list[Tensor]) -> None:
            for unit, own in self._split(params):
                if not unit.may_read(own, not module.training):
                    _refuse_read("without gradients, in training_step")
                unit.note_gathers(own)
                unit.model.param_op_hook.pre_forward(own)

        def post_forward(self, params: list[Tensor]) -> None:
            for unit, own in self._split(params):
                unit.model.param_op_hook.post_forward(own)

        def pre_backward(self, params: list[Tensor]) -> None:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "Gemini's weights are gone in a second backward pass through gradients (create_graph=True, a "
                    "gradient penalty). Use zero2 or ddp."
                )
            for unit, own in self._split(params):
                unit.note_gathers(own)
                unit.model.param_op_hook.pre_backward(own)

        def post_backward(self, params: list[Tensor]) -> None:
            for unit, own in self._split(params):
                unit.model.param_op_hook.post_backward(own)

    return Gathers()


#: Operations that a tensor with freed memory allows, because they neither read nor write it.
_METADATA = {
    *("__get__", "__set__", "__delete__", "__hash__", "__len__", "data_ptr", "dim", "element_size", "get_device"),
    *("is_complex", "is_contiguous", "is_floating_point", "ndimension", "nelement", "numel", "register_hook"),
    *("register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "size", "storage", "storage_offset"),
    *("stride", "untyped_storage"),
}
#: Operators whose names look like those of methods that do not compute.
_OPERATORS = {
    f"__{reverse}{name}__"
    for reverse in ("", "r")
    for name in (
        "add",
        "sub",
        "mul",
        "div",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "getitem",
        "eq",
        "ne",
        "abs",
    )
}
_DATA: Any = vars(torch._C.TensorBase)["data"].__get__
_VIEWS: tuple[Any, ...] = tuple(
    vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT", "H", "mH", "real", "imag")
)


def _refuse_read(func: Any) -> NoReturn:
    raise RuntimeError(
        f"Weights are read or written ({getattr(func, '__name__', func)}) while Gemini shards them, for instance by a "
        "callback. Do it within lightning_rlhf.strategies.whole_weights(strategy, child), which all ranks must enter, "
        "or use zero2."
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

    Within a pass each operation gathers weights, as with ColossalAI's class, but returns ordinary tensors. Views are
    copied, because the weights may be gone when a backward pass reads a view.
    """
    from colossalai.tensor.colo_parameter import ColoParameter
    from colossalai.tensor.param_op_hook import ColoParamOpHookManager

    class GuardedParameter(ColoParameter):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs, name = kwargs or {}, getattr(func, "__name__", "")
            reads = name not in _METADATA or func in _VIEWS or func == _DATA
            computes = func in _VIEWS or (reads and (not name.startswith("__") or name in _OPERATORS))
            if computes and ColoParamOpHookManager.has_hook():
                return _gather_and_call(func, name, args, kwargs)
            with torch._C.DisableTorchFunctionSubclass():
                if not reads or not _any_released(args):
                    return _plain(func(*args, **kwargs))
                if func in (Tensor.detach, _DATA):
                    return Tensor._make_subclass(_Released, args[0])
            _refuse_read(func)

    def _gather_and_call(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        flat, form = tree_flatten((args, kwargs))
        read = [t for t in flat if isinstance(t, GuardedParameter)]
        if (name.endswith("_") and not name.startswith("__") and isinstance(args[0], GuardedParameter)) or isinstance(
            kwargs.get("out"), GuardedParameter
        ):
            _refuse_read(func)  # what is written to a gathered weight is lost
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_unflatten(ColoParamOpHookManager.pre_op(read, *flat), form)
            result = func(*args, **kwargs)
            if name != "to" and isinstance(result, Tensor):
                memory = result.untyped_storage().data_ptr()
                if any(t.untyped_storage().data_ptr() == memory for t in read):
                    result = result.clone()
            return tree_map_only(Tensor, without_subclass, ColoParamOpHookManager.post_op(read, result))

    def _any_released(args: Any) -> bool:
        mine = (t for t in tree_iter(args) if isinstance(t, GuardedParameter))
        return any(t.numel() and not t.untyped_storage().size() for t in mine)

    def _plain(result: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t if isinstance(t, GuardedParameter) else without_subclass(t), result)

    return GuardedParameter
